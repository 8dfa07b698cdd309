"""A long curve in few points that look the same: each stretch of steps keeps its lowest and its highest value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def downsampled(
    columns: Mapping[str, Sequence[Any]], metrics: Sequence[str], most: int
) -> dict[str, list[Any]]:
    """The columns ``step`` and ``metrics`` with at most about ``most`` entries; numbers have six digits.

    The first metric decides which entries stay: of each stretch its extremes, so that no peak is lost; the first and
    the last entry stay too.
    """
    steps = columns.get("step", ())
    keep: Sequence[int] = range(len(steps))
    if len(steps) > most:
        keep = _extremes(columns[metrics[0]], most // 2)
    return {
        "step": [steps[i] for i in keep],
        **{name: [_short(columns[name][i]) for i in keep] for name in metrics if name in columns},
    }


def _extremes(values: Sequence[Any], stretches: int) -> list[int]:
    kept = {0, len(values) - 1}
    for n in range(stretches):
        stretch = range(n * len(values) // stretches, (n + 1) * len(values) // stretches)
        known = [i for i in stretch if values[i] is not None]
        if known:
            kept |= {min(known, key=lambda i: values[i]), max(known, key=lambda i: values[i])}
    return sorted(kept)


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
