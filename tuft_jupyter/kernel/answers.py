"""Answers of base models and checkpoints as text, piece by piece while tokens are drawn.

The server does the words (chat template, tokenizer), so nothing heavy is imported here. It knows the OpenAI-style
routes below ``/oai/api/v1`` and nothing of who shows the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tuft_jupyter.kernel.client import Client, Refused, Unreachable


@dataclass(frozen=True, slots=True)
class Drawing:
    """How tokens are drawn. ``chat`` puts the prompt through the model's chat template."""

    max_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int | None = None
    chat: bool = True


def answer(client: Client, model: str, prompt: str, drawing: Drawing) -> Iterator[str]:
    """The pieces of one answer. Closing the iterator stops the drawing. Refused says what the server says."""
    body: dict[str, Any] = {
        name: value for name, value in asdict(drawing).items() if name != "chat" and value is not None
    }
    body |= {"model": model, "stream": True}
    if drawing.chat:
        path = "chat/completions"
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        path = "completions"
        body["prompt"] = prompt
    for event in client.events(f"oai/api/v1/{path}", body):
        if event == "[DONE]":
            return
        yield from _text(json.loads(event))
    raise Unreachable("the answer broke off")


def _text(event: Mapping[str, Any]) -> Iterator[str]:
    if event.get("error"):
        problem = event["error"]
        raise Refused(200, str(problem.get("message") if isinstance(problem, Mapping) else problem))
    for choice in event.get("choices") or ():
        piece = choice.get("text") or (choice.get("delta") or {}).get("content")
        if piece:
            yield str(piece)
