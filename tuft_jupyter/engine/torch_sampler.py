"""A sampler in plain torch: continuous batching over one base model and many adapters.

Every call of :meth:`TorchSampler.step` admits what fits, runs the new prompts as one packed row, and decodes
one token of every live sequence in another, whatever their adapters. A prompt is run once for all samples
drawn from it. A sequence that ends leaves its place at once to the next in the queue.

Knows values only: no bodies, no HTTP, no Ray. Promises: what one request gets does not depend on the others
(up to floating-point rounding in a larger batch); a request that cannot be served fails in its own place.

Shapes: N rows of a decode batch or tokens of a packed row, M rows or positions of it, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from tuft_jupyter.core.engine import Listener
from tuft_jupyter.core.errors import ServerError, TuftError, UserError
from tuft_jupyter.core.types import SampleRequest, SampleResult
from tuft_jupyter.engine import head, packing
from tuft_jupyter.engine.adapter_cache import AdapterCache
from tuft_jupyter.engine.base import load_base
from tuft_jupyter.engine.kv_cache import DecodeAttention, KVCache, PrefillAttention
from tuft_jupyter.engine.pretrained import reading
from tuft_jupyter.engine.prompt_scores import score_prompt
from tuft_jupyter.engine.sample_job import DIVERGED, Decode, Job, Limits, Live, shares
from tuft_jupyter.engine.sampling import Picker, generator

log = logging.getLogger(__name__)

Ended = list[tuple[str, SampleResult | TuftError]]


class _Batch:
    """What stays the same from one decoded token to the next, until the live set changes.

    Rows stand by adapter; ``tokens_N`` are the newest tokens.
    """

    def __init__(self, live: Sequence[Live], cache: KVCache, vocab_size: int, device: torch.device) -> None:
        slots = sorted(range(len(live)), key=lambda slot: (live[slot].job.adapter or "", slot))
        self.rows = [live[slot] for slot in slots]
        adapters = [row.job.adapter for row in self.rows]
        self.attention = DecodeAttention(cache, slots, device)
        ones = [1] * len(slots)
        self.packed = packing.Packed(
            packing.boundaries(ones), packing.segments_of(ones, adapters), self.attention
        )
        self.pick = _picker(self.rows, vocab_size, device)
        self.tokens_N = torch.tensor([row.tokens[-1] for row in self.rows], device=device)


def _picker(rows: Sequence[Live], vocab_size: int, device: torch.device) -> Picker:
    requests = [row.job.request for row in rows]
    k = max(request.topk_sample_logprobs for request in requests)
    return Picker([request.params for request in requests], vocab_size, device, k)


class TorchSampler:
    """Implements ``core.engine.Sampler``.

    ``max_live`` sequences are decoded together and ``max_adapters`` adapters held; ``max_context`` None is
    the model's own limit on prompt and samples together; ``max_samples`` bounds one request;
    ``prefill_tokens`` is how many prompt tokens are run in one step (a longer prompt runs alone). ``dtype``
    None keeps that of the files, ``device`` None takes CUDA if there is one.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        max_live: int = 64,
        max_adapters: int = 32,
        max_context: int | None = None,
        max_samples: int = 1024,
        prefill_tokens: int = 2048,
    ) -> None:
        self.base = load_base(model_path, name=name, dtype=dtype, device=device)
        self.limits = Limits(
            vocab_size=self.base.vocab_size,
            context=min(max_context or self.base.max_length, self.base.max_length),
            samples=max_samples,
        )
        self._max_live = max_live
        self._prefill_tokens = prefill_tokens
        self._adapters = AdapterCache(self.base, max_adapters)
        self._cache = KVCache()
        self._live: list[Live] = []  # by slot
        self._jobs: list[Job] = []  # in order of arrival
        self._batch: _Batch | None = None
        self._lock = threading.Lock()
        self._arrived: list[tuple[str, Path | None, SampleRequest, Listener | None]] = []
        self._cancelled: set[str] = set()

    # ---- from any thread

    def check(self, request: SampleRequest) -> None:
        """UserError if the prompt, the counts or the parameters do not fit this model."""
        self.limits.check(request)
        if request.params.stop_strings and self._decode_text is None:
            raise UserError("sampling_params.stop: this model has no tokenizer; give token ids instead")

    def submit(
        self, key: str, adapter: Path | None, request: SampleRequest, heard: Listener | None = None
    ) -> None:
        """Queue a request; it is looked at in the next step."""
        with self._lock:
            self._arrived.append((key, adapter, request, heard))

    def cancel(self, key: str) -> None:
        """Drop a request before the next step; unknown keys are ignored."""
        with self._lock:
            self._cancelled.add(key)

    def busy(self) -> bool:
        """True while any request is queued or decoding."""
        with self._lock:
            return bool(self._arrived or self._jobs)

    # ---- from one thread

    @torch.inference_mode()
    def step(self) -> Ended:
        """Admit what fits, decode one token for every live sequence; returns the requests that ended."""
        ended: Ended = []
        self._receive(ended)
        admitted = self._admit(ended)
        if admitted:
            self._prefill(admitted)
        if self._live:
            self._decode()
        for job in [job for job in self._jobs if job.broken]:
            self._fail(job, UserError(DIVERGED), ended)
        for job in [job for job in self._jobs if job.ended]:
            self._drop(job)
            ended.append((job.key, job.result()))
        return ended

    def _receive(self, ended: Ended) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, set()
        for key, directory, request, heard in arrived:
            try:
                self.check(request)
            except TuftError as error:
                ended.append((key, error))
                continue
            stop, room = request.params.stop_tokens, self.limits.context - len(request.prompt)
            self._jobs.append(
                Job(
                    key,
                    directory,
                    request,
                    stop_tokens=self._eos if stop is None else frozenset(stop),
                    limit=min(request.params.max_tokens, room),
                    decode=self._decode_text if request.params.stop_strings else None,
                    waiting=request.num_samples,
                    heard=heard,
                )
            )
        for job in [job for job in self._jobs if job.key in cancelled]:
            self._drop(job)

    def _admit(self, ended: Ended) -> list[tuple[Job, range]]:
        """The samples to begin now, with their adapters loaded."""
        admitted: list[tuple[Job, range]] = []
        tokens = 0
        for job, count in shares(self._jobs, self._max_live, self._max_live - len(self._live)):
            tokens += len(job.request.prompt)
            if admitted and tokens > self._prefill_tokens:
                break
            if job.directory is not None and job.adapter is None:
                try:
                    job.adapter = self._adapters.take(job.directory)
                except TuftError as error:
                    self._fail(job, error, ended)
                    continue
                except Exception:  # an adapter may come from anywhere: it must not take the others down
                    log.exception("the adapter in %s could not be loaded", job.directory)
                    self._fail(job, ServerError("the saved weights could not be loaded"), ended)
                    continue
                if job.adapter is None:
                    break  # no room until others end, and nobody overtakes
            admitted.append((job, job.begin(count)))
        return admitted

    def _prefill(self, admitted: Sequence[tuple[Job, range]]) -> None:
        """Run the prompts of new sequences as one packed row and draw each sequence's first token."""
        same: dict[tuple[str, bytes], list[tuple[Job, range]]] = {}
        for job, indices in admitted:
            same.setdefault((job.adapter or "", job.request.prompt.tobytes()), []).append((job, indices))
        # Same adapters stand side by side; so do equal lengths, which share one call of attention.
        rows = sorted(same.values(), key=lambda row: (row[0][0].adapter or "", len(row[0][0].request.prompt)))
        prompts = [row[0][0].request.prompt for row in rows]
        adapters = [row[0][0].adapter for row in rows]
        first = len(self._live)
        slots: list[list[int]] = []
        for row, prompt in zip(rows, prompts, strict=True):
            fresh = [
                Live(job, index, generator(job.request.params.seed, index))
                for job, indices in row
                for index in indices
            ]
            slots.append([self._cache.add(len(prompt)) for _ in fresh])
            self._live += fresh

        lengths, device = [len(prompt) for prompt in prompts], self.base.device
        cu = packing.boundaries(lengths)
        packed = packing.Packed(
            cu, packing.segments_of(lengths, adapters), PrefillAttention(self._cache, cu, slots, device)
        )
        ids_N = torch.from_numpy(np.concatenate(prompts)).to(device, torch.int64)
        hidden_ND = self._forward(packed, ids_N, packing.positions(cu, device))
        for row, (start, end) in zip(rows, pairwise(cu), strict=True):
            for job, indices in row:
                if indices.start == 0:
                    self._score_prompt(job, hidden_ND[start:end])

        last_M = torch.tensor(cu[1:], device=device) - 1
        one_each = packing.segments_of([1] * len(rows), adapters)
        logits_MV = head.logits(self.base.lm_head, hidden_ND[last_M], one_each)
        counts_M = torch.tensor([len(row) for row in slots], device=device)
        fresh = self._live[first:]
        pick = _picker(fresh, self.base.vocab_size, device)
        self._extend(fresh, pick, logits_MV.repeat_interleave(counts_M, 0))
        self._batch = None
        self._leave(range(first, len(self._live)))

    def _decode(self) -> None:
        """One more token for every live sequence."""
        if self._batch is None:
            self._batch = _Batch(self._live, self._cache, self.base.vocab_size, self.base.device)
        batch = self._batch
        hidden_ND = self._forward(batch.packed, batch.tokens_N, batch.attention.positions_N[None])
        batch.attention.advance()
        logits_NV = head.logits(self.base.lm_head, hidden_ND, batch.packed.segments)
        batch.tokens_N = self._extend(batch.rows, batch.pick, logits_NV)
        self._leave(range(len(self._live)))

    def _forward(self, packed: packing.Packed, ids_N: Tensor, positions_1N: Tensor) -> Tensor:
        return self.base.run(packed, ids_N, positions_1N, backward=False)[0]

    def _extend(self, rows: Sequence[Live], pick: Picker, logits_NV: Tensor) -> Tensor:
        """Draw a token for each row and write it down."""
        uniforms = [] if pick.all_greedy else [row.rng.random() for row in rows]
        tokens_N, logprobs_N, tops = pick(logits_NV[:, : self.base.vocab_size], uniforms)
        for row, token, logprob, top in zip(rows, tokens_N.tolist(), logprobs_N.tolist(), tops, strict=True):
            row.extend(token, logprob, top)
            if not math.isfinite(logprob):
                row.job.broken = True
        return tokens_N

    def _leave(self, slots: range) -> None:
        """Take out those of the sequences in ``slots`` (up to the last one) that have just ended."""
        for slot in reversed(slots):
            reason = self._live[slot].stop_reason()
            self._live[slot].tell(reason)
            if reason is not None:
                self._live[slot].end(reason)
                self._free(slot)

    def _free(self, slot: int) -> None:
        last = self._cache.drop(slot)
        self._live[slot] = self._live[last]
        self._live.pop()
        self._batch = None

    def _fail(self, job: Job, error: TuftError, ended: Ended) -> None:
        self._drop(job)
        ended.append((job.key, error))

    def _drop(self, job: Job) -> None:
        """Forget a job and the sequences it has live."""
        for slot in reversed(range(len(self._live))):
            if self._live[slot].job is job:
                self._free(slot)
        self._jobs.remove(job)
        if job.adapter is not None:
            self._adapters.give_back(job.adapter)

    def _score_prompt(self, job: Job, hidden_MD: Tensor) -> None:
        def logits(start: int, end: int) -> Tensor:
            segments = ((0, end - start, job.adapter),)
            logits_MV = head.logits(self.base.lm_head, hidden_MD[start:end], segments)
            return logits_MV[:, : self.base.vocab_size]

        job.scored = score_prompt(job.request, logits)

    @cached_property
    def _eos(self) -> frozenset[int]:
        for config in (self.base.hf.generation_config, self.base.hf.config):
            ids = getattr(config, "eos_token_id", None)
            if ids is not None:
                return frozenset([ids] if isinstance(ids, int) else ids)
        return frozenset()

    @cached_property
    def _decode_text(self) -> Decode | None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.base.path, **reading())
        except (OSError, ValueError):
            return None
        if 2 * len(tokenizer) < self.base.vocab_size:
            return None  # files are missing, and transformers made up an empty tokenizer of the family
        decode: Any = tokenizer.decode
        return partial(decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
