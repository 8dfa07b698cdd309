"""A forward or forward_backward that is worked off in parts.

An op over its grant is cut between datums. :class:`Sliced` remembers where it stopped and what came out so far, and
joins the parts: losses are sums and gradients add up, so the joined answer equals the answer of one pass. Knows
neither bytes nor engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tuft_jupyter.core.types import ForwardBackward, ForwardBackwardResult


@dataclass(slots=True)
class Sliced:
    """``cursor`` is the next datum; ``tokens`` and ``engine_ms`` count what was worked on so far, ``engine_ms`` as this
    run's share, by tokens, of passes that it had in common with others."""

    run: str
    request: ForwardBackward
    cursor: int = 0
    tokens: int = 0
    engine_ms: float = 0.0
    parts: list[ForwardBackwardResult] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return bool(self.parts) and self.cursor >= len(self.request.data)

    @property
    def dirty(self) -> bool:
        """Whether some of this op's gradients, but not all, are in the run's accumulator."""
        return self.request.backward and bool(self.parts) and not self.finished

    def next(self, grant: int) -> ForwardBackward:
        """The following datums of together at most ``grant`` tokens, at least one datum."""
        data = self.request.data
        end, tokens = self.cursor, 0
        while end < len(data) and (end == self.cursor or tokens + len(data[end].tokens) <= grant):
            tokens += len(data[end].tokens)
            end += 1
        if end - self.cursor == len(data):
            return self.request
        return replace(self.request, data=data[self.cursor : end])

    def reaches_the_end(self, part: ForwardBackward) -> bool:
        return self.cursor + len(part.data) >= len(self.request.data)

    def add(self, part: ForwardBackward, result: ForwardBackwardResult, engine_ms: float) -> None:
        self.cursor += len(part.data)
        self.tokens += part.tokens
        self.engine_ms += engine_ms
        self.parts.append(result)

    def joined(self) -> ForwardBackwardResult:
        """The answer for the whole op."""
        if len(self.parts) == 1:
            return self.parts[0]
        return ForwardBackwardResult(
            logprobs=[logprobs for part in self.parts for logprobs in part.logprobs],
            loss_sum=sum(part.loss_sum for part in self.parts),
            weight_sum=sum(part.weight_sum for part in self.parts),
            metrics=joined_metrics([(part.metrics, len(part.logprobs)) for part in self.parts]),
        )


def joined_metrics(parts: Sequence[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Metrics by their ``name:reduction``, means weighted by datums as the SDK does over chunks (protocol section
    3.3); a part is its metrics and its number of datums.

    Only what every part has and what can be joined exactly is kept: sum, mean, min and max.
    """
    datums = [count for _, count in parts]
    joined = {}
    for key in parts[0][0]:
        if not all(key in metrics for metrics, _ in parts):
            continue
        values = [metrics[key] for metrics, _ in parts]
        match key.rpartition(":")[2]:
            case "sum":
                joined[key] = sum(values)
            case "min":
                joined[key] = min(values)
            case "max":
                joined[key] = max(values)
            case "mean":
                joined[key] = sum(v * n for v, n in zip(values, datums, strict=True)) / sum(datums)
    return joined
