"""Data parallel: one trainer in several processes, each of which runs its share of every batch.

Every process (rank) is given the same calls in the same order, so none has to command another. Each runs its share of
the datums; then they agree, through torch.distributed, on whether that failed anywhere and on what came out. Gradients
stay where they were computed until an optimizer step, which begins with their sum (one all-reduce per run and step).
Weights are never sent: the same start and the same steps make them the same.

Promises what :class:`~tuft_jupyter.engine.trainer.PeftTrainer` promises, with numbers that differ from one process'
only in the order of sums; and that a rank which lost another says so (:meth:`Group.check`) and never goes on alone.
Knows nothing of Ray: :mod:`~tuft_jupyter.engine.group` starts the processes and ends them together.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from tuft_jupyter.core.errors import DatumError, ServerError, UserError
from tuft_jupyter.core.types import ForwardBackwardResult, LoraSpec
from tuft_jupyter.engine import memory
from tuft_jupyter.engine.passes import Item
from tuft_jupyter.engine.slices import joined_metrics
from tuft_jupyter.engine.trainer import PeftTrainer

log = logging.getLogger(__name__)

T = TypeVar("T")

_INTERFACE = "lo"


class Group:
    """The ranks of one trainer. ``meeting`` is the same for all: ``file://`` and a path at which there is no file yet,
    for ranks on one machine, or ``tcp://IP:PORT`` of the first rank's node.

    gloo carries what CPUs have to say and NCCL what GPUs do. Waits until all are there; ServerError if they are not
    within ``seconds``.
    """

    def __init__(self, rank: int, ranks: int, meeting: str, device: str, *, seconds: float = 60.0) -> None:
        self.rank, self.ranks = rank, ranks
        self._device = torch.device(device)
        self._lost = ""
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        address = urlsplit(meeting)
        if address.scheme == "file":
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ[variable] = _INTERFACE
            dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=ranks)
            return
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                str(address.hostname), address.port or 0, ranks, rank == 0, timeout=timedelta(seconds=seconds)
            )
            dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
        except (dist.DistError, RuntimeError) as error:
            raise ServerError(
                f"the {ranks} processes of the trainer did not meet at {address.netloc} within {seconds:g} s "
                f"({' '.join(str(error).split())[:200]}): look whether the nodes can reach each other there, and at "
                "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME where they have several networks"
            ) from None

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum of all ranks' tensors."""
        here = tensor.to(self._device)
        self._collective(lambda: dist.all_reduce(here))
        if here is not tensor:
            tensor.copy_(here)

    def gather(self, words: bytes) -> list[bytes]:
        """The bytes that each rank gives, by rank."""
        size = torch.tensor([len(words)], device=self._device)
        sizes = [torch.empty_like(size) for _ in range(self.ranks)]
        self._collective(lambda: dist.all_gather(sizes, size))
        longest = max(int(one) for one in sizes)
        padded = torch.frombuffer(bytearray(words.ljust(longest + 1)), dtype=torch.uint8).to(self._device)
        gathered = [torch.empty_like(padded) for _ in range(self.ranks)]
        self._collective(lambda: dist.all_gather(gathered, padded))
        return [bytes(one.tolist())[: int(n)] for one, n in zip(gathered, sizes, strict=True)]

    def check(self) -> None:
        """ServerError if a rank was lost: then no call can be relied on any more."""
        if self._lost:
            raise ServerError(f"rank {self.rank} of {self.ranks} lost the others: {self._lost}")

    def give_up(self, reason: str) -> None:
        """Let :meth:`check` fail from now on."""
        self._lost = self._lost or reason

    def _collective(self, collective: Callable[[], Any]) -> None:
        self.check()
        try:
            collective()
        except Exception as error:
            self.give_up(f"{type(error).__name__}: {error}")
            raise ServerError(f"the ranks of the trainer lost each other: {error}") from error


class ParallelTrainer(PeftTrainer):
    """One rank's trainer; see :class:`PeftTrainer` for its arguments."""

    def __init__(self, model_path: str | Path, *, group: Group, **options: Any) -> None:
        super().__init__(model_path, **options)
        self.group = group

    def create(self, run: str, lora: LoraSpec) -> None:
        self._everywhere(lambda: super(ParallelTrainer, self).create(run, lora))

    def load(self, run: str, source: Path, *, optimizer: bool) -> LoraSpec:
        return self._everywhere(lambda: super(ParallelTrainer, self).load(run, source, optimizer=optimizer))

    def save(self, run: str, target: Path, *, optimizer: bool, durable: bool = True) -> int:
        """Written by the first rank; no rank goes on before it is there."""
        failure, size = None, 0
        if self.group.rank == 0:
            try:
                size = super().save(run, target, optimizer=optimizer, durable=durable)
            except Exception as error:  # noqa: BLE001 - sent to all ranks, and raised there
                failure = error
        self._agree(failure)
        return size

    def _together(
        self, batch: Sequence[Item], budget: int, *, recompute: bool
    ) -> list[ForwardBackwardResult]:
        mine = share(batch, self.group.ranks)[self.group.rank]
        some = [i for i, chosen in enumerate(mine) if chosen]
        results: list[ForwardBackwardResult] = []
        failure: Exception | None = None
        try:
            parts = [
                (batch[i][0], replace(batch[i][1], data=tuple(batch[i][1].data[j] for j in mine[i])))
                for i in some
            ]
            results = super()._together(parts, budget, recompute=recompute) if parts else []
        except DatumError as error:
            # Of a batch of one the error goes to the user, who counts all datums
            failure = DatumError(mine[some[0]][error.datum], error.problem) if len(batch) == 1 else error
        except Exception as error:  # noqa: BLE001 - sent to all ranks, and raised there
            failure = error
        found = dict(zip(some, results, strict=False))  # none if it failed
        facts = [[found[i].metrics, len(mine[i])] if i in found else None for i in range(len(batch))]
        metrics = [
            joined_metrics([part for part in parts if part])
            for parts in zip(*self._agree(failure, facts), strict=True)
        ]
        return self._joined(batch, mine, found, metrics)

    def _use(self, runs: Sequence[str]) -> None:
        self._everywhere(lambda: super(ParallelTrainer, self)._use(runs))

    def _sum_gradients(self, grads: Tensor) -> None:
        self.group.sum_(grads)

    def _joined(
        self,
        batch: Sequence[Item],
        mine: list[list[int]],
        results: dict[int, ForwardBackwardResult],
        metrics: list[dict[str, float]],
    ) -> list[ForwardBackwardResult]:
        """Everybody's results, from one sum in which each number is given by one rank and 0 elsewhere."""
        numbers: list[NDArray[Any]] = []
        for i, (_, request) in enumerate(batch):
            found = results.get(i)
            numbers.append(np.array([found.loss_sum, found.weight_sum] if found else [0.0, 0.0]))
            own = dict(zip(mine[i], found.logprobs, strict=True)) if found else {}
            for j, datum in enumerate(request.data):
                numbers.append(own[j].ravel() if j in own else np.zeros(datum.inputs["target_tokens"].size))
        whole = torch.from_numpy(np.concatenate(numbers).astype(np.float64))
        self.group.sum_(whole)
        values = np.split(whole.numpy(), np.cumsum([len(part) for part in numbers])[:-1])
        joined, at = [], 0
        for (_, request), whole_metrics in zip(batch, metrics, strict=True):
            loss_sum, weight_sum = values[at].tolist()
            logprobs = [
                value.astype(np.float32).reshape(datum.inputs["target_tokens"].shape)
                for value, datum in zip(values[at + 1 :], request.data, strict=False)
            ]
            at += 1 + len(request.data)
            joined.append(ForwardBackwardResult(logprobs, loss_sum, weight_sum, whole_metrics))
        return joined

    def _everywhere(self, change: Callable[[], T]) -> T:
        """A change that every rank makes; where only some could, they are no longer the same."""
        try:
            value, failure = change(), None
        except Exception as error:  # noqa: BLE001 - compared first
            value, failure = None, error
        gathered = self.group.gather(b"" if failure is None else b"failed")
        if len(set(gathered)) > 1:
            self.group.give_up("a change failed on some ranks only")
            raise ServerError("the ranks of the trainer differ: a change failed on some of them") from failure
        if failure is not None:
            raise failure
        return value  # type: ignore[return-value]

    def _agree(self, failure: Exception | None, facts: Any = None) -> list[Any]:
        """The facts of each rank; or the first rank's failure, raised on every rank, if there is one."""
        if failure is not None and not isinstance(failure, UserError):
            log.error("rank %d failed", self.group.rank, exc_info=failure)
        words = [None if failure is None else _encoded(failure), facts if failure is None else None]
        gathered = [json.loads(one) for one in self.group.gather(json.dumps(words).encode())]
        for problem, _ in gathered:
            if problem is not None:
                raise _decoded(problem)
        return [found for _, found in gathered]


def share(batch: Sequence[Item], ranks: int) -> list[list[list[int]]]:
    """For each rank and item the datums it runs: longest first, each to the rank with the fewest tokens so far."""
    shares: list[list[list[int]]] = [[[] for _ in batch] for _ in range(ranks)]
    load = [0] * ranks
    rows = [(len(d.tokens), i, j) for i, (_, request) in enumerate(batch) for j, d in enumerate(request.data)]
    for tokens, i, j in sorted(rows, key=lambda row: (-row[0], row[1], row[2])):
        rank = load.index(min(load))
        load[rank] += tokens
        shares[rank][i].append(j)
    for items in shares:
        for chosen in items:
            chosen.sort()
    return shares


def _encoded(failure: Exception) -> tuple[str, int, str]:
    kind = (
        "datum" if isinstance(failure, DatumError) else
        "user" if isinstance(failure, UserError) else
        "memory" if memory.ran_out(failure) else
        "other"
    )  # fmt: skip
    datum, text = (
        (failure.datum, failure.problem)
        if isinstance(failure, DatumError)
        else (0, f"{type(failure).__name__}: {failure}" if kind == "other" else str(failure))
    )
    return kind, datum, text


def _decoded(problem: tuple[str, int, str]) -> Exception:
    kind, datum, text = problem
    match kind:
        case "datum":
            return DatumError(datum, text)
        case "user":
            return UserError(text)
        case "memory":
            return MemoryError(text)
    return RuntimeError(text)
