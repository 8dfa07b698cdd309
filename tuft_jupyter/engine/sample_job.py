"""A sample request on its way through a sampler: what it must be, where its samples stand, when one ends.

A job is what is asked and what has come of it; the sampler moves it along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tuft_jupyter.core.engine import Listener
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import (
    Drawn,
    SampledSequence,
    SampleRequest,
    SampleResult,
    StopReason,
)

if TYPE_CHECKING:  # torch stays out: samplers elsewhere share the limits and the words
    from tuft_jupyter.engine.kv_cache import Place
    from tuft_jupyter.engine.prompt_scores import PromptScores

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens included."""

DIVERGED = (
    "the logits of these weights are not finite: the adapter has diverged; sample from an earlier checkpoint, or "
    "train with a lower learning rate"
)
_TAIL = 4  # tokens before a stop string: many tokenizers drop the space that opens a text


@dataclass(frozen=True, slots=True)
class Limits:
    """What a sampler takes: prompt and samples together have at most ``context`` tokens; ``reason`` says why."""

    vocab_size: int
    context: int
    samples: int
    reason: str = ""

    def check(self, request: SampleRequest) -> None:
        """UserError if the prompt or the counts are out of bounds."""
        prompt, params = request.prompt, request.params
        if not len(prompt):
            raise UserError("prompt is empty; send at least one token")
        if len(prompt) >= self.context:
            raise UserError(
                f"prompt has {len(prompt)} tokens; the context of {self.context} tokens{self.reason} must leave room "
                "for at least one more; shorten it"
            )
        wrong = np.flatnonzero((prompt < 0) | (prompt >= self.vocab_size))
        if wrong.size:
            raise UserError(
                f"prompt token {int(prompt[wrong[0]])} at position {int(wrong[0])} is outside the vocabulary "
                f"(0..{self.vocab_size - 1}); use the model's own tokenizer"
            )
        if not 1 <= request.num_samples <= self.samples:
            raise UserError(f"num_samples must be between 1 and {self.samples}, got {request.num_samples}")
        if params.max_tokens is not None and params.max_tokens < 1:
            raise UserError(f"sampling_params.max_tokens must be at least 1, got {params.max_tokens}")
        if params.max_tokens is not None and len(prompt) + params.max_tokens > self.context:
            raise UserError(
                f"prompt has {len(prompt)} tokens and max_tokens asks for {params.max_tokens} more, which does not fit "
                f"the context of {self.context} tokens{self.reason}: set max_tokens to "
                f"{self.context - len(prompt)} or less, or leave it out to go as far as the context does"
            )
        self._check_scores(request)
        for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
            k = getattr(request, name)
            if not 0 <= k <= self.vocab_size:
                raise UserError(f"{name} must be between 0 and {self.vocab_size} (the vocabulary), got {k}")
        drawn = request.topk_sample_logprobs * request.num_samples * self.longest(request)
        if drawn > MAX_DRAWN:
            raise UserError(
                f"topk_sample_logprobs: {request.topk_sample_logprobs} with each of up to {self.longest(request)} "
                f"tokens of {request.num_samples} samples are over the limit of {MAX_DRAWN}: ask for fewer, or set "
                "max_tokens"
            )

    def longest(self, request: SampleRequest) -> int:
        """Tokens that each sample of a request may have."""
        room = self.context - len(request.prompt)
        return room if request.params.max_tokens is None else request.params.max_tokens

    def _check_scores(self, request: SampleRequest) -> None:
        """What is asked of the prompt must lie in it, and in bounds of memory."""
        length, last = len(request.prompt), request.prompt_logprobs_last_n
        if last is not None and not 1 <= last < length:
            raise UserError(
                f"prompt_logprobs_last_n must be between 1 and {length - 1} (the prompt), got {last}"
            )
        wide = max(request.topk_prompt_logprobs, request.prompt_alt_tokens_k)
        if length * wide > MAX_CELLS:
            raise UserError(
                f"{wide} tokens at each of {length} prompt positions are over the limit of {MAX_CELLS}: ask for fewer"
            )
        if request.prompt_alt_tokens_k and length == 1:
            raise UserError("prompt_alt_tokens_k needs a prompt of two tokens or more")
        if request.targets is None:
            return
        ids, rows = request.targets.ids, request.targets.shape[0]
        if rows != length - 1:
            raise UserError(f"target_prompt_logprobs must have {length - 1} rows (prompt - 1), got {rows}")
        if ids.max() >= self.vocab_size or ids.min() < -1:
            raise UserError(
                f"target_prompt_logprobs has an id outside the vocabulary (0..{self.vocab_size - 1}, or -1 for nothing)"
            )
        if not (ids >= 0).any():
            raise UserError("target_prompt_logprobs names no token id")


MAX_CELLS = 1 << 22
"""Tokens that one request may be told in place of the prompt's own."""
MAX_DRAWN = 1 << 23
"""And in place of those that are drawn, about a gigabyte while they are gathered."""


@dataclass(slots=True, eq=False)
class Job:
    """One request: ``waiting`` samples not yet begun, ``live`` ones being decoded, ``sequences`` ended.

    ``limit`` is how many tokens a sample may have; ``decode`` is there if text is looked at for stops;
    ``adapter`` is the name of the loaded adapter; ``broken`` that its logits are not numbers; ``scores`` what is to be
    told of the prompt; ``held_by`` what it waits for, in words.
    """

    key: str
    directory: Path | None
    request: SampleRequest
    stop_tokens: frozenset[int]
    limit: int
    decode: Decode | None
    waiting: int
    live: int = 0
    adapter: str | None = None
    broken: bool = False
    sequences: dict[int, SampledSequence] = field(default_factory=dict)
    scores: PromptScores | None = None
    held_by: str = ""
    on_token: Listener | None = None

    @property
    def ended(self) -> bool:
        return not self.waiting and not self.live

    def begin(self, count: int) -> range:
        """The numbers of the next ``count`` samples, which are live from now on."""
        first = self.request.num_samples - self.waiting
        self.waiting -= count
        self.live += count
        return range(first, first + count)

    def unbegin(self) -> None:
        """The last sample could not begin after all."""
        self.waiting += 1
        self.live -= 1

    def result(self) -> SampleResult:
        """Of a job that has ended."""
        sequences = [self.sequences[index] for index in range(self.request.num_samples)]
        return replace(self.scores.result() if self.scores else SampleResult(()), sequences=sequences)


@dataclass(slots=True, eq=False)
class Live:
    """One sequence, from the time that its prompt is run until it ends; ``place`` is there once it is decoded."""

    job: Job
    index: int
    rng: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    place: Place | None = None

    @property
    def where(self) -> Place:
        """Its place, while it is decoded."""
        assert self.place is not None
        return self.place

    def extend(self, token: int, logprob: float, top: list[tuple[int, float]]) -> None:
        """``top`` are the candidates of the whole batch: of these, as many as this request asked for."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.job.request.topk_sample_logprobs:
            self.top.append(top[: self.job.request.topk_sample_logprobs])

    def tell(self, reason: StopReason | None) -> None:
        """Let who listens know of the newest token."""
        if self.job.on_token is not None:
            top = self.top[-1] if self.top else ()
            self.job.on_token(Drawn(self.index, self.tokens[-1], self.logprobs[-1], top, reason))

    def stop_reason(self) -> StopReason | None:
        """Why the sequence ends with its newest token; None if it goes on."""
        job = self.job
        if self.tokens[-1] in job.stop_tokens:
            return StopReason.STOP
        if job.decode is not None:
            stops = job.request.params.stop_strings
            # A token is at least a byte of text, so a stop string that has just ended lies within this tail.
            text = job.decode(self.tokens[-max(len(stop.encode()) for stop in stops) - _TAIL :])
            if any(stop in text for stop in stops):
                return StopReason.STOP
        return StopReason.LENGTH if len(self.tokens) >= job.limit else None

    def end(self, reason: StopReason) -> None:
        """Hand the sequence to its job."""
        self.job.live -= 1
        top = np.array(self.top, np.float64) if self.top else None  # [T, k, 2]; a double holds any token id
        self.job.sequences[self.index] = SampledSequence(
            np.array(self.tokens, np.int32),
            np.array(self.logprobs, np.float32),
            reason,
            None if top is None else top[..., 0].astype(np.int32),
            None if top is None else top[..., 1].astype(np.float32),
        )


def shares(jobs: Sequence[Job], places: int, free: int) -> list[tuple[Job, int]]:
    """How many samples of each waiting job to begin when ``free`` of all ``places`` are free.

    In order of arrival, but a job goes above its equal share only with places that no other job can use.
    """
    waiting = [job for job in jobs if job.waiting]
    given = dict.fromkeys(waiting, 0)
    for limit in (max(1, places // max(1, len(jobs))), places):
        for job in waiting:
            more = max(0, min(job.waiting, limit - job.live) - given[job])
            given[job] += min(more, free)
            free -= min(more, free)
    return [(job, count) for job, count in given.items() if count]
