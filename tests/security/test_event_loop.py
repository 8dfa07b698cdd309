"""Bodies that cost much to read: the event loop, and with it the notebook, stays free meanwhile."""

from __future__ import annotations

import asyncio
import time
from typing import Self

import pytest
from tornado.httpclient import HTTPResponse

from tests.support.fuzz import wrong_with
from tests.support.fuzz_cases import Case
from tests.support.scene import OnScene, Scene
from tuft_jupyter.core.types import JSON

pytestmark = pytest.mark.timeout(240)


class Turns:
    """``longest``: seconds of computing in the longest turn of the event loop within the block.

    Of computing, not of waiting: it is the same on a busy machine.
    """

    longest = 0.0

    def __enter__(self) -> Self:
        self._loop, self._over = asyncio.get_running_loop(), False
        self._last = time.thread_time()
        self._tick()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True

    def _tick(self) -> None:
        now = time.thread_time()
        self.longest, self._last = max(self.longest, now - self._last), now
        if not self._over:
            self._loop.call_later(0.0005, self._tick)


async def asked(scene: Scene, case: Case, seconds: float) -> tuple[HTTPResponse, float]:
    """An answer, and the longest turn meanwhile: of the first of three tries within ``seconds``, else of the last.

    Into one try may fall a collection of all the garbage of this process; what a body costs it costs each time.
    """
    for _ in range(3):
        with Turns() as turns:
            answer = await scene.target.ask(case)
        if turns.longest < seconds:
            break
    return answer, turns.longest


def small_things(head: bytes, one: bytes, tail: bytes, size: int) -> bytes:
    """As many of the smallest things as fit into a body of that size."""
    return head + b",".join([one] * ((size - len(head) - len(tail)) // (len(one) + 1))) + tail


MIB = 2**20
CROWDED = {
    "telemetry": ("telemetry", small_things(b'{"events":[', b"{}", b"]}", 2 * MIB), (400,)),
    "tags": ("create_session", small_things(b'{"tags":[', b'""', b"]}", MIB), (400,)),
    "chunks of a prompt": (
        "asample",
        small_things(b'{"sampling_session_id":"x","prompt":{"chunks":[', b'{"tokens":[]}', b"]}}", 8 * MIB),
        (400, 404, 429),
    ),
    "datums in JSON": (
        "forward_backward",
        small_things(
            b'{"model_id":"x","forward_backward_input":{"data":[', b'{"model_input":{}}', b"]}}", 4 * MIB
        ),
        (413,),
    ),
    "tokens in JSON": (
        "forward_backward",
        small_things(
            b'{"model_id":"x","forward_backward_input":{"loss_fn":"ppo","data":[{"model_input":{"chunks":[{"tokens":[',
            b"1", b"]}]}}]}}", 4 * MIB - 1,
        ),
        (404,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CROWDED))
def test_a_body_full_of_the_smallest_things_does_not_stop_the_notebook(on_scene: OnScene, name: str) -> None:
    """H4, H5, L2: the largest bodies that routes take, filled with what costs most to read: no turn of 250 ms."""
    verb, raw, codes = CROWDED[name]

    async def body(scene: Scene) -> None:
        case = Case("POST", f"/api/v1/{verb}", raw, {"Content-Type": JSON})
        answer, longest = await asked(scene, case, 0.25)
        assert answer.code in codes, answer.body[:300]
        assert longest < 0.25, longest

    on_scene(body)


NESTED = [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"prompt":{"chunks":' + b"[" * 10**5,
]
ODD = [
    b'{"session_id":"\\ud800"}',
    b'{"session_id":NaN}',
    b'{"session_id":"a","session_id":"b"}',
    b"\xff\xfe{}",
    b"",
]


@pytest.mark.parametrize(
    "verb", ["session_heartbeat", "asample", "telemetry", "../../oai/api/v1/chat/completions"]
)
def test_odd_json_is_refused_and_the_loop_stays_free(on_scene: OnScene, verb: str) -> None:
    """H5: nesting a hundred thousand deep, duplicate keys, lone surrogates, NaN; no turn of the event loop computes for
    50 ms, with the client in it.
    """

    async def body(scene: Scene) -> None:
        for raw in NESTED + ODD:
            path = "/oai/api/v1/chat/completions" if "oai" in verb else f"/api/v1/{verb}"
            case = Case("POST", path, raw, {"Content-Type": JSON})
            answer, longest = await asked(scene, case, 0.05)
            assert longest < 0.05, (raw[:50], longest)
            assert not wrong_with(case, answer), (raw[:50], answer.body)
            assert answer.code >= 400 or verb == "telemetry"

    on_scene(body)
