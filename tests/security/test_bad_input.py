"""Bad input, one case for each kind: refused by name at once, or as a failed promise of category "user"; nothing else
is disturbed, nothing of its size is allocated, and nothing outside is touched."""

from __future__ import annotations

import asyncio
import json
import re
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
import zstandard

from tests.support.fuzz import Bystander, Target, wrong_with
from tests.support.fuzz_cases import Case, World
from tuft_jupyter.core.types import JSON, PROTOBUF
from tuft_jupyter.wire import tuft_wire_pb2 as pb

pytestmark = pytest.mark.timeout(240)

Body = Callable[["Scene"], Awaitable[None]]


class Scene:
    """A server, a tenant's objects on it, and a bystander."""

    def __init__(self, target: Target, world: World, bystander: Bystander) -> None:
        self.target, self.world, self.bystander = target, world, bystander

    async def said(self, verb: str, body: Any, *, media: str = JSON, **headers: str) -> tuple[int, str, str]:
        """(status, category, what a request was told) at submission, or through its promise."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": media, **{k.replace("_", "-"): v for k, v in headers.items()}}
        case = Case("POST", f"/api/v1/{verb}", raw, headers)
        answer = await self.target.ask(case)
        assert not wrong_with(case, answer), answer.body
        told = json.loads(answer.body)
        if "request_id" in told and answer.code == 200:
            outcome = await self.target.settled(told)
            assert not wrong_with(case, outcome), outcome.body
            if outcome.headers["Content-Type"] != JSON:
                return 200, "", "accepted"
            told = json.loads(outcome.body)
        return answer.code, told.get("category", ""), told.get("error", "accepted")


@pytest.fixture(scope="module")
def on_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Body], None]]:
    """Runs a test body on one server for the whole module; the bystander is looked at after each."""
    with asyncio.Runner() as runner:
        target = Target(tmp_path_factory.mktemp("home"))

        async def begin() -> Scene:
            await target.host.start()
            bystander = Bystander(target)
            await bystander.start()
            return Scene(target, await target.world(), bystander)

        scene = runner.run(begin())

        def run(body: Body) -> None:
            async def whole() -> None:
                await body(scene)
                assert await scene.bystander.look() == ""

            runner.run(whole())

        yield run
        target.http.stop()
        runner.run(target.host.stop())


# ---- passes


def request(scene: Scene, loss: str = "cross_entropy", n: int = 3, **inputs: tuple[int, bytes]) -> Any:
    scene.world.seq += 1
    made = pb.ForwardBackwardRequest(model_id=scene.world.ids["run"], seq_id=scene.world.seq, loss_fn=loss)
    good = made.data.add()
    good.model_input.add().encoded_text.tokens = struct.pack("<3i", 4, 5, 6)
    good.loss_fn_inputs["target_tokens"].CopyFrom(tensor(pb.DTYPE_INT64, struct.pack("<3q", 5, 6, 7)))
    bad = made.data.add()
    bad.model_input.add().encoded_text.tokens = struct.pack(f"<{n}i", *[4] * n)
    bad.loss_fn_inputs["target_tokens"].CopyFrom(tensor(pb.DTYPE_INT64, struct.pack(f"<{n}q", *[5] * n)))
    for name, (dtype, data) in inputs.items():
        bad.loss_fn_inputs[name].CopyFrom(tensor(dtype, data))
    return made


def tensor(dtype: int, data: bytes) -> Any:
    width = {pb.DTYPE_INT64: 8, pb.DTYPE_FLOAT32: 4}[dtype]
    return pb.Tensor(dense=data, dtype=dtype, shape=[len(data) // width])


def floats(*numbers: float) -> tuple[int, bytes]:
    return pb.DTYPE_FLOAT32, struct.pack(f"<{len(numbers)}f", *numbers)


def ints(*numbers: int) -> tuple[int, bytes]:
    return pb.DTYPE_INT64, struct.pack(f"<{len(numbers)}q", *numbers)


def with_config(scene: Scene, name: str, number: float) -> Any:
    made = request(scene, "ppo")
    made.loss_fn_config_v2[name].number = number
    return made


def with_image(scene: Scene) -> Any:
    made = request(scene)
    made.data[1].model_input.add().image.data = b"\x89PNG"
    return made


PASSES: list[tuple[str, Callable[[Scene], Any], str]] = [
    ("unknown loss", lambda s: request(s, "hinge"), r"hinge.*not known\. Available: cross_entropy"),
    (
        "private loss",
        lambda s: request(s, "stable_reinforce"),
        "stable_reinforce.*Use loss_fn=.importance_sampling",
    ),
    (
        "unknown key",
        lambda s: with_config(s, "clip_lo", 0.8),
        "no setting .clip_lo.; it takes clip_low_threshold",
    ),
    (
        "key not finite",
        lambda s: with_config(s, "clip_low_threshold", float("nan")),
        "clip_low_threshold.*must be a finite number",
    ),
    (
        "missing inputs",
        lambda s: request(s, "importance_sampling"),
        r"dat(a\[0\]|um 0).*needs logprobs; add one number per token",
    ),
    (
        "lengths",
        lambda s: request(s, weights=floats(1, 1)),
        r"dat(a\[1\]|um 1).*weights has shape \[2\], target_tokens \[3\]; make them equal",
    ),
    (
        "token",
        lambda s: request(s, target_tokens=ints(5, 10**6, 5)),
        r"dat(a\[1\]|um 1).*1000000.*2048.*use the tokenizer of this base model",
    ),
    (
        "not finite",
        lambda s: request(s, weights=floats(1, float("nan"), 1)),
        r"dat(a\[1\]|um 1).*weights.*finite at element 1 .*use 0 to leave it out",
    ),
    ("too long", lambda s: request(s, n=65), r"dat(a\[1\]|um 1).*65 tokens.*at most 64; shorten or split"),
    ("image", with_image, r"dat(a\[1\]|um 1).*read text only, and this is an image"),
]


@pytest.mark.parametrize(("make", "words"), [p[1:] for p in PASSES], ids=[p[0] for p in PASSES])
def test_a_wrong_pass_names_its_datum_and_the_limit(
    on_scene: Callable[[Body], None], make: Callable[[Scene], Any], words: str
) -> None:
    """S1-34: a failed promise of category "user", never "server", and the good datum beside it left no gradient."""

    async def body(scene: Scene) -> None:
        status, category, text = await scene.said(
            "forward_backward", make(scene).SerializeToString(), media=PROTOBUF
        )
        assert category == "user"
        assert status == (400 if "not available on this server" in text else 200)  # what can be known at once
        assert re.search(words, text, re.DOTALL), text

    on_scene(body)


# ---- checkpoints


def test_a_checkpoint_of_another_shape_is_refused_with_what_differs(on_scene: Callable[[Body], None]) -> None:
    async def body(scene: Scene) -> None:
        ids = scene.world.ids
        session = (await scene.target.post("create_session", {}))["session_id"]
        for number, lora, words in [
            (0, {"rank": 8}, "rank is 4, the run has 8"),
            (1, {"rank": 4, "train_mlp": False}, "target|mlp|module"),
        ]:
            made = {
                "session_id": session,
                "model_seq_id": number,
                "base_model": "tuft/demo",
                "lora_config": lora,
            }
            await scene.target.settled(await scene.target.post("create_model", made))
            asked = {"model_id": f"{session}:train:{number}", "seq_id": 1, "path": ids["checkpoint"]}
            _, category, text = await scene.said("load_weights", {**asked, "optimizer": False})
            assert category == "user"
            assert re.search(words, text), text

    on_scene(body)


# ---- sizes and numbers


def sample(scene: Scene, params: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    scene.world.seq += 1
    return {**scene.world.body("asample"), **fields, "sampling_params": {"max_tokens": 1, **(params or {})}}


HUGE: list[tuple[str, Callable[[Scene], Any], str]] = [
    ("asample", lambda s: sample(s, num_samples=10**6), "num_samples"),
    ("asample", lambda s: sample(s, {"top_k": -7}), "top_k"),
    ("asample", lambda s: sample(s, {"stop": ["x"] * 10**5}), "stop"),
    ("asample", lambda s: sample(s, {"stop": ["x" * 10**5]}), "stop"),
    ("asample", lambda s: sample(s, {"temperature": -1}), "temperature"),
    ("asample", lambda s: sample(s, {"seed": 2**64}), "seed"),
    ("asample", lambda s: sample(s, topk_prompt_logprobs=10**9), "topk_prompt_logprobs"),
    ("asample", lambda s: sample(s, topk_sample_logprobs=10**9), "topk_sample_logprobs"),
    ("asample", lambda s: sample(s, prompt={"chunks": [{"tokens": [2**40]}]}), "int32"),
    ("asample", lambda s: sample(s, prompt={"chunks": [{"tokens": [9999]}]}), "9999.*vocabulary"),
    ("create_model", lambda s: {**s.world.body("create_model"), "lora_config": {"rank": 10**6}}, "rank"),
    ("optim_step", lambda s: {**s.world.body("optim_step"), "adam_params": {"learning_rate": 1e999}}, "not JSON"),
    ("save_weights", lambda s: {**s.world.body("save_weights"), "ttl_seconds": 1e300}, "ttl_seconds"),
    ("save_weights", lambda s: {**s.world.body("save_weights"), "path": "a/b"}, "checkpoint name"),
    ("load_weights", lambda s: {**s.world.body("load_weights"), "path": "weights/n"}, "tinker://"),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "make", "words"), HUGE, ids=[f"{h[0]}-{i}" for i, h in enumerate(HUGE)])
def test_numbers_without_bound_are_refused_by_name_and_cost_nothing(
    on_scene: Callable[[Body], None], verb: str, make: Callable[[Scene], Any], words: str
) -> None:
    """H4."""

    async def body(scene: Scene) -> None:
        before = psutil.Process().memory_info().rss
        began = time.perf_counter()
        _, category, text = await scene.said(verb, make(scene))
        assert time.perf_counter() - began < 2.0
        assert category == "user"
        assert re.search(words, text), text
        assert psutil.Process().memory_info().rss - before < 64 * 2**20

    on_scene(body)


def test_a_bomb_is_refused_before_it_is_unpacked(on_scene: Callable[[Body], None]) -> None:
    """H3: 32 KB that stand for a gigabyte."""
    compressor = zstandard.ZstdCompressor(level=19).compressobj()
    bomb = b"".join(compressor.compress(bytes(2**20)) for _ in range(2**10)) + compressor.flush()
    assert len(bomb) < 128 * 2**10

    async def body(scene: Scene) -> None:
        await scene.said("forward_backward", bomb, media=PROTOBUF, Content_Encoding="zstd")
        before, began = psutil.Process().memory_info().rss, time.perf_counter()
        status, _, text = await scene.said("forward_backward", bomb, media=PROTOBUF, Content_Encoding="zstd")
        assert time.perf_counter() - began < 1.0
        assert status == 413
        assert "limit" in text
        assert psutil.Process().memory_info().rss - before < 80 * 2**20

    on_scene(body)


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


def small_things(head: bytes, one: bytes, tail: bytes, size: int) -> bytes:
    """As many of the smallest things as fit into a body of that size."""
    return head + b",".join([one] * ((size - len(head) - len(tail)) // (len(one) + 1))) + tail


MIB = 2**20
CROWDED = {
    "telemetry": ("telemetry", small_things(b'{"events":[', b"{}", b"]}", 2 * MIB), (400,)),
    "metadata": ("create_session", small_things(b'{"tags":[', b'""', b"]}", MIB), (200,)),
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
def test_a_body_full_of_the_smallest_things_does_not_stop_the_notebook(
    on_scene: Callable[[Body], None], name: str
) -> None:
    """H4, H5, L2: the largest bodies that routes take, filled with what costs most to read: no turn of 250 ms."""
    verb, raw, codes = CROWDED[name]

    async def body(scene: Scene) -> None:
        case = Case("POST", f"/api/v1/{verb}", raw, {"Content-Type": JSON})
        with Turns() as turns:
            answer = await scene.target.ask(case)
        assert answer.code in codes, answer.body[:300]
        assert turns.longest < 0.25, turns.longest

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
def test_odd_json_is_refused_and_the_loop_stays_free(on_scene: Callable[[Body], None], verb: str) -> None:
    """H5: nesting a hundred thousand deep, duplicate keys, lone surrogates, NaN; no turn of the event loop computes for
    50 ms, with the client in it.
    """

    async def body(scene: Scene) -> None:
        for raw in NESTED + ODD:
            path = "/oai/api/v1/chat/completions" if "oai" in verb else f"/api/v1/{verb}"
            case = Case("POST", path, raw, {"Content-Type": JSON})
            with Turns() as turns:
                answer = await scene.target.ask(case)
            assert turns.longest < 0.05, (raw[:50], turns.longest)
            assert not wrong_with(case, answer), (raw[:50], answer.body)
            assert answer.code >= 400 or verb == "telemetry"

    on_scene(body)


# ---- nothing outside

NAMES = [
    "../x", "..", "%2e%2e", "..%2f..%2fetc", "\x00", "a" * 4096, "/etc/passwd", "ａ／ｂ", "..\\x", "tinker://../..",
    "~", "$HOME", "CON", "-rf", "x\ny", "\u202e", "http://169.254.169.254/latest/meta-data", "file:///etc/passwd",
]  # fmt: skip


class Watch:
    """What this process opens and connects to, while it is on (audit hooks cannot be taken away)."""

    on = False
    opened: list[str] = []
    connected: list[Any] = []

    @classmethod
    def hook(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if not cls.on:
            return
        if event == "open" and isinstance(arguments[0], str | bytes):
            cls.opened.append(str(arguments[0]))
        elif event in ("socket.connect", "socket.getaddrinfo"):
            cls.connected.append(arguments[1] if event == "socket.connect" else arguments[0])


def test_names_and_addresses_of_clients_open_no_file_and_no_connection(
    on_scene: Callable[[Body], None],
) -> None:
    """H6, H8: a thousand hostile names in every place where one is read; files only below our own directories."""
    sys.addaudithook(Watch.hook)
    ours = (str(Path(__file__).parents[2]), sys.prefix, sys.base_prefix, "/proc", "/dev")

    async def body(scene: Scene) -> None:
        Watch.on = True
        asked = 0
        try:
            while asked < 1000:
                for name in NAMES:
                    asked += await _named(scene, name)
        finally:
            Watch.on = False
        home = str(scene.target.host.settings.home)
        outside = {path for path in Watch.opened if not path.startswith((home, *ours))}
        assert not outside
        elsewhere = {str(a) for a in Watch.connected} - {str(("127.0.0.1", scene.target.port)), "127.0.0.1"}
        assert not elsewhere

    on_scene(body)


async def _named(scene: Scene, name: str) -> int:
    """Send a name wherever a request can hold one; returns how many requests that were."""
    ids = scene.world.ids
    scene.world.seq += 1
    run = {"model_id": ids["run"], "seq_id": scene.world.seq}
    image = {"type": "image_asset_pointer", "location": name, "format": "png"}
    bodies: list[tuple[str, Any]] = [
        ("save_weights", {**run, "path": name}),
        ("load_weights", {**run, "path": name}),
        ("load_weights", {**run, "path": f"tinker://{ids['run']}/weights/{name}"}),
        ("weights_info", {"tinker_path": name}),
        ("copy_weights", {"source_path": name}),
        ("tuft/models", {"model": name}),
        ("create_sampling_session", {"session_id": ids["session"], "sampling_session_seq_id": scene.world.seq,
                                     "base_model": name}),
        ("create_model", {"session_id": ids["session"], "model_seq_id": scene.world.seq, "base_model": name,
                          "lora_config": {"rank": 4}}),
        ("asample", sample(scene, prompt={"chunks": [image]})),
        ("../../oai/api/v1/completions", {"model": name, "prompt": "a"}),
    ]  # fmt: skip
    for verb, body in bodies:
        path = "/oai/api/v1/completions" if "oai" in verb else f"/api/v1/{verb}"
        case = Case("POST", path, json.dumps(body).encode(), {"Content-Type": JSON})
        answer = await scene.target.ask(case)
        assert not wrong_with(case, answer), (verb, name, answer.body)
        assert answer.code >= 400 or verb in ("save_weights", "asample"), (verb, name)
    return len(bodies)
