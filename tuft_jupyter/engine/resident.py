"""The runs a trainer holds: those used recently are resident in the model, the others are offloaded.

An adapter in training takes its weights, gradients and Adam's moments. Those of the runs used last stay in the model,
up to a number of bytes; the rest goes to the :class:`~tuft_jupyter.engine.offload.OffloadStore` and comes back, with
the same bits, when it is used. So a server holds as many runs as its disk does. Knows nothing of requests or losses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from peft import LoraConfig
from torch import Tensor

from tuft_jupyter.core.engine import RunMemory
from tuft_jupyter.core.errors import NotFound
from tuft_jupyter.core.types import LoraSpec
from tuft_jupyter.engine.adam import Adam
from tuft_jupyter.engine.lora import Adapter, AdapterBank, NoRoom
from tuft_jupyter.engine.offload import Handle, OffloadStore


@dataclass(slots=True)
class Run:
    """A run in the model. ``dirty`` while ``adapter.grads`` may hold anything but zeros."""

    spec: LoraSpec
    adapter: Adapter
    adam: Adam
    dirty: bool = False

    @property
    def grads(self) -> Tensor:
        assert self.adapter.grads is not None
        return self.adapter.grads


@dataclass(frozen=True, slots=True)
class _Offloaded:
    """A run in the store; its vectors are the weights, then the gradients if ``dirty``, then the moments if any."""

    spec: LoraSpec
    config: LoraConfig
    steps: int
    dirty: bool
    handle: Handle


class ResidentRuns:
    """``room`` bounds the bytes of runs in the model that no call is using."""

    def __init__(self, bank: AdapterBank, store: OffloadStore, room: int) -> None:
        self._bank, self._store, self._room = bank, store, room
        self._here: OrderedDict[str, Run] = OrderedDict()  # least recently used first
        self._away: dict[str, _Offloaded] = {}

    def __contains__(self, run: str) -> bool:
        return run in self._here or run in self._away

    def __getitem__(self, run: str) -> Run:
        """The run, in the model until others are used. NotFound if there is none."""
        if run not in self._here:
            self.use([run])
        return self._here[run]

    def use(self, runs: Collection[str]) -> None:
        """Have all of these in the model at once. NotFound if there is no such run, NoRoom if they are too many."""
        for run in runs:
            if run not in self:
                raise NotFound(f"run {run!r} is not in training here")
        for run in runs:
            if run in self._away:
                self._bring_back(run, set(runs))
            self._here.move_to_end(run)
        self._make_room(set(runs))

    def new(self, run: str, config: LoraConfig, using: Collection[str] = ()) -> Adapter:
        """An adapter in the bank; where memory is short, runs that are not of these leave it first. As
        :meth:`AdapterBank.add` otherwise.
        """
        while True:
            try:
                return self._bank.add(run, config, trainable=True)
            except NoRoom:
                idle = next((other for other in self._here if other not in using), None)
                if idle is None:
                    raise
                self._offload(idle)

    def admit(self, run: str, spec: LoraSpec, adapter: Adapter) -> Run:
        """Begin to hold a run whose adapter is in the bank."""
        live = self._here[run] = _fresh(spec, adapter)
        self._make_room({run})
        return live

    def drop(self, run: str) -> None:
        """Forget a run; unknown ones are ignored."""
        if self._here.pop(run, None) is not None:
            self._bank.remove(run)
        elif run in self._away:
            self._store.drop(self._away.pop(run).handle)

    def memory(self) -> dict[str, RunMemory]:
        """What each run takes in memory now: weights, gradients and moments."""
        here = {run: RunMemory(model=_held(live)) for run, live in self._here.items()}
        away = {run: RunMemory(idle=self._store.in_memory(kept.handle)) for run, kept in self._away.items()}
        return here | away

    def _make_room(self, using: set[str]) -> None:
        size = sum(_size(live) for live in self._here.values())
        for run in [run for run in self._here if run not in using]:
            if size <= self._room:
                return
            size -= _size(self._here[run])
            self._offload(run)

    def _offload(self, run: str) -> None:
        live = self._here[run]
        vectors = [live.adapter.weights, *([live.grads] if live.dirty else []), *live.adam.held]
        handle = self._store.put(vectors)
        self._away[run] = _Offloaded(live.spec, live.adapter.config, live.adam.steps, live.dirty, handle)
        del self._here[run]
        self._bank.remove(run)

    def _bring_back(self, run: str, using: Collection[str]) -> None:
        away = self._away[run]
        live = _fresh(away.spec, self.new(run, away.config, using))
        vectors = self._store.take(away.handle)
        del self._away[run]
        live.adapter.weights.copy_(vectors.pop(0))
        live.adapter.refresh()
        live.dirty = away.dirty
        if away.dirty:
            live.grads.copy_(vectors.pop(0))
        live.adam.reset(away.steps)
        if vectors:
            for moment, kept in zip(live.adam.moments, vectors, strict=True):
                moment.copy_(kept)
        self._here[run] = live


def _fresh(spec: LoraSpec, adapter: Adapter) -> Run:
    assert adapter.grads is not None
    return Run(spec, adapter, Adam(adapter.weights, adapter.grads))


def _held(live: Run) -> int:
    """Bytes of a run now: the moments come with its first step."""
    return _size(live) - 2 * live.adapter.weights.nbytes + sum(moment.nbytes for moment in live.adam.held)


def _size(live: Run) -> int:
    """Bytes of a run once it has stepped."""
    adapter = live.adapter
    copy = 0 if adapter.compute is adapter.weights else adapter.compute.nbytes
    return 4 * adapter.weights.nbytes + copy
