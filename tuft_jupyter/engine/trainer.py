"""The PEFT trainer: many adapters in training over one frozen base model.

Implements :class:`~tuft_jupyter.core.engine.Trainer` in plain torch. One call packs the datums of several
runs into token-budget micro-batches (:mod:`packing`), runs the base model once over each with every run's
adapter on its own tokens (:mod:`lora`), and lets the fused head (:mod:`head`) turn each request's loss into
gradients, which add up per run until its ``optim_step``. Knows nothing of requests' bytes, queues or tenants.

Promises: a run's numbers are those it would get alone; a request that fails leaves no trace in any gradient
and fails alone; the same calls in the same order give the same bits (on one thread count; on a GPU up to the order in
which its attention kernel adds up gradients).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tuft_jupyter.core.engine import RunMemory
from tuft_jupyter.core.errors import NotFound, ServerError, TuftError, UserError
from tuft_jupyter.core.types import (
    AdamParams,
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
)
from tuft_jupyter.engine import checkpoint, memory
from tuft_jupyter.engine.base import load_base
from tuft_jupyter.engine.checks import check_adam, check_request
from tuft_jupyter.engine.lora import AdapterBank, NoRoom, initialize, lora_config
from tuft_jupyter.engine.offload import OffloadStore
from tuft_jupyter.engine.passes import Item, Pass
from tuft_jupyter.engine.resident import ResidentRuns
from tuft_jupyter.engine.vllm_adapters import NO_EXPERTS

log = logging.getLogger(__name__)


class PeftTrainer:
    """Trains adapters over the model in ``model_path``.

    ``name`` is what users call the model (written into checkpoints), by default its path.
    ``micro_batch_tokens`` bounds the tokens in one pass, and with it memory. ``max_length`` bounds a datum,
    by default and at most the model's own limit. ``custom_loss``: whether losses that users wrote are computed.
    ``adapter_bytes`` bounds what idle runs may take in the model and in host memory, by default a share of what there
    is; the rest lies in a file in ``spill``. ``experts``: whether adapters may be on experts that are one tensor: not
    where vLLM samples. UserError if the model cannot be served.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        micro_batch_tokens: int | None = None,
        max_rank: int = 64,
        max_length: int | None = None,
        custom_loss: bool = False,
        adapter_bytes: tuple[int, int] | None = None,
        spill: Path | None = None,
        experts: bool = True,
    ) -> None:
        self.base = load_base(model_path, name=name, dtype=dtype, device=device)
        self.bank = AdapterBank(self.base)
        self.max_rank = max_rank
        self.max_length = min(max_length or self.base.max_length, self.base.max_length)
        self.custom_loss = custom_loss
        self.micro_batch_tokens = micro_batch_tokens or memory.micro_batch(self.base)
        room, host = adapter_bytes or memory.for_adapters(self.base.device)
        self._experts = experts
        self._runs = ResidentRuns(self.bank, OffloadStore(host, spill), room)

    def create(self, run: str, lora: LoraSpec) -> None:
        """Add a fresh adapter (B = 0, A from ``lora.seed``). UserError if the geometry is impossible."""
        self._check_geometry(lora)
        if run in self._runs:
            raise UserError(f"run {run!r} exists already")
        config = lora_config(self.base, lora)
        if config.target_parameters and not self._experts:
            raise UserError(f"train_mlp: {NO_EXPERTS}, or train_mlp=False")
        adapter = self._runs.new(run, config)
        initialize(adapter, lora.seed)
        self._runs.admit(run, lora, adapter)

    def load(self, run: str, source: Path, *, optimizer: bool) -> LoraSpec:
        """Replace (or create) the run's adapter by a checkpoint directory; gradients are cleared.

        UserError names what does not fit, before anything is touched.
        """
        saved = checkpoint.read(source, self.base, optimizer=optimizer)
        if run in self._runs:
            live = self._runs[run]
            saved.check_fits(live.adapter)
        else:
            self._check_geometry(saved.spec)
            if saved.config.target_parameters and not self._experts:
                raise UserError(f"checkpoint: {NO_EXPERTS}")
            adapter = self._runs.new(run, saved.config)
            try:
                saved.check_fits(adapter)
            except UserError:
                self.bank.remove(run)
                raise
            live = self._runs.admit(run, saved.spec, adapter)
        self.bank.load_state_dict(run, saved.weights)
        live.grads.zero_()
        live.dirty = False
        live.adam.reset(saved.steps if optimizer else 0)
        if optimizer:
            for vector, tensors in zip(live.adam.moments, saved.moments, strict=True):
                for tensor_name, view in live.adapter.split(vector).items():
                    view.copy_(tensors[tensor_name])
        return live.spec

    def save(self, run: str, target: Path, *, optimizer: bool, durable: bool = True) -> int:
        """Write a plain PEFT directory atomically; returns its size in bytes."""
        live = self._runs[run]
        return checkpoint.write(
            target,
            self.base,
            live.spec,
            live.adapter.config,
            self.bank.state_dict(run),
            steps=live.adam.steps,
            moments=[live.adapter.split(vector) for vector in live.adam.moments] if optimizer else None,
            durable=durable,
        )

    def remove(self, run: str) -> None:
        """Forget the adapter and its optimizer; unknown runs are ignored."""
        self._runs.drop(run)

    def memory(self) -> Mapping[str, RunMemory]:
        """What each run takes in memory now."""
        return self._runs.memory()

    def check(self, request: ForwardBackward) -> None:
        """UserError naming the datum, the field and the limit if any part of the request cannot be run."""
        check_request(
            request,
            vocab_size=self.base.vocab_size,
            max_length=self.max_length,
            custom_loss=self.custom_loss,
        )

    def optim_step(self, batch: Sequence[tuple[str, AdamParams]]) -> list[Mapping[str, float] | TuftError]:
        """AdamW on each run's accumulated gradient, then clear it.

        A run without gradients steps as if they were 0: moments decay, momentum and weight decay still move
        it.
        """
        results: list[Mapping[str, float] | TuftError] = []
        for run, params in batch:
            try:
                check_adam(params)
                self._use([run])
                live = self._runs[run]
                if live.dirty:
                    self._sum_gradients(live.grads)
                live.dirty = False
                results.append(live.adam.step(params))
                live.adapter.refresh()
            except TuftError as error:
                results.append(error)
        return results

    def forward_backward(self, batch: Sequence[Item]) -> list[ForwardBackwardResult | TuftError]:
        """One pass over the datums of several runs; gradients of sums are added to each run's accumulator."""
        results: list[ForwardBackwardResult | TuftError] = [
            NotFound(f"run {run!r} is not in training here") for run, _ in batch
        ]
        known = [i for i, (run, _) in enumerate(batch) if run in self._runs]
        try:
            self._use([batch[i][0] for i in known])
        except NoRoom as error:  # not for all of them at once
            if len(batch) == 1:
                return [error]
            return [self.forward_backward([item])[0] for item in batch]
        for i, result in zip(known, self._guarded([batch[i] for i in known]), strict=True):
            results[i] = result
        return results

    def _guarded(
        self, batch: Sequence[Item], *, halved: bool = False
    ) -> list[ForwardBackwardResult | TuftError]:
        """Run the items together.

        If that fails, undo it. Where memory ran out, try once more in passes ``halved``, which keep as little as
        possible; else, or after that, run each alone, so that only the guilty one fails.
        """
        budget = self.micro_batch_tokens // 2 if halved else self.micro_batch_tokens
        before: dict[str, Tensor | None] = {}
        try:
            for run in [run for run, request in batch if request.backward]:
                live = self._runs[run]
                before[run] = live.grads.clone() if live.dirty else None
            for run in before:
                self._runs[run].dirty = True
            return list(self._together(batch, budget, recompute=halved))
        except Exception as error:  # noqa: BLE001 - whatever it was, gradients go back to what they were
            for run, grads in before.items():
                live = self._runs[run]
                live.dirty = grads is not None
                live.grads.zero_() if grads is None else live.grads.copy_(grads)
            failure, exhausted = error.with_traceback(None), memory.ran_out(error)
        # Outside of the handler: its traceback holds on to the activations.
        if exhausted:
            log.warning("out of memory at %d tokens a pass", budget)
            memory.release(self.base.device)
            if not halved:
                return self._guarded(batch, halved=True)
        if len(batch) > 1:
            return [self._guarded([item], halved=halved)[0] for item in batch]
        return [self._refusal(batch[0], failure, budget)]

    def _together(
        self, batch: Sequence[Item], budget: int, *, recompute: bool
    ) -> list[ForwardBackwardResult]:
        """All of the batch in common passes, or an error that says nothing of who is guilty."""
        return Pass(self.base, batch, budget, recompute=recompute).run()

    def _use(self, runs: Sequence[str]) -> None:
        """Have the adapters of these runs in the model, or NoRoom."""
        self._runs.use(runs)

    def _sum_gradients(self, grads: Tensor) -> None:
        """Make ``grads`` [P] whole before it is used; here it is."""

    def _refusal(self, item: Item, failure: Exception, budget: int) -> TuftError:
        """What is told of a request that cannot be run even alone."""
        run, request = item
        if isinstance(failure, TuftError):
            return failure
        if memory.ran_out(failure):
            lengths = [len(datum.tokens) for datum in request.data]
            return UserError(
                f"out of memory: {len(lengths)} datums of together {sum(lengths)} tokens, the longest "
                f"{max(lengths)}, do not fit even in passes of {max(budget, *lengths)} tokens that keep as little as "
                f"possible; nothing of this request was added. Shorten the longest datum, or use a smaller rank"
            )
        log.error("forward_backward of %s failed", run, exc_info=failure)
        return ServerError(f"forward_backward failed in the trainer: {type(failure).__name__}: {failure}")

    def _check_geometry(self, lora: LoraSpec) -> None:
        if not 1 <= lora.rank <= self.max_rank:
            raise UserError(
                f"lora_config: rank must be from 1 to {self.max_rank} on this server, not {lora.rank}"
            )
        if not (math.isfinite(lora.alpha) and lora.alpha > 0):
            raise UserError(f"lora_config: alpha must be a finite number above 0, not {lora.alpha}")
