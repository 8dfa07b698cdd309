"""The sub-commands of %tuft against a server that tells of two runs and a checkpoint."""

from __future__ import annotations

import io
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

from tests.support.stub_server import KEY, StubServer
from tuft_jupyter.kernel.commands.serving import OPEN, PANEL_COMMAND
from tuft_jupyter.kernel.commands.table import COMMANDS
from tuft_jupyter.kernel.report import Grid, Progress, ago, meanwhile, number, size

ROOT = Path(__file__).parents[3]
ONE, TWO = "6f1c2a52-0000-4000-8000-000000000001:train:0", "9a1c2a52-0000-4000-8000-000000000002:train:1"


def run_of(name: str, **more: Any) -> dict[str, Any]:
    return {
        "id": name,
        "base_model": "tuft/demo",
        "rank": 8,
        "status": "ready",
        "step": 12,
        "loss": 1.23456,
        "tokens_per_second": 2048.0,
        "pending": 0,
        "why": "nothing is asked of it: the next request comes from your program",
        "created": time.time() - 60,
        "last_request": time.time() - 30,
        **more,
    }


@pytest.fixture
def told(server: StubServer, monkeypatch: pytest.MonkeyPatch) -> StubServer:
    """A server with two runs, the second at work and busy last, and a checkpoint of the first."""
    busy = {
        "pending": 2,
        "last_request": time.time() - 1,
        "why": "tuft/demo is being loaded: reading weights",
    }
    saved = {
        "path": f"tinker://{ONE}/weights/a",
        "run": ONE,
        "kind": "weights",
        "step": 10,
        "size_bytes": 123456,
    }
    saved |= {"created": time.time() - 7200, "expires": None}
    shown = {"version": "v", "runs": [run_of(ONE), run_of(TWO, **busy)], "checkpoints": [saved]}
    server.routes["GET /tuft/outlook"] = lambda _: (200, shown)
    monkeypatch.setenv("TUFT_ADDRESS", server.address)
    monkeypatch.setenv("TUFT_API_KEY", KEY)
    return server


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    made = InteractiveShell()
    made.run_line_magic("load_ext", "tuft_jupyter")
    yield made
    InteractiveShell.clear_instance()


def cell(shell: InteractiveShell, code: str) -> tuple[Any, str]:
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        result = shell.run_cell(code)
    return result, out.getvalue() + repr(result.result)


def test_runs_are_listed_the_busy_one_first(shell: InteractiveShell, told: StubServer) -> None:
    _, shown = cell(shell, "%tuft runs")
    assert shown.index("9a1c2a52:1") < shown.index("6f1c2a52:0")
    for part in ("2 runs", "ready, 2 waiting", "1.235", "30 s ago"):
        assert part in shown


def test_attach_says_how_to_go_on(shell: InteractiveShell, told: StubServer) -> None:
    _, shown = cell(shell, "%tuft attach")
    assert "2 of 2 runs can go on; 1 at work" in shown
    assert "training = %tuft resume 9a1c2a52:1" in shown


def test_why_is_one_sentence_of_what_is_waited_for(shell: InteractiveShell, told: StubServer) -> None:
    assert "%tuft init connects" in cell(shell, "%tuft why")[1]
    cell(shell, "%tuft init")
    _, shown = cell(shell, "%tuft why")
    assert "reading weights" in shown
    assert "nothing is asked" not in shown
    assert "nothing is asked of it" in cell(shell, "%tuft why 6f1c")[1]
    told.states["tuft/demo"] = {"state": "failed", "detail": "no such directory"}
    assert "model tuft/demo  cannot be loaded: no such directory" in cell(shell, "%tuft why")[1]


def test_a_run_that_could_be_either_is_asked_back(shell: InteractiveShell, told: StubServer) -> None:
    told.routes["GET /tuft/outlook"] = lambda _: (
        200,
        {"runs": [run_of("abc-1:train:0"), run_of("abc-2:train:0")]},
    )
    _, shown = cell(shell, "%tuft why abc")
    assert "%tuft init connects" in shown
    cell(shell, "%tuft init")
    result, shown = cell(shell, "%tuft why abc")
    assert not result.success
    assert "'abc' could be any of" in shown


def test_an_sdk_that_cannot_go_on_with_a_run_leaves_it_where_it_is(
    shell: InteractiveShell, told: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S1-08: SDKs before 0.38 make no client of an existing model."""
    monkeypatch.delattr("tinker.lib.public_interfaces.training_client.fetch_training_info")
    result, shown = cell(shell, "%tuft resume 6f1c2a52:0")
    assert not result.success
    assert 'cannot go on with a live run: %pip install "tinker>=0.38,<0.39"' in shown
    assert "Traceback" not in shown
    assert not [route for route, _ in told.asked if route.endswith("/resume")]


def test_what_the_sdk_is_refused_is_said_in_a_sentence(shell: InteractiveShell, told: StubServer) -> None:
    told.routes["POST /client/config"] = lambda _: (400, {"detail": "this server takes no more sessions"})
    result, shown = cell(shell, "%tuft resume 6f1c2a52:0")
    assert not result.success
    assert "cannot go on with it: this server takes no more sessions." in shown
    assert "Traceback" not in shown


def test_checkpoints_are_listed_with_size_and_age(shell: InteractiveShell, told: StubServer) -> None:
    _, shown = cell(shell, "%tuft checkpoints")
    for part in (f"tinker://{ONE}/weights/a", "training", "123 kB", "2 h ago", "for good"):
        assert part in shown
    assert "0 checkpoints" in cell(shell, "%tuft checkpoints 9a1c2a52:1")[1]


def test_an_archive_that_cannot_be_written_is_said_in_a_sentence(
    shell: InteractiveShell, told: StubServer, tmp_path: Path
) -> None:
    place = f"/training_runs/{ONE.replace(':', '%3A')}/checkpoints/weights/a/archive"
    told.routes[f"GET {place}"] = lambda _: (200, {"url": f"{told.address}/file"})
    result, shown = cell(shell, f"%tuft checkpoints --download a --to {tmp_path / 'none'}")
    assert not result.success
    assert "cannot be written (No such file or directory); say where the archive goes: --to DIR" in shown
    assert "Traceback" not in shown


def test_an_older_server_is_told_apart_from_a_refusal(shell: InteractiveShell, told: StubServer) -> None:
    del told.routes["GET /tuft/outlook"]
    result, shown = cell(shell, "%tuft runs")
    assert not result.success
    assert "upgrade tuft-jupyter in its environment" in shown


def test_tab_completes_runs_and_checkpoints_of_the_server(shell: InteractiveShell, told: StubServer) -> None:
    assert shell.complete("9", "%tuft resume 9", 14)[1] == []
    cell(shell, "%tuft init")
    assert "9a1c2a52:1" in shell.complete("9", "%tuft resume 9", 14)[1]
    assert f"tinker://{ONE}/weights/a" in shell.complete("t", "%tuft checkpoints t", 19)[1]


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_every_command_helps(name: str, shell: InteractiveShell) -> None:
    result, shown = cell(shell, f"%tuft {name} --help")
    assert result.success
    assert f"usage: %tuft {name}" in shown
    assert "%%tuft" not in shown


def test_open_is_a_button_in_the_lab_and_words_elsewhere(shell: InteractiveShell) -> None:
    _, shown = cell(shell, "%tuft open")
    assert "left sidebar" in shown
    assert f'data-commandlinker-command="{PANEL_COMMAND}"' in OPEN.run(Namespace())._repr_html_()
    assert f"'{PANEL_COMMAND}'" in (ROOT / "labextension" / "src" / "commandids.ts").read_text()


def test_a_grid_escapes_and_aligns() -> None:
    grid = Grid("<t>", ("name", "n"), [("<a>", 1), ("b", 22)], "<foot>")
    assert repr(grid).splitlines() == ["<t>", "  name  n", "  <a>    1", "  b     22", "  <foot>"]
    assert "<a>" not in grid._repr_html_()
    assert "&lt;foot&gt;" in grid._repr_html_()
    assert repr(Grid("none", ("a",), [])) == "none"
    runs = Grid(
        "", ("run", "step"), [("72c3e47d:0", 9), ("a1:12", 10), ("9:1", "1e-05"), ("5e4:0", "2 min ago")]
    )
    assert [line[2:12] for line in repr(runs).splitlines()[2:]] == [
        "72c3e47d:0",
        "a1:12     ",
        "9:1       ",
        "5e4:0     ",
    ]
    assert [line[14:] for line in repr(runs).splitlines()[2:]] == [
        "        9",
        "       10",
        "    1e-05",
        "2 min ago",
    ]


def test_numbers_and_times_read_well() -> None:
    assert [ago(s) for s in (3.2, 90, 7200, 200000)] == ["3 s", "2 min", "2 h", "2 d"]
    assert [size(n) for n in (12, 3400, 56e6, 7.8e9)] == ["12 B", "3.4 kB", "56 MB", "7.8 GB"]
    assert [number(x) for x in (None, 1.23456, 2048.0)] == ["", "1.235", "2048"]


def test_what_is_waited_for_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """S0-49: start, model load and archive show a moving bar while they last, and none after."""
    shown: list[Any] = []
    monkeypatch.setattr("tuft_jupyter.kernel.report.in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda table, display_id: shown.append(table))
    progress = Progress()
    progress("model", "tuft/demo: reading weights ...")
    progress("model", "tuft/demo is loaded after 1.0 s")
    assert ["<progress" in table._repr_html_() for table in shown] == [True, False]


def test_the_clock_goes_on_while_something_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """S0-49: the same words again, a second later, are drawn with the seconds that have passed."""
    shown: list[str] = []
    clock = [100.0]

    class Handle:
        def update(self, table: Any) -> None:
            shown.append(table.title)

    monkeypatch.setattr("tuft_jupyter.kernel.report.in_notebook", lambda: True)
    monkeypatch.setattr("tuft_jupyter.kernel.report.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("IPython.display.display", lambda table, display_id: Handle())
    progress = Progress()
    for _ in range(10):
        progress("model", "loading tuft/demo: starting Ray ...")
        clock[0] += 0.4
    assert shown == ["TuFT · 1.2 s", "TuFT · 2.4 s", "TuFT · 3.6 s"]


def test_a_long_wait_is_told_and_a_short_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """S0-49: what is waited for is said after a moment, and that it is over."""
    monkeypatch.setattr("tuft_jupyter.kernel.report.CLOCK_SECONDS", 0.01)
    told: list[tuple[str, str]] = []
    heard = threading.Event()

    def report(phase: str, text: str) -> None:
        told.append((phase, text))
        heard.set()

    with meanwhile(report, "answer", lambda: "loading tuft/demo for sampling"):
        assert heard.wait(10)
    assert told[0] == ("answer", "loading tuft/demo for sampling ...")
    assert told[-1][1].startswith("after ")
    told.clear()
    monkeypatch.setattr("tuft_jupyter.kernel.report.CLOCK_SECONDS", 60.0)
    with meanwhile(report, "answer", lambda: "nothing"):
        pass
    assert told == []
