"""What a panel is told beside the records: measurements of now, by the clock of the records, and lines of any text."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from pathlib import Path

import msgspec
import psutil
import pytest

from tests.support.scripted_engine import ScriptedEngines
from tests.support.world import until
from tuft_jupyter.config import load_settings
from tuft_jupyter_server import gauges
from tuft_jupyter_server.gauges import Gauges
from tuft_jupyter_server.host import Host
from tuft_jupyter_server.lab import LabFeed
from tuft_jupyter_server.live import messages
from tuft_jupyter_server.logtail import LogTail


def scenario(body: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 30))


def test_nobody_is_shown_what_was_measured_when_somebody_else_looked() -> None:
    """An hour later the first message would say how busy the machine was then, and set the panel's clock back."""

    async def body() -> None:
        machine = Gauges()
        with machine.watched():
            await until(lambda: bool(machine.latest))
        with machine.watched():
            assert machine.latest == {}
            assert machine.runs == {}

    scenario(body)


def test_the_use_of_processors_is_told_since_the_sample_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil tells it since the same thread last asked, and 0 to a thread that asks for the first time."""
    monkeypatch.setattr(gauges, "INTERVAL", 0.02)
    asked: list[int] = []
    cpu_percent = psutil.cpu_percent

    def noted() -> float:
        asked.append(threading.get_ident())
        return cpu_percent()

    monkeypatch.setattr(psutil, "cpu_percent", noted)

    async def body() -> None:
        together = threading.Barrier(4)
        await asyncio.gather(*(asyncio.to_thread(together.wait) for _ in range(4)))
        machine = Gauges()
        with machine.watched():
            await until(lambda: bool(machine.latest))
            assert len(asked) >= 2, "the first value is none of a stretch of time"
            await until(lambda: len(asked) >= 6)
        assert len(set(asked)) == 1

    scenario(body)


def test_the_panel_is_told_the_clock_of_the_records(tmp_path: Path) -> None:
    """It stands still while a laptop sleeps: by the wall clock, a run that trains now would seem idle for hours."""

    async def body() -> None:
        host = Host(load_settings(None, {"TUFT_HOME": str(tmp_path)}, {}), ScriptedEngines())
        await host.start()
        host.ledger.clock = lambda: 1234.5
        async with aclosing(messages(host, host.owner, None, None)) as told:
            while (message := await anext(told))["type"] != "gauges":
                pass
        assert message["time"] == 1234.5
        await host.stop()

    scenario(body)


def test_a_panel_that_comes_back_is_told_that_nothing_waits_any_more(tmp_path: Path) -> None:
    """It shows the queue of an hour ago until it hears of another."""

    async def body() -> None:
        host = Host(load_settings(None, {"TUFT_HOME": str(tmp_path)}, {}), ScriptedEngines())
        await host.start()
        heard: list[str] = []
        async with aclosing(messages(host, host.owner, None, host.ledger.state.n)) as told:
            while "gauges" not in heard:
                message = await anext(told)
                heard.append(message["type"])
                assert message.get("queue", []) == []
        assert "queue" in heard
        await host.stop()

    scenario(body)


def test_a_log_line_that_is_no_utf8_can_be_sent() -> None:
    """A path of a file system without an encoding, for one: the feed of every panel would end with it."""
    tail = LogTail()
    tail.handle(logging.makeLogRecord({"msg": "cannot read %s", "args": ("models/\udcff",)}))
    (line,) = msgspec.json.decode(msgspec.json.encode(tail.since(0)))
    assert line["text"] == "cannot read models/?"


class BrokenFeed(LabFeed):
    """A panel's websocket of which only the end matters here."""

    def __init__(self) -> None:
        self.ended = False

    async def messages(self, since: int | None) -> AsyncGenerator[bytes, None]:
        raise OSError("the processes cannot be listed")
        yield b""

    def close(self, code: int | None = None, reason: str | None = None) -> None:
        self.ended = True


def test_a_panel_that_cannot_be_told_any_more_is_hung_up_on() -> None:
    """It begins anew then; a socket that stays open and silent would show old news as the present."""
    feed = BrokenFeed()
    with pytest.raises(OSError, match="processes"):
        asyncio.run(feed._tell(None))
    assert feed.ended
