"""The runs a trainer holds: those in use in the model, the others wherever there is room.

An adapter in training takes its weights, gradients and Adam's moments. What was used lately stays in the model, up to
a number of bytes; the rest goes to the :class:`~tuft_jupyter.engine.attic.Attic` and comes back, with the same bits,
when it is used. So a server holds as many runs as its disk does. Knows nothing of requests or losses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from peft import LoraConfig
from torch import Tensor

from tuft_jupyter.core.errors import NotFound
from tuft_jupyter.core.types import LoraSpec
from tuft_jupyter.engine.adam import Adam
from tuft_jupyter.engine.attic import Attic, Ticket
from tuft_jupyter.engine.lora import Adapter, AdapterBank


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
class _Away:
    """A run in the attic: its vectors are the weights, then the gradients if ``dirty``, then the moments if any."""

    spec: LoraSpec
    config: LoraConfig
    steps: int
    dirty: bool
    ticket: Ticket


class Held:
    """``room`` bounds the bytes of runs in the model that no call is using."""

    def __init__(self, bank: AdapterBank, attic: Attic, room: int) -> None:
        self._bank, self._attic, self._room = bank, attic, room
        self._here: OrderedDict[str, Run] = OrderedDict()  # least recently used first
        self._away: dict[str, _Away] = {}

    def __contains__(self, run: str) -> bool:
        return run in self._here or run in self._away

    def __getitem__(self, run: str) -> Run:
        """The run, in the model until others are used. NotFound if there is none."""
        if run not in self._here:
            self.use([run])
        return self._here[run]

    def use(self, runs: Collection[str]) -> None:
        """Have all of these in the model at once. NotFound if there is no such run."""
        for run in runs:
            if run not in self:
                raise NotFound(f"run {run!r} is not in training here")
        for run in runs:
            if run in self._away:
                self._fetch(run)
            self._here.move_to_end(run)
        self._tidy(set(runs))

    def admit(self, run: str, spec: LoraSpec, adapter: Adapter) -> Run:
        """Begin to hold a run whose adapter is in the bank."""
        live = self._here[run] = _fresh(spec, adapter)
        self._tidy({run})
        return live

    def drop(self, run: str) -> None:
        """Forget a run; unknown ones are ignored."""
        if self._here.pop(run, None) is not None:
            self._bank.remove(run)
        elif run in self._away:
            self._attic.drop(self._away.pop(run).ticket)

    def _tidy(self, using: set[str]) -> None:
        size = sum(_size(live) for live in self._here.values())
        for run in [run for run in self._here if run not in using]:
            if size <= self._room:
                return
            size -= _size(self._here[run])
            self._put_away(run)

    def _put_away(self, run: str) -> None:
        live = self._here.pop(run)
        vectors = [live.adapter.weights, *([live.grads] if live.dirty else []), *live.adam.held]
        ticket = self._attic.put(vectors)
        self._away[run] = _Away(live.spec, live.adapter.config, live.adam.steps, live.dirty, ticket)
        self._bank.remove(run)

    def _fetch(self, run: str) -> None:
        away = self._away[run]
        live = _fresh(away.spec, self._bank.add(run, away.config, trainable=True))
        vectors = self._attic.take(away.ticket)
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


def _size(live: Run) -> int:
    """Bytes of a run once it has stepped."""
    adapter = live.adapter
    copy = 0 if adapter.compute is adapter.weights else adapter.compute.nbytes
    return 4 * adapter.weights.nbytes + copy
