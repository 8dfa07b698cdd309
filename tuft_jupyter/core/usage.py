"""What a tenant used, folded from the state: tokens trained and sampled per hour, checkpoints saved and kept.

Trained tokens are counted with the optimizer step that they led to, at the time of that step; sampled ones when their
answer was complete. The module knows no prices.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tuft_jupyter.core.state import HOUR as HOUR
from tuft_jupyter.core.state import Checkpoint, State


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """One hour (``start`` in seconds since the epoch) of one session on one base model."""

    start: float
    session: str
    base_model: str
    kind: str


def hourly(state: State, tenant: str, start: float, end: float) -> list[tuple[Bucket, int]]:
    """What was used per hour that began in ``start`` up to ``end``, in order.

    By kind: "training", "sampling_prefill" (prompts) and "sampling_sample" in tokens, "checkpoint" in saves.
    """
    found: Counter[Bucket] = Counter()
    for run in state.runs.values():
        if run.tenant != tenant:
            continue
        for time, tokens in zip(run.curve["time"], run.curve["tokens"], strict=True):
            found[Bucket(hour_of(time or 0.0), run.session, run.base_model, "training")] += int(tokens or 0)
    for sums in state.sampled.values():
        if sums.tenant == tenant:
            used = {
                "sampling_prefill": sums.prompt_tokens, "sampling_sample": sums.tokens, "training": sums.trained
            }  # fmt: skip
            for kind, tokens in used.items():
                found[Bucket(sums.hour, sums.session, sums.base_model, kind)] += tokens
    for checkpoint in kept(state, tenant):
        session = state.runs[checkpoint.run].session
        found[Bucket(hour_of(checkpoint.created), session, checkpoint.base_model, "checkpoint")] += 1
    return sorted((bucket, n) for bucket, n in found.items() if n and start <= bucket.start < end)


def kept(state: State, tenant: str) -> list[Checkpoint]:
    """The tenant's checkpoints that were not deleted."""
    return [c for c in state.checkpoints.values() if c.tenant == tenant]


def hour_of(time: float) -> float:
    """The beginning of the hour that a time lies in; both in seconds since the epoch."""
    return time // HOUR * HOUR
