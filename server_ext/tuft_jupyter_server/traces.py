"""The spans of a server: requests, the ops they lead to, the batches in which ops run.

The chain is ``POST /forward_backward`` -> ``forward_backward`` (from acceptance to outcome) with ``queued`` in it ->
``training batch``, which is linked to every op in it -> the worker's own span, in its process. Ops follow the journal's
records and batches are seen where they are handed over, so neither core nor engines know of it. Only who was let in is
traced. Without :mod:`~tuft_jupyter.tracing` being wanted, nothing of this is made.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from tuft_jupyter.core.engine import Engines, Outcome, Part, SamplingEngine, Task, TextTask, TrainingEngine
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.types import ModelCard, Record
from tuft_jupyter.tracing import Tracing, current_traceparent, failed, traceparent
from tuft_jupyter.wire.routes import Route

if TYPE_CHECKING:
    from opentelemetry.trace import Span

UNTRACED = {"healthz", "readyz", "metrics", "openapi"}
REMEMBERED = 100_000
"""Ops at once that are followed; those beyond are not."""


@dataclass(slots=True)
class _Op:
    span: Span
    queued: Span | None
    name: str


class Traces:
    """Hangs itself to a ledger. ``tracing`` makes the spans."""

    def __init__(self, tracing: Tracing, ledger: Ledger) -> None:
        self.tracing = tracing
        self._ops: OrderedDict[str, _Op] = OrderedDict()
        ledger.observers.append(self.observe)

    @contextlib.contextmanager
    def request(self, route: Route, parent: str) -> Iterator[Callable[[int], None]]:
        """Within the block a request is answered; it says the status."""
        if route.endpoint in UNTRACED:
            yield lambda status: None
            return
        attributes = {"http.request.method": route.method, "http.route": route.path}
        with self.tracing.span(
            f"{route.method} {route.path}", parent, kind="server", attributes=attributes
        ) as span:

            def answered(status: int) -> None:
                span.set_attribute("http.response.status_code", status)
                if status >= 500:
                    failed(span, str(status))

            yield answered

    def observe(self, record: Record, seconds: float) -> None:
        """An op was accepted (in the context of its request), or has an outcome."""
        data = record.data
        if record.kind == "op_accepted" and len(self._ops) < REMEMBERED:
            attributes = {"tuft.request_id": data["request_id"], "tuft.tokens": data["tokens"]}
            span = self.tracing.start(data["op"], attributes=attributes)
            name = traceparent(span)
            self._ops[data["request_id"]] = _Op(span, self.tracing.start("queued", name), name)
        elif record.kind in ("op_done", "op_failed") and data["request_id"] in self._ops:
            op = self._ops.pop(data["request_id"])
            if op.queued is not None:
                op.queued.end()
            if record.kind == "op_failed":
                failed(op.span, data["category"])
            op.span.end()

    @contextlib.contextmanager
    def batch(self, model: str, tasks: Sequence[Task]) -> Iterator[Span]:
        """Within the block a worker works on these tasks; the span is propagated to it."""
        known = [self._ops[task.request_id] for task in tasks if task.request_id in self._ops]
        for op in known:
            if op.queued is not None:
                op.queued.end()
                op.queued = None
        names = [op.name for op in known]
        tokens = sum(task.grant for task in tasks)
        attributes: dict[str, str | int] = {
            "tuft.base_model": model,
            "tuft.ops": len(tasks),
            "tuft.granted_tokens": tokens,
        }
        span = self.tracing.start(
            "training batch", names[0] if names else "", kind="client", links=names[1:], attributes=attributes
        )
        with _ended(span), _propagated(span):
            yield span

    def sampling(self, model: str, request_id: str) -> Span:
        """A request that a worker samples, in the context of the HTTP request it came with."""
        attributes = {"tuft.base_model": model, "tuft.request_id": request_id}
        return self.tracing.start("sampling", kind="client", attributes=attributes)

    def around(self, engines: Engines) -> TracedEngines:
        return TracedEngines(engines, self)


@contextlib.contextmanager
def _propagated(span: Span) -> Iterator[None]:
    """Propagate the span to workers that are called in the block."""
    token = current_traceparent.set(traceparent(span))
    try:
        yield
    finally:
        current_traceparent.reset(token)


@contextlib.contextmanager
def _ended(span: Span) -> Iterator[None]:
    """End a span with the block, and say so if that was by an error."""
    try:
        yield
    except Exception as error:
        failed(span, type(error).__name__)
        raise
    finally:
        span.end()


class TracedEngines:
    """Implements ``core.engine.Engines`` over another one."""

    def __init__(self, engines: Engines, traces: Traces) -> None:
        self._engines = engines
        self._traces = traces

    def training(self, card: ModelCard) -> TrainingEngine:
        return _Training(self._engines.training(card), card.name, self._traces)

    def sampling(self, card: ModelCard) -> SamplingEngine:
        return _Sampling(self._engines.sampling(card), card.name, self._traces)


Engine = TypeVar("Engine", TrainingEngine, SamplingEngine)


class _Traced(Generic[Engine]):
    """An engine's life, which is not traced."""

    def __init__(self, engine: Engine, model: str, traces: Traces) -> None:
        self._engine: Engine = engine
        self._model, self._traces = model, traces

    @property
    def on_progress(self) -> Callable[[str], None]:
        return self._engine.on_progress

    @on_progress.setter
    def on_progress(self, listener: Callable[[str], None]) -> None:
        self._engine.on_progress = listener

    async def start(self) -> None:
        await self._engine.start()

    async def stop(self) -> None:
        await self._engine.stop()


class _Training(_Traced[TrainingEngine]):
    @property
    def part_tokens(self) -> int:
        return self._engine.part_tokens

    async def step(self, tasks: Sequence[Task]) -> list[Outcome]:
        with self._traces.batch(self._model, tasks):
            return await self._engine.step(tasks)


class _Sampling(_Traced[SamplingEngine]):
    async def sample(self, request_id: str, adapter: str | None, body: bytes, *, tenant: str = "") -> Outcome:
        span = self._traces.sampling(self._model, request_id)
        with _ended(span), _propagated(span):
            outcome = await self._engine.sample(request_id, adapter, body, tenant=tenant)
            if outcome.category:
                failed(span, outcome.category)
            return outcome

    async def complete(self, task: TextTask) -> AsyncGenerator[Part, None]:
        """The span is propagated with the first call of the worker, which is made for the first part."""
        span = self._traces.sampling(self._model, task.request_id)
        with _ended(span):
            async with contextlib.aclosing(self._engine.complete(task)) as parts:
                with _propagated(span):
                    part = await anext(parts)
                while True:
                    if part.category:  # before it is yielded: whoever gets an error does not come back
                        failed(span, part.category)
                    yield part
                    if part.ended:
                        return
                    part = await anext(parts)

    async def cancel(self, request_id: str) -> None:
        await self._engine.cancel(request_id)

    async def waits_for(self, request_id: str) -> str:
        return await self._engine.waits_for(request_id)
