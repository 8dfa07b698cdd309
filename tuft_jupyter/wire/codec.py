"""Tinker bodies to core values and back: what a training or sampling worker reads and answers.

Three of its functions have rooms of their own and are offered here too: :func:`peek_forward_backward` (the
only one meant for the notebook's event loop), :func:`decode_sample_request` and
:func:`encode_sample_response`.

It knows shapes and dtypes, and that the number of bytes has to agree with them. It does not know losses,
vocabularies or context lengths: the trainer checks those. It promises that a request that cannot be decoded
ends in :class:`UserError` naming the datum and the field, and that what is allocated is bounded by the size
of the body.

Sources: tuft_wire.proto for the bytes (SDK 0.25 and later); JSON is the dialect of the SDKs before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import msgspec
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from tuft_jupyter.core.errors import ServerError, UserError
from tuft_jupyter.core.types import (
    PROTOBUF,
    Datum,
    FloatArray,
    ForwardBackward,
    ForwardBackwardResult,
    Int32Array,
)
from tuft_jupyter.wire import tuft_wire_pb2 as pb
from tuft_jupyter.wire.peek import Peek, base_type, peek_forward_backward
from tuft_jupyter.wire.sample_codec import (
    decode_sample_request,
    encode_sample_response,
    sample_response_as_json,
)
from tuft_jupyter.wire.tensors import Room, check_shape, densify, reshape, tensor_array

__all__ = [
    "Peek",
    "decode_forward_backward",
    "decode_sample_request",
    "encode_forward_backward_output",
    "encode_forward_backward_output_json",
    "encode_sample_response",
    "peek_forward_backward",
    "sample_response_as_json",
]

OUTPUT_TYPE = "ArrayRecord"


def decode_forward_backward(body: bytes, content_type: str = PROTOBUF) -> ForwardBackward:
    """Decode a forward or forward_backward request.

    Tokens are int32 [N]; every loss input is float32 or int64, [N] or [N, K], as sent. Arrays own their
    memory. UserError names ``data[i]`` and the field that is wrong.
    """
    peek = peek_forward_backward(body, content_type)  # bounds the number of things that decoding will create
    if base_type(content_type) != PROTOBUF:
        return _decode_json(body, backward=not peek.forward_only)
    try:
        request = pb.ForwardBackwardRequest.FromString(body)
    except DecodeError:
        raise UserError(
            "the request is not a valid protobuf message of type ForwardBackwardRequest: send it as the SDK encodes it"
        ) from None
    room = Room()
    return ForwardBackward(
        data=[_datum(datum, f"data[{index}]", room) for index, datum in enumerate(request.data)],
        loss_fn=request.loss_fn,
        loss_config=_loss_config(request),
        backward=not request.forward_only,
    )


def _datum(datum: pb.Datum, where: str, room: Room) -> Datum:
    chunks = [_tokens(chunk, f"{where}.model_input.chunks[{i}]") for i, chunk in enumerate(datum.model_input)]
    inputs = {
        name: tensor_array(tensor, f"{where}.loss_fn_inputs[{name!r}]", room)
        for name, tensor in datum.loss_fn_inputs.items()
    }
    return Datum(tokens=_joined(chunks), inputs=inputs)


def _tokens(chunk: pb.Chunk, where: str) -> Int32Array:
    kind = chunk.WhichOneof("chunk")
    if kind != "encoded_text":
        raise _not_text(where, kind or "empty")
    data = chunk.encoded_text.tokens
    if len(data) % 4:
        raise UserError(f"{where}.tokens: {len(data)} bytes are not a whole number of int32 tokens")
    return np.frombuffer(data, "<i4").astype(np.int32)


def _joined(chunks: Sequence[Int32Array]) -> Int32Array:
    if len(chunks) == 1:
        return chunks[0]
    return np.concatenate(chunks) if chunks else np.empty(0, np.int32)


def _not_text(where: str, kind: str) -> UserError:
    return UserError(f"{where}: this server's models read text only, and this is an {kind} chunk")


def _loss_config(request: pb.ForwardBackwardRequest) -> dict[str, float | str]:
    """The numbers of the older field, overridden by what the newer one says (the SDK writes numbers to
    both)."""
    config: dict[str, float | str] = dict(request.loss_fn_config)
    for name, value in request.loss_fn_config_v2.items():
        kind = value.WhichOneof("value")
        if kind is None:
            raise UserError(f"loss_fn_config[{name!r}] has no value; give it a number or a text")
        config[name] = value.text if kind == "text" else value.number
    return config


# ---- JSON, SDKs before 0.25


class _Chunk(msgspec.Struct):
    type: str = "encoded_text"
    tokens: list[int] | None = None


class _ModelInput(msgspec.Struct):
    chunks: list[_Chunk] = []


class _Tensor(msgspec.Struct):
    data: list[int | float]  # int64 must not pass through a double
    dtype: str
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class _Datum(msgspec.Struct):
    model_input: _ModelInput
    loss_fn_inputs: dict[str, _Tensor] = {}


class _Input(msgspec.Struct):
    data: list[_Datum]
    loss_fn: str
    loss_fn_config: dict[str, float | str] | None = None


class _Request(msgspec.Struct):
    forward_backward_input: _Input | None = None
    forward_input: _Input | None = None


_request_decoder = msgspec.json.Decoder(_Request)


def _decode_json(body: bytes, *, backward: bool) -> ForwardBackward:
    try:
        request = _request_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"the request is not a valid forward_backward in JSON: {error}") from None
    work = request.forward_backward_input or request.forward_input
    assert work is not None  # the peek refuses a request without data
    room = Room()
    data = []
    for index, datum in enumerate(work.data):
        where = f"data[{index}]"
        chunks = [
            _json_tokens(chunk, f"{where}.model_input.chunks[{i}]")
            for i, chunk in enumerate(datum.model_input.chunks)
        ]
        inputs = {
            name: _json_tensor(raw, f"{where}.loss_fn_inputs[{name!r}]", room)
            for name, raw in datum.loss_fn_inputs.items()
        }
        data.append(Datum(tokens=_joined(chunks), inputs=inputs))
    return ForwardBackward(data, work.loss_fn, work.loss_fn_config or {}, backward)


def _json_tokens(chunk: _Chunk, where: str) -> Int32Array:
    if chunk.tokens is None:
        raise _not_text(where, chunk.type)
    return _integers(chunk.tokens, np.int32, f"{where}.tokens")


def _json_tensor(tensor: _Tensor, where: str, room: Room) -> NDArray[Any]:
    values: NDArray[Any]
    if tensor.dtype == "int64":
        values = _integers(tensor.data, np.int64, where)
    elif tensor.dtype == "float32":
        values = _floats(tensor.data, where)
    else:
        raise UserError(f"{where}: dtype {tensor.dtype!r} is not one of float32, int64")
    shape = check_shape(tensor.shape or (), where)
    if tensor.sparse_crow_indices is None and tensor.sparse_col_indices is None:
        return reshape(values, shape or (values.size,), where)
    crow = _integers(tensor.sparse_crow_indices or (), np.int64, f"{where}.crow_indices")
    col = _integers(tensor.sparse_col_indices or (), np.int64, f"{where}.col_indices")
    return densify(values, crow, col, shape, where, room)


def _floats(numbers: Sequence[float], where: str) -> FloatArray:
    try:
        return np.array(numbers, np.float64).astype(np.float32)
    except OverflowError:
        raise UserError(f"{where} has a number that does not fit float32") from None


def _integers(numbers: Sequence[float], dtype: type[np.signedinteger[Any]], where: str) -> NDArray[Any]:
    if not all(isinstance(number, int) for number in numbers):
        raise UserError(f"{where} must hold whole numbers")
    try:
        return np.array(numbers, dtype=dtype)
    except OverflowError:
        raise UserError(f"{where} has a number that does not fit {np.dtype(dtype).name}") from None


# ---- answers


def encode_forward_backward_output(result: ForwardBackwardResult) -> bytes:
    """Encode the answer to forward or forward_backward as ForwardBackwardOutput.

    ``logprobs`` of consecutive datums with the same trailing shape travel in one ArrayRecord. Metrics are the
    result's with ``loss:sum``; a key without exactly one colon is a ServerError (the SDK's reduction over
    chunks would fail).
    """
    output = pb.ForwardBackwardOutput(loss_fn_output_type=OUTPUT_TYPE, metrics=_metrics(result))
    for trailing, group in groupby(result.logprobs, key=lambda array: array.shape[1:]):
        output.loss_fn_outputs.append(_record(trailing, list(group)))
    return output.SerializeToString()


def _record(trailing: tuple[int, ...], arrays: Sequence[FloatArray]) -> pb.ArrayRecord:
    blocks = [np.ascontiguousarray(array, "<f4").tobytes() for array in arrays]
    offsets = np.zeros(len(blocks) + 1, "<i8")
    np.cumsum([len(block) for block in blocks], out=offsets[1:])
    logprobs = pb.BatchedTensor(
        data=b"".join(blocks), offsets=offsets.tobytes(), dtype=pb.DTYPE_FLOAT32, trailing_shape=trailing
    )
    return pb.ArrayRecord(type_tag=OUTPUT_TYPE, fields={"logprobs": logprobs}, num_datums=len(blocks))


def encode_forward_backward_output_json(result: ForwardBackwardResult) -> bytes:
    """The same answer for SDKs before 0.25. JSON has no NaN or infinity: such a number becomes ``null``."""
    return msgspec.json.encode(
        {
            "loss_fn_output_type": OUTPUT_TYPE,
            "loss_fn_outputs": list(_json_outputs(result.logprobs)),
            "metrics": _metrics(result),
        }
    )


def _json_outputs(logprobs: Sequence[FloatArray]) -> Iterator[Mapping[str, Any]]:
    for array in logprobs:
        yield {"logprobs": {"data": array.ravel().tolist(), "dtype": "float32", "shape": list(array.shape)}}


def _metrics(result: ForwardBackwardResult) -> dict[str, float]:
    metrics = {**result.metrics, "loss:sum": float(result.loss_sum)}
    for key in metrics:
        if key.count(":") != 1:
            raise ServerError(f"metric {key!r} is not of the form name:reduction")
    return metrics
