"""Text for a model: prompts and chats to tokens, drawn tokens to text as they come.

Wraps the model's own tokenizer and chat template. Nothing is downloaded, and no code of a model is run unless it
is trusted. Knows neither requests nor samplers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import Int32Array
from tuft_jupyter.engine.pretrained import reading

CONTEXT = 6
"""Tokens before a new one that its text may depend on (many tokenizers drop the space that opens a text)."""

HALF = "\ufffd"
"""What a decoder writes for a character whose last bytes are still missing."""


class TextModel:
    """The tokenizer of a model directory. Not for several threads at once."""

    def __init__(self, directory: Path) -> None:
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, **reading())
        except (OSError, ValueError):
            raise UserError("this model has no tokenizer on the server: sample it with token ids") from None
        self.ends = _ends(directory) | {self._tokenizer.eos_token_id} - {None}
        """Tokens that end a turn: the model's own, and its tokenizer's."""

    def prompt(self, text: str) -> Int32Array:
        """A text to continue, with what the tokenizer puts before one."""
        return np.array(self._tokenizer.encode(text), np.int32)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Int32Array:
        """A conversation, up to where the assistant speaks."""
        if not self._tokenizer.chat_template:
            raise UserError("messages: this model has no chat template; use completions with a prompt")
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # noqa: BLE001 - a template raises what it likes
            raise UserError(f"messages: the model's chat template refuses them: {error}") from None
        return np.array(self._tokenizer.encode(text, add_special_tokens=False), np.int32)

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens say, without special ones."""
        return str(
            self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def name(self, token: int) -> str:
        """One token by itself, special ones included."""
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))


def _ends(directory: Path) -> set[int]:
    """The end-of-sequence tokens that the model's files name."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return {found} if isinstance(found, int) else set(found)
    return set()


class Reader:
    """Turns the tokens of one sequence into text, one after the other; characters come whole."""

    def __init__(self, text: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._text = text
        self._tokens = [int(token) for token in prompt[-CONTEXT:]]
        self._start, self._read = 0, len(self._tokens)

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._tokens.append(token)
        known, text = self._known(), self._text(self._tokens[self._start :])
        if len(text) <= len(known) or text.endswith(HALF):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return text[len(known) :]

    def rest(self) -> str:
        """What was still incomplete."""
        return self._text(self._tokens[self._start :])[len(self._known()) :]

    def _known(self) -> str:
        return self._text(self._tokens[self._start : self._read])


class StopFinder:
    """Holds text back while it may be the beginning of a stop string; ``found`` once there was one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The part of the text so far that is certainly before any stop string."""
        if self.found:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        held = max((self._overlap(stop) for stop in self._stops), default=0)
        sure, self._held = self._held[: len(self._held) - held], self._held[len(self._held) - held :]
        return sure

    def rest(self) -> str:
        """What was held back after all, at the end."""
        return "" if self.found else self._held

    def _overlap(self, stop: str) -> int:
        """How much of the end of the text could begin this stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if stop.startswith(self._held[-n:])), 0)
