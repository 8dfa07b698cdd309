"""Hostile passes: protobuf with something wrong in a field or in its bytes, and zstd around it that may not be."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import zstandard

from tests.support.fuzz_cases import Case, World, mutated
from tuft_jupyter.core.types import PROTOBUF
from tuft_jupyter.wire import tuft_wire_pb2 as pb

LOSSES = (
    "cross_entropy",
    "importance_sampling",
    "ppo",
    "cispo",
    "dro",
    "gspo",
    "stable_reinforce",
    "custom",
    "",
    "x" * 999,
)


def protobuf_case(rng: random.Random, world: World) -> Case:
    """A pass with something wrong in a field, in its bytes, or in the compression around them."""
    world.seq += 1
    request = pb.ForwardBackwardRequest(
        model_id=world.ids["run"],
        seq_id=world.seq,
        loss_fn=rng.choice(LOSSES[:6]),
        forward_only=rng.random() < 0.3,
    )
    for _ in range(rng.choice((1, 1, 2, 3))):
        _datum(rng, request.data.add())
    kind = rng.choice(("field", "field", "field", "bytes", "bytes", "both", "none"))
    if kind in ("field", "both"):
        for _ in range(rng.choice((1, 1, 3))):
            _spoil(rng, request)
    body = request.SerializeToString()
    if kind in ("bytes", "both"):
        body = mutated(rng, body)
    headers = {"Content-Type": PROTOBUF, "Accept": PROTOBUF}
    squeeze = rng.randrange(8)
    if squeeze < 3:
        headers["Content-Encoding"] = "zstd"
        body = zstandard.compress(body)
        if squeeze == 1:
            body = mutated(rng, body)
        elif squeeze == 2 and rng.random() < 0.2:
            body = zstandard.compress(bytes(rng.choice((2**22, 2**26))))
    return Case("POST", "/api/v1/forward_backward", body, headers, "forward_backward")


def _datum(rng: random.Random, datum: pb.Datum) -> None:
    n = rng.choice((1, 3, 8))
    tokens = [rng.randrange(2000) for _ in range(n)]
    datum.model_input.add().encoded_text.tokens = struct.pack(f"<{n}i", *tokens)
    target = datum.loss_fn_inputs["target_tokens"]
    target.dense, target.dtype = struct.pack(f"<{n}q", *tokens), pb.DTYPE_INT64
    target.shape[:] = [n]
    for name in ("logprobs", "advantages", "sequence_ratio_mask"):
        tensor = datum.loss_fn_inputs[name]
        tensor.dense, tensor.dtype = struct.pack(f"<{n}f", *[-0.5] * n), pb.DTYPE_FLOAT32
        tensor.shape[:] = [n]


def _spoil(rng: random.Random, request: pb.ForwardBackwardRequest) -> None:
    datum = rng.choice(request.data)
    tensor = datum.loss_fn_inputs[rng.choice(list(datum.loss_fn_inputs) or ["weights"])]
    rng.choice(_SPOILS)(rng, request, datum, tensor)


def _config(rng: random.Random, request: pb.ForwardBackwardRequest, *_: Any) -> None:
    name = rng.choice(("beta", "clip_low_threshold", "x", ""))
    request.loss_fn_config_v2[name].number = rng.choice((float("nan"), float("inf"), -1.0, 1e300))


def _text_config(rng: random.Random, request: pb.ForwardBackwardRequest, *_: Any) -> None:
    request.loss_fn_config_v2["loss_id"].text = "x"


def _loss(rng: random.Random, request: pb.ForwardBackwardRequest, *_: Any) -> None:
    request.loss_fn = rng.choice(LOSSES)


def _seq(rng: random.Random, request: pb.ForwardBackwardRequest, *_: Any) -> None:
    request.seq_id = rng.choice((0, -1, 2**31 - 1, -(2**31)))


def _run(rng: random.Random, request: pb.ForwardBackwardRequest, *_: Any) -> None:
    request.model_id = rng.choice(("", "x", "\x00", "a" * 9999, "../..", "💥"))


def _no_data(rng: random.Random, request: pb.ForwardBackwardRequest, *_: Any) -> None:
    del request.data[:]
    request.data.add()


def _shape(rng: random.Random, request: Any, datum: pb.Datum, tensor: pb.Tensor) -> None:
    shapes = ([], [0], [-1], [2**62], [2**31, 2**31], [1] * 40, [3, -3], [2**62, 4])
    tensor.shape[:] = rng.choice(shapes)


def _dtype(rng: random.Random, request: Any, datum: pb.Datum, tensor: pb.Tensor) -> None:
    tensor.dtype = rng.choice((0, 1, 2, 3, 4, 77))


def _values(rng: random.Random, request: Any, datum: pb.Datum, tensor: pb.Tensor) -> None:
    nan = struct.pack("<f", float("nan"))
    tensor.dense = rng.choice((b"", b"\x00", struct.pack("<q", 2**40) * 3, b"\xff" * 64, nan * 3, nan * 8))


def _sparse(rng: random.Random, request: Any, datum: pb.Datum, tensor: pb.Tensor) -> None:
    csr = tensor.sparse_csr
    csr.values, csr.crow_indices = b"\x00" * 16, struct.pack("<3q", 0, rng.choice((1, -5, 2**60)), 2)
    csr.col_indices = struct.pack("<2q", rng.choice((0, -1, 2**60)), 1)
    tensor.shape[:] = rng.choice(([2, 2], [2, 2**40], [10**6, 10**6], [2]))


def _new_input(rng: random.Random, request: Any, datum: pb.Datum, tensor: pb.Tensor) -> None:
    datum.loss_fn_inputs[rng.choice(("", "weights", "mask", "target_tokens", "a" * 5000))].dtype = 1


def _lost_input(rng: random.Random, request: Any, datum: pb.Datum, tensor: pb.Tensor) -> None:
    datum.loss_fn_inputs.pop(rng.choice(list(datum.loss_fn_inputs)), None)


def _image(rng: random.Random, request: Any, datum: pb.Datum, tensor: pb.Tensor) -> None:
    image = datum.model_input.add().image
    image.data, image.format = b"\x89PNG", rng.choice(("png", "x"))


def _tokens(rng: random.Random, request: Any, datum: pb.Datum, tensor: pb.Tensor) -> None:
    ids = rng.choice(([], [-1], [2**31 - 1], [1] * 5000))
    datum.model_input.add().encoded_text.tokens = struct.pack(f"<{len(ids)}i", *ids) or b"\x01"


_SPOILS: tuple[Callable[..., None], ...] = (
    _config, _text_config, _loss, _seq, _run, _no_data, _shape, _dtype, _values, _sparse, _new_input, _lost_input,
    _image, _tokens,
)  # fmt: skip
