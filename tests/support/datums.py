"""Random training examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tuft_jupyter.core.types import Datum, ForwardBackward


def make_datum(length: int, *, seed: int = 0, vocab: int = 320, **inputs: Any) -> Datum:
    """Tokens and targets of this length; further loss inputs as given."""
    rng = np.random.default_rng([seed, length])
    targets = rng.integers(0, vocab, length)
    return Datum(rng.integers(0, vocab, length).astype(np.int32), {"target_tokens": targets, **inputs})


def make_policy_datum(length: int, *, seed: int = 0, spread: float = 0.3, **inputs: Any) -> Datum:
    """A datum of a policy loss: sampler log-probabilities around -6, advantages of both signs, the first two 0."""
    rng = np.random.default_rng([seed, length, 1])
    advantages = rng.normal(size=length).astype(np.float32)
    advantages[:2] = 0
    logprobs = (-6 + spread * rng.normal(size=length)).astype(np.float32)
    return make_datum(length, seed=seed, **{"logprobs": logprobs, "advantages": advantages, **inputs})


def ask(
    data: Sequence[Datum], loss_fn: str = "cross_entropy", *, backward: bool = True, **config: float
) -> ForwardBackward:
    return ForwardBackward(tuple(data), loss_fn, config, backward)
