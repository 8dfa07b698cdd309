"""Bad input, one case for each kind: refused by name at once, or as a failed promise of category "user"; nothing else
is disturbed, and nothing of its size is allocated."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import zstandard

from tests.support.scene import OnScene, Scene, quickest
from tuft_jupyter.core.types import PROTOBUF
from tuft_jupyter.wire import tuft_wire_pb2 as pb

pytestmark = pytest.mark.timeout(240)


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
    on_scene: OnScene, make: Callable[[Scene], Any], words: str
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


def test_a_checkpoint_of_another_shape_is_refused_with_what_differs(on_scene: OnScene) -> None:
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


HUGE: list[tuple[str, Callable[[Scene], Any], str]] = [
    ("asample", lambda s: s.sample(num_samples=10**6), "num_samples"),
    ("asample", lambda s: s.sample({"top_k": -7}), "top_k"),
    ("asample", lambda s: s.sample({"stop": ["x"] * 10**5}), "stop"),
    ("asample", lambda s: s.sample({"stop": ["x" * 10**5]}), "stop"),
    ("asample", lambda s: s.sample({"temperature": -1}), "temperature"),
    ("asample", lambda s: s.sample({"seed": 2**64}), "seed"),
    ("asample", lambda s: s.sample(topk_prompt_logprobs=10**9), "topk_prompt_logprobs"),
    ("asample", lambda s: s.sample(topk_sample_logprobs=10**9), "topk_sample_logprobs"),
    ("asample", lambda s: s.sample(prompt={"chunks": [{"tokens": [2**40]}]}), "int32"),
    ("asample", lambda s: s.sample(prompt={"chunks": [{"tokens": [9999]}]}), "9999.*vocabulary"),
    ("create_model", lambda s: {**s.world.body("create_model"), "lora_config": {"rank": 10**6}}, "rank"),
    ("optim_step", lambda s: {**s.world.body("optim_step"), "adam_params": {"learning_rate": 1e999}}, "not JSON"),
    ("save_weights", lambda s: {**s.world.body("save_weights"), "ttl_seconds": 1e300}, "ttl_seconds"),
    ("save_weights", lambda s: {**s.world.body("save_weights"), "path": "a/b"}, "checkpoint name"),
    ("load_weights", lambda s: {**s.world.body("load_weights"), "path": "weights/n"}, "tinker://"),
    ("optim_step", lambda s: {**s.world.body("optim_step"), "seq_id": -1}, ">= 0 - at `seq_id`"),
    ("save_weights", lambda s: {**s.world.body("save_weights"), "seq_id": 10**3000}, "`seq_id`"),
    ("load_weights", lambda s: {**s.world.body("load_weights"), "seq_id": -(10**9)}, "`seq_id`"),
    ("create_model", lambda s: {**s.world.body("create_model"), "model_seq_id": 10**3000}, "`model_seq_id`"),
    ("create_sampling_session", lambda s: {"session_id": "s", "sampling_session_seq_id": -1}, "seq_id"),
    ("asample", lambda s: s.sample(seq_id=2**63), "seq_id|range"),
    ("create_session", lambda _: {"display_name": "x" * 10**6}, "length <= 1000 - at `display_name`"),
    ("create_session", lambda _: {"project_id": "x" * 10**6}, "length <= 1000 - at `project_id`"),
    ("create_session", lambda _: {"sdk_version": "x" * 10**6}, "length <= 1000 - at `sdk_version`"),
    ("create_session", lambda _: {"tags": ["x"] * 10**5}, "length <= 100 - at `tags`"),
    ("create_session", lambda _: {"user_metadata": {"x": "x" * 10**6}}, "user_metadata.*16384"),
    ("create_model", lambda s: {**s.world.body("create_model"), "user_metadata": {"x" * 10**6: ""}}, "user_metadata"),
    ("save_weights", lambda s: {**s.world.body("save_weights"), "user_metadata": {"x": "x" * 10**6}}, "user_metadata"),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "make", "words"), HUGE, ids=[f"{h[0]}-{i}" for i, h in enumerate(HUGE)])
def test_numbers_without_bound_are_refused_by_name_and_cost_nothing(
    on_scene: OnScene, verb: str, make: Callable[[Scene], Any], words: str
) -> None:
    """H4."""

    async def body(scene: Scene) -> None:
        before = psutil.Process().memory_info().rss
        (_, category, text), took = await quickest(lambda: scene.said(verb, make(scene)), 2.0)
        assert took < 2.0
        assert category == "user"
        assert re.search(words, text), text
        assert psutil.Process().memory_info().rss - before < 64 * 2**20

    on_scene(body)


def test_a_bomb_is_refused_before_it_is_unpacked(on_scene: OnScene) -> None:
    """H3: 32 KB that stand for a gigabyte."""
    compressor = zstandard.ZstdCompressor(level=19).compressobj()
    bomb = b"".join(compressor.compress(bytes(2**20)) for _ in range(2**10)) + compressor.flush()
    assert len(bomb) < 128 * 2**10

    async def body(scene: Scene) -> None:
        async def thrown() -> tuple[int, str, str]:
            return await scene.said("forward_backward", bomb, media=PROTOBUF, Content_Encoding="zstd")

        await thrown()
        before = psutil.Process().memory_info().rss
        (status, _, text), took = await quickest(thrown, 1.0)
        assert took < 1.0
        assert status == 413
        assert "limit" in text
        assert psutil.Process().memory_info().rss - before < 80 * 2**20

    on_scene(body)
