"""Prometheus metrics: a fold of the journal's records, and the state of the server at the time of a scrape.

Histograms and counters are fed by the ledger as records become durable; gauges are read when somebody scrapes. Labels
come from small fixed sets, except ``tenant``: whose usage it is. The registry is our own, so nothing mixes with what
Jupyter or Ray export. It knows no HTTP; the route table decides who may scrape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tuft_jupyter.core.types import Record

if TYPE_CHECKING:
    from tuft_jupyter_server.host import Host

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
WAITS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
SHORT = (0.0005, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
REMEMBERED = 100_000


class Metrics:
    """Hangs itself to a host's ledger; :meth:`text` is what a scraper reads."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.registry = CollectorRegistry()
        self.step = Histogram(
            "tuft_engine_seconds",
            "Seconds of the engine for one op",
            ["op"],
            buckets=WAITS,
            registry=self.registry,
        )
        self.wait = Histogram(
            "tuft_op_seconds",
            "Seconds from the acceptance of an op to its outcome",
            ["op", "outcome"],
            buckets=WAITS,
            registry=self.registry,
        )
        self.append = Histogram(
            "tuft_journal_append_seconds",
            "Seconds until a record is durable",
            buckets=SHORT,
            registry=self.registry,
        )
        self.lag = Histogram(
            "tuft_loop_lag_seconds", "How late the event loop is", buckets=SHORT, registry=self.registry
        )
        self._accepted: dict[str, float] = {}
        ProcessCollector(registry=self.registry)
        self.registry.register(self)  # type: ignore[arg-type]
        host.ledger.observers.append(self.observe)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def observe(self, record: Record, seconds: float) -> None:
        """A record became durable after so many seconds."""
        self.append.observe(seconds)
        data = record.data
        if record.kind == "op_accepted":
            if len(self._accepted) < REMEMBERED:
                self._accepted[data["request_id"]] = record.time
        elif record.kind in ("op_done", "op_failed"):
            done = record.kind == "op_done"
            outcome = "done" if done else f"failed_{'user' if data['category'] == 'user' else 'server'}"
            began = self._accepted.pop(data["request_id"], record.time)
            self.wait.labels(data["op"], outcome).observe(max(record.time - began, 0.0))
            spent = (data.get("facts") or {}).get("engine_ms") if done else None
            if spent is not None:
                self.step.labels(data["op"]).observe(spent / 1e3)

    def collect(self) -> Iterator[Metric]:
        """What is there at this moment (the interface of prometheus_client's collectors)."""
        yield from self._counted()
        yield from self._queues()
        yield from self._usage()

    def _counted(self) -> Iterator[Metric]:
        families: dict[str, CounterMetricFamily] = {}
        for one in self.host.service.counters.series():
            names = [name for name, _ in one.labels]
            family = families.get(one.name)
            if family is None:
                family = families[one.name] = CounterMetricFamily(
                    f"tuft_{one.name}", f"{one.name.replace('_', ' ')} since the server started", labels=names
                )
            if list(family._labelnames) == names:
                family.add_metric([value for _, value in one.labels], one.value)
        yield from families.values()

    def _queues(self) -> Iterator[Metric]:
        service = self.host.service
        queued = GaugeMetricFamily("tuft_queued_ops", "Ops that wait in lanes", labels=["base_model"])
        resident = GaugeMetricFamily(
            "tuft_resident_adapters", "Adapters in training workers", labels=["base_model"]
        )
        ready = GaugeMetricFamily(
            "tuft_worker_ready", "1 while a training worker is up", labels=["base_model"]
        )
        for name, driver in service.drivers.items():
            lanes = driver.lanes.by_run.values()
            queued.add_metric([name], sum(len(lane.queue) for lane in lanes))
            resident.add_metric([name], sum(lane.resident for lane in lanes))
            ready.add_metric([name], float(driver.status == "ready"))
        yield from (queued, resident, ready)
        runs = GaugeMetricFamily("tuft_runs", "Runs by status", labels=["status"])
        for status, count in Counter(run.status for run in service.state.runs.values()).items():
            runs.add_metric([status], count)
        yield runs
        for name, doc, value in (
            ("tuft_samples_in_flight", "Sample requests under way", service.sampling.in_flight),
            ("tuft_feed_subscribers", "Panels and pollers that listen", len(service.ledger.feed)),
            ("tuft_ready", "1 once requests are answered", float(self.host.serving)),
        ):
            yield GaugeMetricFamily(name, doc, value=value)

    def _usage(self) -> Iterator[Metric]:
        """Per tenant, since the journal began."""
        state = self.host.service.state
        tokens: Counter[str] = Counter()
        sampled: Counter[str] = Counter()
        engine: Counter[str] = Counter()
        stored: Counter[str] = Counter()
        for run in state.runs.values():
            tokens[run.tenant] += run.tokens
            engine[run.tenant] += run.engine_ms / 1e3  # type: ignore[assignment]
        for tenant, past in state.past.items():  # a counter that falls is taken for one that began anew
            tokens[tenant] += past.tokens
            engine[tenant] += past.engine_ms / 1e3  # type: ignore[assignment]
        for sums in state.sampled.values():
            sampled[sums.tenant] += sums.tokens
        for checkpoint in state.checkpoints.values():
            stored[checkpoint.tenant] += checkpoint.size_bytes
        for name, doc, values, kind in (
            ("tuft_trained_tokens", "Tokens trained", tokens, CounterMetricFamily),
            ("tuft_sampled_tokens", "Tokens sampled", sampled, CounterMetricFamily),
            ("tuft_engine_busy_seconds", "Seconds of the engine", engine, CounterMetricFamily),
            ("tuft_checkpoint_bytes", "Bytes of checkpoints", stored, GaugeMetricFamily),
        ):
            family = kind(name, f"{doc}, by tenant", labels=["tenant"])
            for tenant, value in values.items():
                family.add_metric([tenant], value)
            yield family
