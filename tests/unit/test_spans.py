"""Spans of what a worker answers in parts: they end with the answer, and say when it failed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.support.scripted_engine import OneModel, ScriptedEngines, ScriptedSampler
from tuft_jupyter.core.engine import Part, TextTask
from tuft_jupyter.core.journal import MemoryJournal
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.tracing import Tracing
from tuft_jupyter_server.traces import Traces


class Refusing(ScriptedSampler):
    async def complete(self, task: TextTask) -> AsyncGenerator[Part, None]:
        yield Part([b"a"])
        yield Part(ended=True, category="user", error="no")


def test_a_completion_that_fails_marks_its_span_though_its_reader_leaves_at_once() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    engines = ScriptedEngines()
    engines.sampler = Refusing()
    traced = Traces(Tracing(provider), Ledger(MemoryJournal())).around(engines).sampling(OneModel.card)

    async def read() -> None:
        async with aclosing(traced.complete(TextTask("r", None, b"{}", chat=False))) as parts:
            async for part in parts:
                if part.category:
                    return

    asyncio.run(read())
    (span,) = exporter.get_finished_spans()
    assert not span.status.is_ok
    assert span.attributes is not None
    assert span.attributes["error.type"] == "user"
