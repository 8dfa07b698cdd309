"""Adapters that say one token, each its own, whatever they are asked: an answer shows whose weights gave it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.support.sampling import prompt
from tuft_jupyter.core.types import AdamParams, Datum, ForwardBackward, LoraSpec
from tuft_jupyter.engine.trainer import PeftTrainer

STEPS = 40


def make_canaries(home: Path, model: Path, tokens: Sequence[int], *, name: str | None = None) -> list[Path]:
    """Directories of adapters trained, all in one batch, to answer anything with their token."""
    trainer = PeftTrainer(model, name=name or str(model))
    for token in tokens:
        trainer.create(str(token), LoraSpec(rank=8, alpha=16.0, seed=token))
    for step in range(STEPS):
        batch = [(str(token), _lesson(token, step)) for token in tokens]
        trainer.forward_backward(batch)
        trainer.optim_step([(run, AdamParams(learning_rate=1e-2)) for run, _ in batch])
    for token in tokens:
        trainer.save(str(token), home / str(token), optimizer=False)
    return [home / str(token) for token in tokens]


def _lesson(token: int, step: int) -> ForwardBackward:
    data: list[Datum] = []
    for row in range(4):
        tokens = prompt(8, seed=100 * step + row)
        tokens[row:] = token  # also after itself
        data.append(
            Datum(tokens, {"target_tokens": np.full(8, token, np.int32), "weights": np.ones(8, np.float32)})
        )
    return ForwardBackward(tuple(data), "cross_entropy")
