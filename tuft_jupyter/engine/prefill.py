"""Prompts on their way through a sampler: run once for all who begin with them, piece by piece.

A step runs at most so many prompt tokens, so that a long prompt holds nobody up who is being decoded; what is left
is run in the next steps. Knows no model: it says which tokens are next, and who begins when the last one was run.

Shapes: P tokens of a prompt, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from tuft_jupyter.core.types import Int32Array
from tuft_jupyter.engine.kv_cache import KVCache, Strip, slot_size
from tuft_jupyter.engine.prompt_scores import PromptScores
from tuft_jupyter.engine.sample_job import Job, Live


@dataclass(slots=True, eq=False)
class Prompt:
    """``ids`` [P] of an ``owner`` (adapter or "", salt); ``beginning`` are the sequences that go on where it ends.

    ``jobs`` may want more of it; ``scores`` are told of every piece; ``last`` [D] is the hidden state of the last
    token, as soon as all of it was run. One that is ``shared`` serves every request of the owner with these tokens.
    """

    ids: Int32Array
    owner: tuple[str, str]
    shared: bool
    strip: Strip
    jobs: set[Job] = field(default_factory=set)
    beginning: list[Live] = field(default_factory=list)
    scores: list[PromptScores] = field(default_factory=list)
    last: Tensor | None = None

    @property
    def adapter(self) -> str | None:
        return self.owner[0] or None

    @property
    def left(self) -> int:
        """Tokens that have still to be run."""
        return len(self.ids) - self.strip.done

    @property
    def slot(self) -> int:
        """Positions that each sequence which begins with it takes."""
        return slot_size(len(self.ids) + 1)

    def serves(self, owner: tuple[str, str], ids: Int32Array) -> bool:
        return self.shared and self.owner == owner and np.array_equal(self.ids, ids)


class Prompts:
    """The prompts that are being run or kept, in order of arrival, and the room they take in a cache."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._held: list[Prompt] = []

    def add(self, job: Job, ids: Int32Array, *, shared: bool) -> Prompt | None:
        """Who runs these tokens, for this job alone or for all with the same; None if there is no room."""
        owner = (job.adapter or "", job.request.salt)
        scores = PromptScores(job.request) if job.scores is None else None
        fresh = scores is not None and scores.asked  # wants to see every token of it run
        for prompt in self._held if shared else ():
            if prompt.serves(owner, ids) and not (fresh and prompt.strip.done):
                break
        else:
            if not self.take(len(ids)):
                return None
            prompt = Prompt(ids, owner, shared, Strip(len(ids)))
            self._held.append(prompt)
        prompt.jobs.add(job)
        if scores is not None:
            job.scores = scores
            prompt.scores.append(scores)
        return prompt

    def seat(self, live: Live, prompt: Prompt | None) -> bool:
        """Have a sequence begin where a prompt ends; False if there is no room."""
        if prompt is None:
            return False
        if not self.take(prompt.slot, keep=prompt):
            if not prompt.beginning and prompt.left:
                self._close(prompt)
            return False
        prompt.beginning.append(live)
        return True

    def take(self, positions: int, keep: Prompt | None = None) -> bool:
        """Set positions aside, if need be those of prompts that are kept for samples still to come."""
        while not self._cache.take(positions):
            idle = next((p for p in self._held if p is not keep and not p.left and not p.beginning), None)
            if idle is None:
                return False
            self._close(idle)
        return True

    def pieces(self, budget: int) -> list[tuple[Prompt, int]]:
        """The next tokens of each prompt in a row of at most ``budget``.

        One that would fill more than half of the row takes half of the room while others wait behind it: short
        prompts pass long ones.
        """
        waiting = [prompt for prompt in self._held if prompt.left]
        long, row = budget // 2, list[tuple[Prompt, int]]()
        for prompt in waiting:
            if not budget:
                break
            halved = prompt.left > long and prompt is not waiting[-1]
            row.append((prompt, min(prompt.left, (budget + 1) // 2 if halved else budget)))
            budget -= row[-1][1]
        return row

    def begin(self) -> Iterator[tuple[Prompt, list[Live]]]:
        """The prompts that have been run, and who goes on there from now on; what nobody wants any more is closed."""
        for prompt in self._held[:]:
            if prompt.last is not None and prompt.beginning:
                fresh, prompt.beginning = prompt.beginning, []
                for live in fresh:
                    live.place = self._cache.begin(prompt.strip)
                yield prompt, fresh
            self._tidy(prompt)

    def drop(self, job: Job) -> None:
        """A job is over, whatever of it has not begun."""
        for prompt in self._held[:]:
            if job in prompt.jobs:
                before = len(prompt.beginning)
                prompt.beginning = [live for live in prompt.beginning if live.job is not job]
                self._cache.give(prompt.slot * (before - len(prompt.beginning)))
                prompt.jobs.remove(job)
                self._tidy(prompt)

    def _tidy(self, prompt: Prompt) -> None:
        if not prompt.beginning and not any(job.waiting for job in prompt.jobs):
            self._close(prompt)

    def _close(self, prompt: Prompt) -> None:
        for job in prompt.jobs:
            if job.scores in prompt.scores:
                job.scores = None  # the prompt is to be seen from its start once more
        self._cache.give(len(prompt.ids) + prompt.slot * len(prompt.beginning))
        self._held.remove(prompt)
