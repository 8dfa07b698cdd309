"""A kept sample request as people read it: the prompt, how tokens were drawn, and the answers, in text and token ids.

Bytes in, plain values out. The caller brings the function from token ids to text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from tuft_jupyter.core.samples import Kept
from tuft_jupyter.wire.sample_codec import decode_sample_request, sample_response_as_json

ANSWERS = 8
"""Sequences shown of one request; ``sequences`` says how many there were."""

Words = Callable[[Sequence[int]], str | None]
"""Token ids as text, or None where the tokenizer is not at hand."""


def sample_views(kept: Sequence[Kept], words: Words) -> list[dict[str, Any]]:
    """One value per request, in the order in which they were asked."""
    return [_view(each, words) for each in kept]


def _view(kept: Kept, words: Words) -> dict[str, Any]:
    asked = decode_sample_request(kept.body)
    sequences = msgspec.json.decode(sample_response_as_json(kept.answer))["sequences"]
    return {
        "time": kept.time,
        "temperature": asked.params.temperature,
        "prompt": _piece(asked.prompt.tolist(), words),
        "sequences": len(sequences),
        "answers": [
            {**_piece(each["tokens"], words), "stop_reason": each["stop_reason"]}
            for each in sequences[:ANSWERS]
        ],
    }


def _piece(tokens: list[int], words: Words) -> dict[str, Any]:
    return {"tokens": tokens, "text": words(tokens)}
