"""Requests in OpenAI's form inside a sampling actor: bytes in, chunks out as tokens are drawn.

A task is begun with one call, and its chunks are fetched with further ones. A fetch waits for something new and takes
all there is, so a slow reader gets fewer, larger parts and nothing polls. Tokenizing happens in threads of its own.
Promises: a task ends with its last part or with its cancellation, and then draws no more.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tuft_jupyter.core.engine import Listener, Part, TextTask
from tuft_jupyter.core.errors import TuftError, UserError
from tuft_jupyter.core.quotas import check_input
from tuft_jupyter.core.types import (
    Drawn,
    Int32Array,
    SampleRequest,
    SampleResult,
    SamplingParams,
    StopReason,
)
from tuft_jupyter.engine.sampling_worker import SamplingWorker
from tuft_jupyter.engine.text import Reader, StopFinder, TextModel
from tuft_jupyter.wire.openai import Answer, Choice, TextRequest, TokenLogprob, decode_request, usage_of
from tuft_jupyter.wire.sample_codec import checked_params

log = logging.getLogger(__name__)


CANCELLED = Part(ended=True, category="user", error="this request was cancelled")

SPACING = 0.001
"""Seconds for which each open task makes the others gather before a fetch is answered: about a thousand fetches
a second altogether, however many read along. Alone, a reader gets every token as it is drawn."""


class TextWorker:
    """Samples text from ``worker``. ``threads`` turn text into tokens, each with a tokenizer of its own."""

    def __init__(self, worker: SamplingWorker, directory: Path, *, threads: int = 1) -> None:
        self._worker = worker
        self._directory = directory
        self._models = threading.local()
        self._threads = ThreadPoolExecutor(threads, "tokenizer")
        self._open: dict[str, _OpenTask] = {}
        self._preparing: set[str] = set()

    async def begin(self, task: TextTask) -> Part:
        """Start a task; returns its first part."""
        request_id = task.request_id
        self._preparing.add(request_id)
        try:
            asked = await asyncio.get_running_loop().run_in_executor(self._threads, self._prepare, task)
        except TuftError as error:
            self._preparing.discard(request_id)
            return Part(ended=True, category=error.category, error=error.message)
        if request_id not in self._preparing:  # cancelled meanwhile
            return CANCELLED
        self._preparing.discard(request_id)
        self._open[request_id] = asked
        asked.start(self._worker, request_id, task.adapter)
        return await self.more(request_id)

    async def more(self, request_id: str) -> Part:
        """The next part of a task, once there is one."""
        asked = self._open.get(request_id)
        if asked is None:
            return CANCELLED
        try:
            await asked.wait(SPACING * (len(self._open) - 1))
            part = await asked.part()
        except TuftError as error:
            part = Part(ended=True, category=error.category, error=error.message)
        except Exception as error:
            log.exception("request %s failed", request_id)
            text = f"sampling failed in the sampling worker: {type(error).__name__}"
            part = Part(ended=True, category="server", error=text)
        if part.ended:
            self.cancel(request_id)
        return part

    def cancel(self, request_id: str) -> None:
        """End a task; unknown ids are ignored."""
        self._preparing.discard(request_id)
        asked = self._open.pop(request_id, None)
        if asked is not None:
            asked.stop()

    def _model(self) -> TextModel:
        """This thread's own."""
        if not hasattr(self._models, "own"):
            self._models.own = TextModel(self._directory)
        model: TextModel = self._models.own
        return model

    def _prepare(self, task: TextTask) -> _OpenTask:
        request = decode_request(task.body, chat=task.chat)
        model = self._model()
        if task.chat:
            prompts = [model.chat(request.messages)]
        else:
            prompts = [model.prompt(p) if isinstance(p, str) else _ids(p) for p in request.prompts]
        check_input(sum(len(prompt) for prompt in prompts), task.input_tokens)
        params = checked_params(
            SamplingParams(
                None if request.max_tokens is None else max(request.max_tokens, 1),
                request.temperature,
                request.top_k,
                request.top_p,
                request.seed,
                tuple(sorted(model.ends)),
                request.stop,
            )
        )
        top = request.top or 0
        scored = request.echo and request.top is not None
        samples = [
            SampleRequest(prompt, request.n, params, scored, top if scored else 0, top, salt=task.tenant)
            for prompt in prompts
        ]
        for sample in samples:
            self._worker.sampler.check(sample)
        return _OpenTask(task.request_id, request, samples, model)


def _ids(tokens: Sequence[int]) -> Int32Array:
    try:
        return np.array(tokens, np.int32)
    except OverflowError:
        raise UserError(
            "prompt: a token id does not fit int32; use the tokenizer of this base model"
        ) from None


class _OpenTask:
    """One request: a sample request for each prompt, a choice for each sample. Lives on the event loop."""

    def __init__(
        self, request_id: str, request: TextRequest, samples: Sequence[SampleRequest], model: TextModel
    ) -> None:
        self._request = request
        self._samples = samples
        self._model = model
        self._answer = Answer(request, request_id)
        self._texts = [
            _ChoiceText(index, request, sample, model)
            for index, sample in enumerate(sample for sample in samples for _ in range(sample.num_samples))
        ]
        self._inbox: deque[tuple[int, Drawn]] = deque()
        self._news = asyncio.Event()
        self._drawing: asyncio.Future[list[SampleResult]]

    def start(self, worker: SamplingWorker, request_id: str, adapter: str | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._drawing = asyncio.ensure_future(self._draw(worker, request_id, adapter))
        self._drawing.add_done_callback(lambda _: self._news.set())

    def stop(self) -> None:
        self._drawing.cancel()

    async def wait(self, more: float) -> None:
        """Wait for news of a stream, and then that long for more of it."""
        if self._request.stream:
            await self._news.wait()
            if more and not self._drawing.done():
                await asyncio.sleep(more)

    async def part(self) -> Part:
        if not self._request.stream:
            await asyncio.wait([self._drawing])
            results = self._results()
            self._take()
            whole = self._answer.whole(self._choices(results), self._usage())
            return Part([whole], ended=True, facts=self._facts())
        chunks: list[bytes] = []
        ended = False
        while not chunks and not ended:
            await self._news.wait()
            self._news.clear()
            ended = self._drawing.done()
            chunks = [self._answer.chunk(news) for news in self._take()]
        if ended:
            self._results()
            chunks += self._answer.last(self._usage())
        return Part(chunks, ended, facts=self._facts() if ended else {})

    def _results(self) -> list[SampleResult]:
        """Of what has ended; raises what went wrong."""
        if self._drawing.cancelled():
            raise UserError("this request was cancelled")
        return self._drawing.result()

    async def _draw(self, worker: SamplingWorker, request_id: str, adapter: str | None) -> list[SampleResult]:
        first = 0
        draws = []
        for number, sample in enumerate(self._samples):
            key = f"{request_id}/{number}"
            draws.append(asyncio.ensure_future(worker.draw(key, adapter, sample, self._listener(first))))
            first += sample.num_samples
        try:
            return await asyncio.gather(*draws)
        finally:
            for draw in draws:
                draw.cancel()

    def _listener(self, first: int) -> Listener:
        def listen(drawn: Drawn) -> None:  # in the sampler's thread
            self._inbox.append((first, drawn))
            self._loop.call_soon_threadsafe(self._news.set)

        return listen

    def _take(self) -> list[Choice]:
        """What was drawn since the last time, token by token."""
        news = []
        while self._inbox:
            first, drawn = self._inbox.popleft()
            fresh = self._texts[first + drawn.index].push(drawn)
            if fresh is not None:
                news.append(fresh)
        return news

    def _choices(self, results: Sequence[SampleResult]) -> list[Choice]:
        choices = [text.choice for text in self._texts]
        if self._request.echo:
            for text, result in zip(self._texts, _each(results, self._request.n), strict=True):
                text.echo(result)
        return choices

    def _facts(self) -> dict[str, int]:
        drawn = sum(text.count for text in self._texts) if self._request.max_tokens != 0 else 0
        return {"prompt_tokens": sum(len(sample.prompt) for sample in self._samples), "tokens": drawn}

    def _usage(self) -> dict[str, int]:
        facts = self._facts()
        return usage_of(facts["prompt_tokens"], facts["tokens"])


def _each(results: Sequence[SampleResult], n: int) -> list[SampleResult]:
    return [result for result in results for _ in range(n)]


class _ChoiceText:
    """One sample as it becomes text."""

    def __init__(self, index: int, request: TextRequest, sample: SampleRequest, model: TextModel) -> None:
        self.choice = Choice(index)
        self.count = 0
        self._silent = request.max_tokens == 0
        self._echo = request.echo and request.stream
        self._logprobs = request.top is not None
        self._prompt = sample.prompt
        self._model = model
        self._reader = Reader(model.text, sample.prompt.tolist())
        self._stops = StopFinder(request.stop)

    def push(self, drawn: Drawn) -> Choice | None:
        """What one more token adds; None if it adds nothing to show yet."""
        self.count += 1
        fresh = Choice(self.choice.index)
        if self._echo:
            fresh.text, self._echo = self._model.text(self._prompt.tolist()), False
        if not self._silent:
            fresh.text += self._stops.push(self._reader.push(drawn.token))
            if self._logprobs:
                top = [(self._model.name(token), logprob) for token, logprob in drawn.top]
                fresh.tokens.append(TokenLogprob(self._model.name(drawn.token), drawn.logprob, top))
        if drawn.stop_reason is not None:
            if not self._silent:
                fresh.text += self._stops.push(self._reader.rest()) + self._stops.rest()
            cut = self._stops.found  # here, where the sampler, which reads other pieces, may have seen none
            fresh.finish_reason = StopReason.STOP.value if cut else drawn.stop_reason.value
        self.choice.text += fresh.text
        self.choice.tokens += fresh.tokens
        self.choice.finish_reason = fresh.finish_reason
        return fresh if fresh.text or fresh.tokens or fresh.finish_reason else None

    def echo(self, result: SampleResult) -> None:
        """Put the prompt before what was drawn from it."""
        prompt = self._prompt.tolist()
        self.choice.text = self._model.text(prompt) + self.choice.text
        if result.prompt_logprobs is None:
            return
        tokens = [TokenLogprob(self._model.name(prompt[0]), None)]
        for place in range(1, len(prompt)):
            top = []
            if result.topk_prompt_ids is not None and result.topk_prompt_logprobs is not None:
                ids, logprobs = result.topk_prompt_ids[place], result.topk_prompt_logprobs[place]
                top = [(self._model.name(int(t)), float(lp)) for t, lp in zip(ids, logprobs, strict=True)]
            tokens.append(
                TokenLogprob(self._model.name(prompt[place]), float(result.prompt_logprobs[place]), top)
            )
        self.choice.tokens[:0] = tokens
