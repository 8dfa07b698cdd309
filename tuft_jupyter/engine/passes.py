"""One batch of requests on its way through the model, forward and back.

Rows of all requests are packed into micro-batches; each is one pass of the decoder and one of the head.
Gradients go to the adapters' accumulators; the caller undoes them if :meth:`Pass.run` raises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import torch

from tuft_jupyter.core.errors import DatumError
from tuft_jupyter.core.types import Datum, FloatArray, ForwardBackward, ForwardBackwardResult
from tuft_jupyter.engine import head, memory, packing
from tuft_jupyter.engine.base import BaseModel
from tuft_jupyter.engine.custom_loss import as_given
from tuft_jupyter.engine.losses import Config, Loss, resolve, written

_SPARSE = 0.85  # of a row's positions with a gradient: from there on leaving the others out saves nothing

Item = tuple[str, ForwardBackward]


@dataclass(frozen=True, slots=True)
class _Row:
    """Datum ``index`` of item ``item`` of a batch."""

    item: int
    index: int
    datum: Datum


class Pass:
    """One batch on its way through the model; ``budget`` bounds the tokens of a micro-batch.

    ``recompute``: keep as little as possible for the way back, even where it seems to fit.
    """

    def __init__(
        self, base: BaseModel, batch: Sequence[Item], budget: int, *, recompute: bool = False
    ) -> None:
        self.base = base
        self.batch = batch
        self.budget = budget
        self.recompute = recompute
        self.losses: list[tuple[Loss, Config]] = [resolve(r.loss_fn, r.loss_config) for _, r in batch]
        self.logprobs: list[list[FloatArray]] = [[np.empty(0, np.float32)] * len(r.data) for _, r in batch]
        self.sums: list[list[float]] = [[0.0] * len(r.data) for _, r in batch]
        self.weights = [0.0] * len(batch)
        self.metrics: list[list[Mapping[str, float]]] = [[] for _ in batch]

    def run(self) -> list[ForwardBackwardResult]:
        for backward in (False, True):
            rows = [
                _Row(i, j, datum)
                for i, (_, request) in enumerate(self.batch)
                if request.backward is backward
                for j, datum in enumerate(request.data)
            ]
            if rows:
                lengths = [len(row.datum.tokens) for row in rows]
                runs = [self.batch[row.item][0] for row in rows]
                for chosen in packing.micro_batches(lengths, runs, self.budget):
                    self._micro_batch([rows[i] for i in chosen], [lengths[i] for i in chosen], backward)
        return [self._result(i) for i in range(len(self.batch))]

    def _micro_batch(self, rows: list[_Row], lengths: list[int], backward: bool) -> None:
        base = self.base
        runs = [self.batch[row.item][0] for row in rows]
        packed = packing.causal(lengths, runs, base.device)
        groups, spans, start = [], [], 0
        for _, group in groupby(rows, key=self._together):
            members = list(group)
            groups.append(members)
            spans.append(self._span(members, start))
            start = spans[-1].end
        ids = torch.from_numpy(np.concatenate([row.datum.tokens for row in rows]).astype(np.int64))
        hidden, pull = base.run(
            packed,
            ids.to(base.device),
            packing.positions(packed.cu, base.device),
            backward=backward,
            recompute=backward and (self.recompute or memory.is_tight(base, packed.tokens)),
        )
        results, gradient = head.run(
            base.lm_head, base.readout, hidden, packed.segments, spans, backward=backward
        )
        counts = np.concatenate([span.counts for span in spans])
        if gradient is not None and counts.any():
            some = np.flatnonzero(counts) if counts.mean() < _SPARSE else None
            pull(gradient, None if some is None else torch.from_numpy(some).to(base.device))
        for members, span, result in zip(groups, spans, results, strict=True):
            self._collect(members, span, result)

    def _together(self, row: _Row) -> tuple[object, ...]:
        """Rows that are equal in this make one span; each datum of a user's own loss is a span of its own."""
        own = self.losses[row.item][0].program is not None
        return row.item, row.datum.inputs["target_tokens"].shape[1:], row.index if own else None

    def _span(self, rows: list[_Row], start: int) -> head.Span:
        item, datums = rows[0].item, [row.datum for row in rows]
        loss, config = self.losses[item]
        targets = np.concatenate([datum.inputs["target_tokens"] for datum in datums]).astype(np.int64)
        counts = np.ones(len(targets), np.bool_)
        inputs: dict[str, torch.Tensor]
        if loss.program is None:
            values = _values(loss, config, datums)
            if loss.sparse:
                counts = (values[loss.weight] != 0).reshape(len(targets), -1).any(1)
            self.weights[item] += loss.weight_sum(values[loss.weight])
            inputs = {name: torch.from_numpy(value).to(self.base.device) for name, value in values.items()}
        else:
            inputs = as_given(loss.program.ranks, datums[0])
            loss = written(loss.program, rows[0].index)
            self.weights[item] += targets.size
        return head.Span(
            cu=tuple(start + edge for edge in packing.boundaries([len(datum.tokens) for datum in datums])),
            targets=torch.from_numpy(targets).to(self.base.device),
            inputs=inputs,
            counts=counts,
            loss=loss,
            config=config,
        )

    def _collect(self, members: list[_Row], span: head.Span, result: head.SpanResult) -> None:
        logprobs, losses = result.logprobs.cpu().numpy(), result.losses.cpu().numpy()
        for row, (start, end) in zip(members, pairwise(span.cu), strict=True):
            at = slice(start - span.start, end - span.start)
            self.logprobs[row.item][row.index] = logprobs[at]
            with np.errstate(invalid="ignore"):  # a loss that is not finite is refused in _result
                self.sums[row.item][row.index] = float(losses[at].sum(dtype=np.float64))
        if span.loss.program is not None:
            self.metrics[members[0].item].append(span.loss.program.metrics(result.logprobs, span.inputs))

    def _result(self, item: int) -> ForwardBackwardResult:
        for i, value in enumerate(self.sums[item]):
            if not math.isfinite(value):
                raise DatumError(
                    i,
                    f"the loss is {value}. Either `logprobs` are too far from the model's own, or the "
                    "adapter has diverged: load a checkpoint and use a lower learning rate",
                )
        loss_sum = math.fsum(self.sums[item])
        metrics = {"loss:sum": loss_sum, **_combined(self.metrics[item])}
        return ForwardBackwardResult(self.logprobs[item], loss_sum, self.weights[item], metrics)


def _values(loss: Loss, config: Config, datums: Sequence[Datum]) -> dict[str, FloatArray]:
    """The loss's inputs position by position, one datum after the other; what is missing by its default."""
    values = {}
    for name in loss.inputs:
        given = [datum.inputs.get(name) for datum in datums]
        if name in config and all(value is None for value in given):
            continue
        default = loss.default(name, config)
        values[name] = np.concatenate(
            [
                np.full(datum.inputs["target_tokens"].shape, default, np.float32) if value is None else value
                for datum, value in zip(datums, given, strict=True)
            ]
        ).astype(np.float32)
    return values


def _combined(of_datums: list[Mapping[str, float]]) -> dict[str, float]:
    """Metrics ``name:sum`` and ``name:mean`` of several datums as one."""
    combined = {}
    for name in of_datums[0] if of_datums else ():
        total = sum(metrics[name] for metrics in of_datums)  # fsum takes no infinities of both signs
        combined[name] = total / len(of_datums) if name.endswith(":mean") else total
    return combined
