"""A sampler in plain torch: continuous batching over one base model and many adapters.

Every call of :meth:`TorchSampler.step` admits what fits, runs some tokens of new prompts as one packed row, and
decodes one token of every live sequence in another, whatever their adapters. A prompt is run once for all samples
drawn from it, and for equal prompts of a tenant. A sequence that ends leaves its place to the next in the queue. Where
memory for keys and values runs short, the sequence that began last is preempted and goes on later where it was.

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
from tuft_jupyter.engine.kv_cache import DecodeAttention, KVCache, PrefillAttention, slot_size
from tuft_jupyter.engine.memory import kv_positions
from tuft_jupyter.engine.prefill import Prompts
from tuft_jupyter.engine.pretrained import reading
from tuft_jupyter.engine.sample_job import DIVERGED, Decode, Job, Limits, Live, shares
from tuft_jupyter.engine.sampling import Picker, generator

log = logging.getLogger(__name__)

Ended = list[tuple[str, SampleResult | TuftError]]


class _Batch:
    """What stays the same from one decoded token to the next, until the live set changes.

    Rows stand by adapter; ``tokens_N`` are the newest tokens.
    """

    def __init__(
        self,
        live: Sequence[Live],
        cache: KVCache,
        vocab_size: int,
        device: torch.device,
        processed: bool,
    ) -> None:
        self.rows = sorted(live, key=lambda row: row.job.adapter or "")
        adapters = [row.job.adapter for row in self.rows]
        self.attention = DecodeAttention(cache, [row.where for row in self.rows], device)
        ones = [1] * len(adapters)
        self.packed = packing.Packed(
            packing.boundaries(ones), packing.segments_of(ones, adapters), self.attention
        )
        self.pick = _picker(self.rows, vocab_size, device, processed)
        self.tokens_N = torch.tensor([row.tokens[-1] for row in self.rows], device=device)


def _picker(rows: Sequence[Live], vocab_size: int, device: torch.device, processed: bool) -> Picker:
    requests = [row.job.request for row in rows]
    k = max(request.topk_sample_logprobs for request in requests)
    return Picker([request.params for request in requests], vocab_size, device, k, processed=processed)


class TorchSampler:
    """Implements ``core.engine.Sampler``.

    ``max_live`` sequences are decoded together and ``max_adapters`` adapters held; ``max_context`` None is
    the model's own limit on prompt and samples together; ``max_samples`` bounds one request. ``kv_tokens`` bounds the
    positions held of all prompts and sequences (None: a share of the free memory); one sequence may have two fifths
    of them. A step runs at most ``prefill_tokens`` of prompts, or ``chunk_tokens`` while others decode. ``dtype``
    None keeps that of the files, ``device`` None takes CUDA if there is one. ``logprobs_mode``: "processed_logprobs"
    are those of what was drawn from, after temperature and filters; otherwise they are the model's own.
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
        kv_tokens: int | None = None,
        prefill_tokens: int = 2048,
        chunk_tokens: int = 512,
        logprobs_mode: str | None = None,
    ) -> None:
        self.base = load_base(model_path, name=name, dtype=dtype, device=device)
        self._cache = KVCache(kv_tokens or kv_positions(self.base))
        context = min(max_context or self.base.max_length, self.base.max_length)
        longest = self._cache.longest
        why = (
            f" (two fifths of the {self._cache.budget} that the KV cache holds)" if longest < context else ""
        )
        self.limits = Limits(self.base.vocab_size, min(context, longest), max_samples, why)
        self._max_live, self._max_adapters = max_live, max_adapters
        self._processed = logprobs_mode == "processed_logprobs"
        self._prefill_tokens, self._chunk_tokens = prefill_tokens, chunk_tokens
        self._adapters = AdapterCache(self.base, max_adapters)
        self._jobs: list[Job] = []  # in order of arrival
        self._prompts = Prompts(self._cache)
        self._live: list[Live] = []  # being decoded, in order of their beginning
        self._preempted: list[Live] = []
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
        self, key: str, adapter: Path | None, request: SampleRequest, on_token: Listener | None = None
    ) -> None:
        """Queue a request; it is looked at in the next step."""
        with self._lock:
            self._arrived.append((key, adapter, request, on_token))

    def cancel(self, key: str) -> None:
        """Drop a request before the next step; unknown keys are ignored."""
        with self._lock:
            self._cancelled.add(key)

    def busy(self) -> bool:
        """True while any request is queued or decoding."""
        with self._lock:
            return bool(self._arrived or self._jobs)

    def waits_for(self, key: str) -> str:
        """Why nothing of a request is being drawn; empty if something is, or if it is unknown."""
        return next((job.held_by for job in self._jobs[:] if job.key == key and not job.live), "")

    # ---- from one thread

    @torch.inference_mode()
    def step(self) -> Ended:
        """Admit what fits, decode one token for every live sequence; returns the requests that ended."""
        ended: Ended = []
        self._receive(ended)
        self._admit(ended)
        self._run_prompts()
        self._begin()
        self._grow()
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
        for key, directory, request, on_token in arrived:
            try:
                self.check(request)
            except TuftError as error:
                ended.append((key, error))
                continue
            stop = request.params.stop_tokens
            self._jobs.append(
                Job(
                    key,
                    directory,
                    request,
                    stop_tokens=self._eos if stop is None else frozenset(stop),
                    limit=self.limits.longest(request),
                    decode=self._decode_text if request.params.stop_strings else None,
                    waiting=request.num_samples,
                    on_token=on_token,
                )
            )
        for job in [job for job in self._jobs if job.key in cancelled]:
            self._drop(job)

    # ---- admission

    def _admit(self, ended: Ended) -> None:
        """Find room for sequences that were preempted, then for the samples that can begin now."""
        while self._preempted:
            live = self._preempted[0]
            ids = np.concatenate([live.job.request.prompt, np.array(live.tokens, np.int32)])
            if not self._prompts.seat(live, self._prompts.add(live.job, ids, shared=False)):
                return  # nobody overtakes
            self._preempted.pop(0)
        free = self._max_live - sum(job.live for job in self._jobs)
        held_by = f"{self._max_live} sequences are being decoded, which is this sampler's limit"
        for job, count in shares(self._jobs, self._max_live, free):
            error = self._adapt(job)
            if error is not None:
                self._fail(job, error, ended)
            elif job.directory is not None and job.adapter is None:
                held_by = f"{self._max_adapters} adapters are in use, which is this sampler's limit"
                break  # no room until others end, and nobody overtakes
            elif not self._start(job, count):
                taken, budget = self._cache.taken, self._cache.budget
                held_by = f"{taken} of the {budget} tokens that the KV cache holds are taken"
                break
        for job in self._jobs:
            job.held_by = held_by

    def _adapt(self, job: Job) -> TuftError | None:
        """Have the adapter of a job loaded, if there is room for it; an error if it cannot be."""
        if job.directory is None or job.adapter is not None:
            return None
        try:
            job.adapter = self._adapters.take(job.directory)
        except TuftError as error:
            return error
        except Exception:  # an adapter may come from anywhere: it must not take the others down
            log.exception("the adapter in %s could not be loaded", job.directory)
            return ServerError("the saved weights could not be loaded")
        return None

    def _start(self, job: Job, count: int) -> bool:
        """Begin the next samples of a job; False if there is not room for all."""
        prompt = self._prompts.add(job, job.request.prompt, shared=True)
        for _ in range(count):
            (index,) = job.begin(1)
            live = Live(job, index, generator(job.request.params.seed, index))
            if not self._prompts.seat(live, prompt):
                job.unbegin()
                return False
        return True

    # ---- prompts

    def _run_prompts(self) -> None:
        """Run the next pieces of prompts as one packed row."""
        row = self._prompts.pieces(self._chunk_tokens if self._live else self._prefill_tokens)
        if not row:
            return
        # Same adapters stand side by side; so do equal lengths that begin, which share one call of attention.
        row.sort(key=lambda piece: (piece[0].owner, piece[0].strip.done, piece[1]))
        prompts, device = [prompt for prompt, _ in row], self.base.device
        starts = [prompt.strip.done for prompt in prompts]
        spans = [slice(start, start + count) for start, (_, count) in zip(starts, row, strict=True)]
        cu = packing.boundaries([count for _, count in row])
        attention = PrefillAttention([prompt.strip for prompt in prompts], cu, device)
        segments = packing.segments_of([count for _, count in row], [prompt.adapter for prompt in prompts])
        ids_N = np.concatenate([p.ids[span] for p, span in zip(prompts, spans, strict=True)])
        positions_N = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        hidden_ND = self._forward(
            packing.Packed(cu, segments, attention),
            torch.from_numpy(ids_N).to(device, torch.int64),
            torch.from_numpy(positions_N).to(device)[None],
        )
        attention.advance()
        for prompt, start, (first, last) in zip(prompts, starts, pairwise(cu), strict=True):
            for scores in prompt.scores:
                logits = partial(self._logits_within, hidden_ND[first:last], prompt.adapter, start)
                scores.update(start, prompt.strip.done, logits)
            if not prompt.left:
                prompt.last = hidden_ND[last - 1].clone()
                prompt.scores.clear()

    def _logits_within(
        self, hidden_MD: Tensor, adapter: str | None, offset: int, start: int, end: int
    ) -> Tensor:
        """Logits of positions [start, end) of a prompt; the hidden states begin with position ``offset``."""
        rows_MD = hidden_MD[start - offset : end - offset]
        logits_MV = head.logits(self.base.lm_head, self.base.readout, rows_MD, ((0, end - start, adapter),))
        return logits_MV[:, : self.base.vocab_size]

    def _begin(self) -> None:
        """Draw the first token of every sequence whose prompt has been run."""
        ready = sorted(self._prompts.begin(), key=lambda found: found[0].owner)
        if not ready:
            return
        hidden_MD = torch.stack([prompt.last for prompt, _ in ready if prompt.last is not None])
        segments = packing.segments_of([1] * len(ready), [prompt.adapter for prompt, _ in ready])
        logits_MV = head.logits(self.base.lm_head, self.base.readout, hidden_MD, segments)
        counts_M = torch.tensor([len(lives) for _, lives in ready], device=self.base.device)
        fresh = [live for _, lives in ready for live in lives]
        self._live += fresh
        self._batch = None
        pick = _picker(fresh, self.base.vocab_size, self.base.device, self._processed)
        self._extend(fresh, pick, logits_MV.repeat_interleave(counts_M, 0))
        self._leave(fresh)

    # ---- decoding

    def _grow(self) -> None:
        """A larger place for whom the present one is too small; while there is none, who began last is preempted."""
        for live in [live for live in self._live if live.where.full]:
            while live.place is not None:
                wanted = slot_size(live.place.length + 1)
                if self._prompts.take(wanted):
                    self._cache.move(live.place, wanted)
                    self._batch = None
                    break
                last = self._live[-1]
                self._free(last)
                self._preempted.insert(0, last)

    def _decode(self) -> None:
        """One more token for every live sequence."""
        if self._batch is None:
            self._batch = _Batch(
                self._live, self._cache, self.base.vocab_size, self.base.device, self._processed
            )
        batch = self._batch
        hidden_ND = self._forward(batch.packed, batch.tokens_N, batch.attention.positions_N[None])
        batch.attention.advance()
        logits_NV = head.logits(self.base.lm_head, self.base.readout, hidden_ND, batch.packed.segments)
        batch.tokens_N = self._extend(batch.rows, batch.pick, logits_NV)
        self._leave(batch.rows)

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

    def _leave(self, rows: Sequence[Live]) -> None:
        """Tell what was drawn, and take out the sequences that have just ended."""
        for live in rows:
            reason = live.stop_reason()
            live.tell(reason)
            if reason is not None:
                live.end(reason)
                self._free(live)

    def _free(self, live: Live) -> None:
        self._cache.drop(live.where)
        live.place = None
        self._live.remove(live)
        self._batch = None

    # ---- leaving

    def _fail(self, job: Job, error: TuftError, ended: Ended) -> None:
        self._drop(job)
        ended.append((job.key, error))

    def _drop(self, job: Job) -> None:
        """Forget a job and the sequences it has begun."""
        self._jobs.remove(job)
        for live in [live for live in self._live if live.job is job]:
            self._free(live)
        self._preempted = [live for live in self._preempted if live.job is not job]
        self._prompts.drop(job)
        if job.adapter is not None:
            self._adapters.give_back(job.adapter)

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
