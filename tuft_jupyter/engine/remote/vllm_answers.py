"""Bodies for a vLLM server's OpenAI-compatible API, and its answers as ``engine/vllm_values`` reads vLLM's own.

Values only. Fields are those of vLLM 0.26 to 0.33; token ids are asked for as such, so no text is ever tokenized again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from tuft_jupyter.core.errors import ServerError, UserError
from tuft_jupyter.core.types import SampleRequest, SampleResult
from tuft_jupyter.engine import vllm_values
from tuft_jupyter.engine.sample_job import DIVERGED
from tuft_jupyter.wire.openai import TextRequest

_AS_ID = "token_id:"
_PLAIN = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""What a model's own generation_config would otherwise set."""


def request_body(model: str, asked: Mapping[str, Any], request: SampleRequest, salt: str) -> dict[str, Any]:
    """Of ``/v1/completions``, for one sample request."""
    body = {
        "model": model,
        "prompt": request.prompt.tolist(),
        **_PLAIN,
        **asked,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    if salt:
        body["cache_salt"] = salt
    return {name: value for name, value in body.items() if value is not None}


def result(body: bytes, request: SampleRequest) -> SampleResult:
    """What a whole answer says. ServerError if it is not in the form that was asked for."""
    try:
        choices = msgspec.json.decode(body)["choices"]
        parts = [_part(choice) for choice in choices]
        scored = choices[0].get("prompt_logprobs") if choices else None
        answer = vllm_values.Answer(request)
        answer.add(_Output(parts, [_prompt_cell(cell) for cell in scored] if scored else None))
        return answer.result()
    except UserError:
        raise
    except (msgspec.DecodeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(
            f"the vLLM server's answer is not in the form of its completions API: {type(error).__name__}: {error}"
        ) from None


@dataclass(frozen=True, slots=True)
class _Cell:
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class _Choice:
    index: int
    token_ids: list[int]
    logprobs: list[dict[int, _Cell]]
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class _Output:
    outputs: list[_Choice]
    prompt_logprobs: list[dict[int, _Cell] | None] | None


def _part(choice: Mapping[str, Any]) -> _Choice:
    told = choice["logprobs"]
    tokens = choice.get("token_ids") or [_id(token) for token in told["tokens"]]
    tops = told.get("top_logprobs") or [None] * len(tokens)
    cells = []
    for token, logprob, top in zip(tokens, told["token_logprobs"], tops, strict=True):
        if logprob is None:
            raise UserError(DIVERGED)
        numbers = {_id(name): value for name, value in (top or {}).items()} | {token: logprob}
        ranked = sorted(numbers.items(), key=lambda pair: -pair[1])
        cells.append({each: _Cell(value, rank) for rank, (each, value) in enumerate(ranked, 1)})
    return _Choice(choice["index"], tokens, cells, choice["finish_reason"])


def _id(name: str) -> int:
    return int(name.removeprefix(_AS_ID))


def _prompt_cell(cell: Mapping[str, Any] | None) -> dict[int, _Cell] | None:
    if cell is None:
        return None
    return {int(token): _Cell(told["logprob"], told["rank"]) for token, told in cell.items()}


# ---- requests in OpenAI's form, which are vLLM's own


def text_request(body: bytes, asked: TextRequest, model: str, salt: str) -> dict[str, Any]:
    """A client's request as vLLM is to get it: with the model's name there, and nothing left to its defaults."""
    sent: dict[str, Any] = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    sent |= {
        "model": model,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": max(asked.top_k, 0),
    }
    sent |= _PLAIN
    if asked.seed is not None:
        sent["seed"] = asked.seed % 2**63
    if asked.stream:
        sent["stream_options"] = {"include_usage": True}
    if salt:
        sent["cache_salt"] = salt
    return sent


def text_answer(body: bytes, asked: TextRequest) -> tuple[bytes, dict[str, int]]:
    """A whole answer with the model's name as the client has it, and its facts."""
    told = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    facts = _facts(told.get("usage"))
    return msgspec.json.encode(told | {"model": asked.model}), facts


def event(line: str, asked: TextRequest) -> tuple[bytes | None, dict[str, int]]:
    """A line of an event stream: the chunk for the client, if it is one, and the facts, which come last."""
    if not line.startswith("data:") or line.strip() == "data: [DONE]":
        return None, {}
    told = msgspec.json.decode(line.removeprefix("data:").encode(), type=dict[str, msgspec.Raw])
    if "error" in told:
        raise ServerError(
            f"sampling failed on the vLLM server: {bytes(told['error']).decode(errors='replace')[:300]}"
        )
    facts = _facts(told.get("usage"))
    closing = bytes(told.get("choices", msgspec.Raw(b"[]"))).replace(b" ", b"") == b"[]"
    if closing and not asked.include_usage:
        return None, facts
    return msgspec.json.encode(told | {"model": asked.model}), facts


def _facts(usage: msgspec.Raw | None) -> dict[str, int]:
    counts = msgspec.json.decode(usage) if usage is not None else None
    if not counts:
        return {}
    return {"prompt_tokens": counts.get("prompt_tokens") or 0, "tokens": counts.get("completion_tokens") or 0}
