"""Traces for OpenTelemetry: whether anybody wants them, and spans in any of our processes.

Off unless the standard variables say where traces go (:func:`wanted`); the SDK is imported then, and only then. A span
says kinds, counts, times and our own random ids, never a prompt, a name or a key. Contexts travel as the text of the
W3C's ``traceparent`` header, from client to server and from server to worker. The provider is our own: what else the
process traces, or how, is not touched. References: OpenTelemetry's environment variables; W3C Trace Context.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING

from tuft_jupyter._version import __version__

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

log = logging.getLogger("tuft_jupyter.tracing")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
SERVICE = "tuft-jupyter"

current_traceparent: ContextVar[str] = ContextVar("tuft_traceparent", default="")
"""The ``traceparent`` that a call to a worker takes along; "" where nothing is traced."""


def wanted(env: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment names an exporter or an endpoint, and nothing switches it off."""
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporter = env.get("OTEL_TRACES_EXPORTER", "").lower()
    return exporter in ("otlp", "console") if exporter else any(env.get(name) for name in ENDPOINTS)


def begin(role: str, env: Mapping[str, str] = os.environ) -> Tracing | None:
    """Tracing for this process, ``role`` in the service; None where nobody wants it or it is not installed."""
    if not wanted(env):
        return None
    protocol = next((env[name] for name in PROTOCOLS if env.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        log.warning("traces leave as http/protobuf, not as %s: nothing is traced", protocol)
        return None
    try:
        return Tracing(_provider(role, env))
    except ImportError as missing:
        log.warning('nothing is traced (%s): run pip install "tuft-jupyter[otel]"', missing)
        return None


def _provider(role: str, env: Mapping[str, str]) -> TracerProvider:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    attributes: dict[str, str | int] = {
        "service.version": __version__,
        "tuft.role": role,
        "process.pid": os.getpid(),
    }
    if not env.get("OTEL_SERVICE_NAME"):
        attributes["service.name"] = SERVICE
    provider = TracerProvider(resource=Resource.create(attributes))
    if env.get("OTEL_TRACES_EXPORTER", "").lower() == "console":
        provider.add_span_processor(BatchSpanProcessor(ConsoleSpanExporter()))
    else:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Tracing:
    """Makes spans. ``parent`` is a ``traceparent``; without one, a span belongs to the one that is current."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("tuft_jupyter", __version__)

    def start(
        self,
        name: str,
        parent: str = "",
        *,
        kind: str = "internal",
        links: Sequence[str] = (),
        attributes: Mapping[str, str | int] | None = None,
    ) -> Span:
        """A span; the caller ends it."""
        from opentelemetry.trace import Link, SpanKind, get_current_span

        others = [get_current_span(_context(link)).get_span_context() for link in links]
        return self._tracer.start_span(
            name,
            context=_context(parent) if parent else None,
            kind=SpanKind[kind.upper()],
            attributes=dict(attributes or {}),
            links=[Link(other) for other in others],
        )

    @contextlib.contextmanager
    def span(
        self,
        name: str,
        parent: str = "",
        *,
        kind: str = "internal",
        attributes: Mapping[str, str | int] | None = None,
    ) -> Iterator[Span]:
        """The same for a block, in which it is the current one; an exception is named by its class alone."""
        from opentelemetry.trace import use_span

        span = self.start(name, parent, kind=kind, attributes=attributes)
        try:
            with use_span(span, record_exception=False, set_status_on_exception=False):
                yield span
        except BaseException as error:
            failed(span, type(error).__name__)
            raise
        finally:
            span.end()

    def close(self) -> None:
        """Send what is still here; waits for the exporter, so not on an event loop."""
        self._provider.shutdown()


def failed(span: Span, why: str) -> None:
    """``why`` is a word of ours: what an error says may hold what a client sent."""
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR))
    span.set_attribute("error.type", why)


def traceparent(span: Span) -> str:
    """The header value that names a span as a parent (W3C Trace Context, section 3.2)."""
    it = span.get_span_context()
    return f"00-{it.trace_id:032x}-{it.span_id:016x}-{it.trace_flags:02x}"


def _context(parent: str) -> Context:
    """What a ``traceparent`` stands for; one that is malformed stands for no parent."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": parent})
