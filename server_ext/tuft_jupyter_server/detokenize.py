"""Token ids as text, for people who look at the samples of a run.

Reads a model's ``tokenizer.json`` with the library ``tokenizers``, which needs neither torch nor transformers; where
either is missing, there is no text. Special tokens are written out: they are what one looks for when something is odd.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tuft_jupyter.core.types import ModelCard

log = logging.getLogger("tuft_jupyter")


def detokenizer(card: ModelCard) -> Callable[[Sequence[int]], str | None]:
    """A function from token ids to text, or to None if this model's tokenizer cannot be read here. Blocks a moment."""
    tokenizer = _tokenizer(str(Path(card.path) / "tokenizer.json"))
    if tokenizer is None:
        return lambda tokens: None
    return lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=False))


@functools.lru_cache(maxsize=8)
def _tokenizer(file: str) -> Any:
    try:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(file)
    except Exception as problem:  # noqa: BLE001 - the library raises nothing finer
        log.info("samples are shown as token ids: %s", problem)
        return None
