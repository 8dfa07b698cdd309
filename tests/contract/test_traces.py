"""Traces: one chain from a client's request to the worker's process, to a real collector; nothing of it when off."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.live import environment, key_of, python, until
from tuft_jupyter import tracing
from tuft_jupyter.kernel import launch

pytestmark = pytest.mark.timeout(240)

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PROMPT = "zanzibarcanaryprompt"


@dataclass
class Collector:
    """An OTLP collector as far as we need one: it keeps what is posted to ``/v1/traces``."""

    address: str = ""
    raw: list[bytes] = field(default_factory=list)

    def spans(self) -> list[tuple[dict[str, Any], Any]]:
        """(what the process says of itself, span)."""
        found = []
        for body in list(self.raw):
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                said = _said(resource.resource.attributes)
                found += [(said, span) for scope in resource.scope_spans for span in scope.spans]
        return found

    def named(self, name: str, parent: str) -> list[tuple[dict[str, Any], Any]]:
        return [(at, s) for at, s in self.spans() if s.name == name and s.parent_span_id.hex() == parent]


def _said(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    kept = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            kept.raw.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kept.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield kept
    finally:
        server.shutdown()


def post(address: str, verb: str, key: str, body: Any) -> Any:
    headers = {"X-API-Key": key, "traceparent": f"00-{TRACE}-{SPAN}-01", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/api/v1/{verb}", json.dumps(body).encode(), headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return json.loads(answer.read())


def settled(address: str, key: str, promise: Any) -> Any:
    """As the SDK waits: again at once after each 408."""
    while True:
        try:
            return post(address, "retrieve_future", key, {"request_id": promise["request_id"]})
        except urllib.error.HTTPError as waiting:
            if waiting.code != 408:
                raise


def work(address: str, key: str) -> None:
    """One run with one pass, and one sample, as a client that is traced itself."""
    session = post(address, "create_session", key, {})["session_id"]
    asked = {"session_id": session, "model_seq_id": 0, "base_model": "tuft/demo", "lora_config": {"rank": 4}}
    made = post(address, "create_model", key, asked)
    run = f"{session}:train:0"
    tokens = {"model_input": {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]}}
    targets = {"data": [2, 3, 4], "dtype": "int64", "shape": [3]}
    datum = {**tokens, "loss_fn_inputs": {"target_tokens": targets}}
    passed = {"data": [datum], "loss_fn": "cross_entropy"}
    passed = post(
        address, "forward_backward", key, {"model_id": run, "seq_id": 1, "forward_backward_input": passed}
    )
    for promise in (made, passed):
        assert "error" not in settled(address, key, promise)
    completion = {"model": "tuft/demo", "prompt": PROMPT, "max_tokens": 2}
    post(f"{address}/oai", "completions", key, completion)


def test_a_trace_leads_from_the_clients_request_to_the_worker(tmp_path: Path) -> None:
    """The client's span -> HTTP -> op, queued -> batch -> what the worker's own process did; no prompt, key or name."""
    config = tmp_path / "tuft.yaml"
    config.write_text("supported_models:\n  - model_name: tuft/demo\n")
    with collecting() as collector:
        env = environment(
            tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=collector.address, OTEL_BSP_SCHEDULE_DELAY="100"
        )
        server = launch.start(config, env)
        try:
            key = key_of(tmp_path)
            work(server.address, key)
            ((here, http),) = collector_has(collector, "POST /forward_backward", SPAN)
            ((_, op),) = collector_has(collector, "forward_backward", http.span_id.hex())
            collector_has(collector, "queued", op.span_id.hex())
            ((_, batch),) = collector_has(collector, "training batch", op.span_id.hex())
            ((there, train),) = collector_has(collector, "train", batch.span_id.hex())
            ((_, asked),) = collector_has(collector, "POST /completions", SPAN)
            ((_, sampling),) = collector_has(collector, "sampling", asked.span_id.hex())
            collector_has(collector, "sample", sampling.span_id.hex())
        finally:
            server.stop()
    assert {span.trace_id.hex() for span in (http, op, batch, train, sampling)} == {TRACE}
    assert here["service.name"] == there["service.name"] == "tuft-jupyter"
    assert here["process.pid"] != there["process.pid"]
    assert (here["tuft.role"], there["tuft.role"]) == ("server", "TrainingActor")
    assert _said(http.attributes) == {
        "http.request.method": "POST", "http.route": "/forward_backward", "http.response.status_code": 200,
    }  # fmt: skip
    assert _said(op.attributes)["tuft.tokens"] == 3
    assert _said(batch.attributes)["tuft.ops"] == 1
    assert op.start_time_unix_nano <= batch.start_time_unix_nano <= train.start_time_unix_nano
    assert train.end_time_unix_nano <= op.end_time_unix_nano
    told = b"".join(collector.raw)
    for secret in (key, key[4:], PROMPT, here.get("host.name", "nobody")):
        assert secret.encode() not in told


def collector_has(collector: Collector, name: str, parent: str) -> list[tuple[dict[str, Any], Any]]:
    until(lambda: bool(collector.named(name, parent)), 30, f"no span {name!r} below {parent}")
    return collector.named(name, parent)


IMPORTS = """
import asyncio, sys
from pathlib import Path
from tests.support.http_server import on_server
from tuft_jupyter.engine import ray_actors
async def body(server):
    await server.new_run()
    assert server.host.traces is None
on_server(Path(sys.argv[1]), body)
print([name for name in sys.modules if name.startswith("opentelemetry.sdk") or "otlp" in name])
"""


@pytest.mark.parametrize(
    "switch", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"}]
)
def test_nothing_is_traced_or_imported_unless_somebody_wants_it(
    tmp_path: Path, switch: dict[str, str]
) -> None:
    done = python(IMPORTS, environment(tmp_path, **switch), str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("env", "on"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, False),
        ({"OTEL_SDK_DISABLED": "TRUE", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, False),
    ],
)
def test_the_standard_variables_decide(env: dict[str, str], on: bool) -> None:
    assert tracing.wanted(env) is on


def test_what_is_missing_is_said_and_the_server_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    assert tracing.begin("server", {"OTEL_TRACES_EXPORTER": "otlp"}) is None
    assert 'pip install "tuft-jupyter[otel]"' in caplog.text
    grpc = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    assert tracing.begin("server", grpc) is None
    assert "not as grpc" in caplog.text
