"""Sampling on the wire: the JSON of ``asample`` in, the protobuf SampleResponse out (or, for old SDKs, its JSON).

Fields that this server does not know are ignored, so that the next SDK's defaults do not break it; a known
field that asks for more than is offered, and an unknown sampling parameter that is switched on, are refused
by name, because leaving them out would silently change numbers. (A refusal is never a 5xx: the SDK would
repeat the request for ever.)

It does not know the model: vocabulary, context length and the limits on counts are the sampler's to check.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import (
    FloatArray,
    Int32Array,
    SampleRequest,
    SampleResult,
    SamplingParams,
    StopReason,
    TargetIds,
)
from tuft_jupyter.wire import tuft_wire_pb2 as pb
from tuft_jupyter.wire.tensors import csr_rows

_MAX_TOPK = 1024
_INT32 = 2**31 - 1
MAX_STOPS, MAX_STOP_LENGTH, MAX_STOP_TOKENS = 64, 1024, 4096
"""All are looked for after every token."""


class _Chunk(msgspec.Struct):
    type: str = "encoded_text"
    tokens: list[int] | None = None


class _Prompt(msgspec.Struct):
    chunks: list[_Chunk] = []


class _Tensor(msgspec.Struct):
    data: list[int]
    dtype: str = "int64"
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class _Request(msgspec.Struct):
    prompt: _Prompt
    sampling_params: dict[str, Any] | None = None
    num_samples: int = 1
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int | None = 0
    topk_sample_logprobs: int | None = 0
    prompt_alt_tokens_k: int | None = 0
    prompt_logprobs_last_n: int | None = None
    target_prompt_logprobs: _Tensor | None = None


class _Params(msgspec.Struct):
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str | int] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


_decoder = msgspec.json.Decoder(_Request)
_KNOWN_PARAMS = frozenset(_Params.__struct_fields__)
_WIDTHS = ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k")


def decode_sample_request(body: bytes) -> SampleRequest:
    """Decode the body of ``asample``.

    ``stop``: absent means the model's end-of-sequence tokens; token ids replace them (none: never stop);
    strings are looked for beside them.
    """
    try:
        request = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"the sample request is not valid: {error}") from None
    if request.num_samples < 1:
        raise UserError(f"num_samples must be at least 1, got {request.num_samples}")
    for name in _WIDTHS:
        if not 0 <= (getattr(request, name) or 0) <= _MAX_TOPK:
            raise UserError(f"{name} must be between 0 and {_MAX_TOPK}, got {getattr(request, name)}")
    if request.prompt_logprobs_last_n is not None and not request.prompt_logprobs:
        raise UserError(
            "prompt_logprobs_last_n says how many prompt_logprobs to score; set prompt_logprobs too"
        )
    targets = request.target_prompt_logprobs
    return SampleRequest(
        prompt=_prompt(request.prompt),
        num_samples=request.num_samples,
        params=_params(request.sampling_params or {}),
        prompt_logprobs=bool(request.prompt_logprobs),
        topk_prompt_logprobs=request.topk_prompt_logprobs or 0,
        topk_sample_logprobs=request.topk_sample_logprobs or 0,
        prompt_logprobs_last_n=request.prompt_logprobs_last_n,
        targets=None if targets is None else _targets(targets),
        prompt_alt_tokens_k=request.prompt_alt_tokens_k or 0,
    )


def _targets(tensor: _Tensor) -> TargetIds:
    where = "target_prompt_logprobs"
    shape = tensor.shape or []
    if tensor.dtype != "int64" or len(shape) != 2 or min(shape) < 1:
        raise UserError(f"{where} must be an int64 tensor of shape [prompt - 1, K]")
    ids = _int64(tensor.data, f"{where}.data")
    if tensor.sparse_crow_indices is None or tensor.sparse_col_indices is None:
        if ids.size != shape[0] * shape[1]:
            raise UserError(
                f"{where}: shape {shape} asks for {shape[0] * shape[1]} ids, but {ids.size} were sent"
            )
        return TargetIds(ids, np.repeat(np.arange(shape[0]), shape[1]), (shape[0], shape[1]))
    crow = _int64(tensor.sparse_crow_indices, f"{where}.sparse_crow_indices")
    columns = _int64(tensor.sparse_col_indices, f"{where}.sparse_col_indices")
    return TargetIds(ids, csr_rows(ids, crow, columns, shape, where), (shape[0], shape[1]), columns)


def _int64(numbers: list[int], where: str) -> NDArray[np.int64]:
    try:
        return np.array(numbers, np.int64)
    except OverflowError:
        raise UserError(f"{where} has a number that does not fit int64") from None


def _prompt(prompt: _Prompt) -> Int32Array:
    tokens: list[int] = []
    for index, chunk in enumerate(prompt.chunks):
        if chunk.tokens is None:
            raise UserError(
                f"prompt.chunks[{index}]: this server's models read text only, not {chunk.type} chunks"
            )
        tokens += chunk.tokens
    if not tokens:
        raise UserError("prompt is empty; send at least one token")
    try:
        return np.array(tokens, dtype=np.int32)
    except OverflowError:
        raise UserError(
            "prompt has a token id that does not fit int32; use the tokenizer of this base model"
        ) from None


def _params(given: dict[str, Any]) -> SamplingParams:
    for name, value in given.items():
        if name not in _KNOWN_PARAMS and not _is_off(value):
            raise UserError(f"sampling_params.{name} is not known to this server; leave it out")
    try:
        params = msgspec.convert(given, _Params)
    except msgspec.ValidationError as error:
        raise UserError(f"sampling_params: {error}") from None
    stop_tokens, stop_strings = _stop(params.stop)
    asked = SamplingParams(
        max_tokens=params.max_tokens,
        temperature=1.0 if params.temperature is None else params.temperature,
        top_k=params.top_k or -1,
        top_p=1.0 if params.top_p is None else params.top_p,
        seed=params.seed,
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
    )
    return checked_params(asked, "sampling_params.")


def checked_params(params: SamplingParams, where: str = "") -> SamplingParams:
    """The same; UserError naming the first field (with ``where`` before it) that is out of its range."""
    if params.max_tokens is not None and params.max_tokens < 1:
        raise UserError(f"{where}max_tokens must be at least 1, got {params.max_tokens}")
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        raise UserError(f"{where}temperature must be 0 (greedy) or more, got {params.temperature}")
    if not -1 <= params.top_k <= _INT32:
        raise UserError(f"{where}top_k must be -1 (no limit) or more, and fit int32, got {params.top_k}")
    if not 0 < params.top_p <= 1:
        raise UserError(f"{where}top_p must lie in (0, 1], got {params.top_p}")
    if params.seed is not None and not 0 <= params.seed < 1 << 64:
        raise UserError(f"{where}seed must be an unsigned 64-bit number, got {params.seed}")
    if len(params.stop_strings) > MAX_STOPS or len(params.stop_tokens or ()) > MAX_STOP_TOKENS:
        raise UserError(f"{where}stop may have {MAX_STOPS} strings or {MAX_STOP_TOKENS} token ids at most")
    if any(not -_INT32 <= token <= _INT32 for token in params.stop_tokens or ()):
        raise UserError(
            f"{where}stop has a token id that does not fit int32; use the tokenizer of this base model"
        )
    if any(len(stop) > MAX_STOP_LENGTH for stop in params.stop_strings):
        raise UserError(f"{where}stop may have strings of {MAX_STOP_LENGTH} characters at most")
    return params


def _is_off(value: object) -> bool:
    """Whether a parameter we do not know has a value that, by custom, means that it does nothing."""
    if value is True:
        return False
    return value is None or value in (0, 1, -1, "", [], {})


def _stop(stop: str | list[str | int] | None) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """(stop tokens, stop strings)."""
    if stop is None:
        return None, ()
    entries = [stop] if isinstance(stop, str) else stop
    strings = tuple(entry for entry in entries if isinstance(entry, str))
    tokens = tuple(entry for entry in entries if not isinstance(entry, str))
    if strings and tokens:
        raise UserError("sampling_params.stop must be all strings or all token ids, not a mixture")
    if "" in strings:
        raise UserError(
            "sampling_params.stop contains an empty string, which would stop at once; leave it out"
        )
    return (None, strings) if strings else (tokens, ())


_STOP_REASONS = {
    StopReason.STOP: pb.STOP_REASON_STOP,
    StopReason.LENGTH: pb.STOP_REASON_LENGTH,
}
_STOP_WORDS = {number: reason.value for reason, number in _STOP_REASONS.items()}


def encode_sample_response(result: SampleResult) -> bytes:
    """Encode the answer to ``asample`` as SampleResponse."""
    response = pb.SampleResponse(
        sequences=[
            pb.SampledSequence(
                stop_reason=_STOP_REASONS[sequence.stop_reason],
                tokens=np.ascontiguousarray(sequence.tokens, "<i4").tobytes(),
                logprobs=np.ascontiguousarray(sequence.logprobs, "<f4").tobytes(),
                topk_sampled_logprobs=_topk(sequence.topk_ids, sequence.topk_logprobs),
            )
            for sequence in result.sequences
        ]
    )
    if result.prompt_logprobs is not None:
        response.prompt_logprobs = np.ascontiguousarray(result.prompt_logprobs, "<f4").tobytes()
    topk = _topk(result.topk_prompt_ids, result.topk_prompt_logprobs)
    if topk is not None:
        response.topk_prompt_logprobs.CopyFrom(topk)
    if result.targets is not None and result.target_prompt_logprobs is not None:
        response.target_prompt_logprobs.CopyFrom(_scored(result.targets, result.target_prompt_logprobs))
    if result.alt_tokens is not None and result.alt_logprobs is not None:
        response.prompt_alt_tokens.tokens.CopyFrom(_dense(result.alt_tokens, "<i8", pb.DTYPE_INT64))
        response.prompt_alt_tokens.logprobs.CopyFrom(_dense(result.alt_logprobs, "<f4", pb.DTYPE_FLOAT32))
    return response.SerializeToString()


def _topk(ids: Int32Array | None, logprobs: FloatArray | None) -> pb.TopkLogprobs | None:
    if ids is None or logprobs is None:
        return None
    return pb.TopkLogprobs(
        token_ids=np.ascontiguousarray(ids, "<i4").tobytes(),
        logprobs=np.ascontiguousarray(logprobs, "<f4").tobytes(),
        k=ids.shape[1],
        length=ids.shape[0],
    )


def _dense(array: NDArray[Any], dtype: str, tag: pb.DType.ValueType) -> pb.Tensor:
    return pb.Tensor(dense=np.ascontiguousarray(array, dtype).tobytes(), dtype=tag, shape=array.shape)


def _scored(targets: TargetIds, logprobs: FloatArray) -> pb.Tensor:
    """In the shape and layout in which the ids came."""
    if targets.columns is None:
        return _dense(logprobs.reshape(targets.shape), "<f4", pb.DTYPE_FLOAT32)
    crow = np.searchsorted(targets.rows, np.arange(targets.shape[0] + 1))
    csr = pb.SparseCsr(
        values=np.ascontiguousarray(logprobs, "<f4").tobytes(),
        crow_indices=crow.astype("<i8").tobytes(),
        col_indices=targets.columns.astype("<i8").tobytes(),
    )
    return pb.Tensor(sparse_csr=csr, dtype=pb.DTYPE_FLOAT32, shape=targets.shape)


def sample_response_as_json(encoded: bytes) -> bytes:
    """A SampleResponse in the JSON of SDKs before 0.18. JSON has no NaN: a missing logprob is ``null``."""
    response = pb.SampleResponse.FromString(encoded)
    answer: dict[str, Any] = {
        "type": "sample",
        "sequences": [
            {
                "stop_reason": _STOP_WORDS[sequence.stop_reason],
                "tokens": _numbers(sequence.tokens, "<i4"),
                "logprobs": _numbers(sequence.logprobs, "<f4"),
            }
            for sequence in response.sequences
        ],
    }
    if response.HasField("prompt_logprobs"):
        answer["prompt_logprobs"] = _numbers(response.prompt_logprobs, "<f4")
    if response.HasField("topk_prompt_logprobs"):
        topk = response.topk_prompt_logprobs
        cells = list(zip(_numbers(topk.token_ids, "<i4"), _numbers(topk.logprobs, "<f4"), strict=True))
        rows = [cells[at : at + topk.k] for at in range(0, len(cells), topk.k)]
        answer["topk_prompt_logprobs"] = [None, *rows[1:]]
    return msgspec.json.encode(answer)


def _numbers(packed: bytes, dtype: str) -> list[Any]:
    numbers: list[Any] = np.frombuffer(packed, dtype).tolist()
    return numbers
