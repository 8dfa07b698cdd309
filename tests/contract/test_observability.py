"""What a server tells of itself: numbers for Prometheus, readiness, logs."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from examples.run_on_server import Server as JupyterServer
from tests.contract.test_limits import step
from tests.support.http_server import BOB_KEY, Server, on_server, refusal
from tests.support.live import ask, key_of
from tuft_jupyter.core.errors import UserError
from tuft_jupyter_server import logs


async def scraped(server: Server) -> dict[tuple[str, tuple[str, ...]], float]:
    """Samples by name and the values of their labels."""
    answer = await server.ask("GET", "/tuft/metrics")
    assert answer.code == 200
    assert answer.headers["Content-Type"].startswith("text/plain")
    return {
        (
            sample.name,
            tuple(value for name, value in sorted(sample.labels.items()) if name != "le"),
        ): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


def test_metrics_count_what_was_done_for_whom_and_how_it_ended(tmp_path: Path) -> None:
    """S1-69: counters of ops, tokens, queue, journal, loop; per-tenant usage."""

    async def body(server: Server) -> None:
        run = await server.new_run(BOB_KEY)
        for seq in (1, 2):
            promise = await server.post("/optim_step", step(run, seq), BOB_KEY)
            await server.post("/retrieve_future", {"request_id": promise["request_id"]}, BOB_KEY)
        server.host.engines.trainer.gate.clear()
        for seq in (3, 4, 5):
            await server.post("/optim_step", step(run, seq), BOB_KEY)
        seen = await scraped(server)
        server.host.engines.trainer.gate.set()
        assert seen["tuft_op_seconds_count", ("optim_step", "done")] == 2
        assert seen["tuft_op_seconds_count", ("create_model", "done")] == 1
        assert seen["tuft_engine_seconds_count", ("optim_step",)] == 2
        assert seen["tuft_journal_append_seconds_count", ()] > 5
        assert seen["tuft_queued_ops", ("tuft/demo",)] == 3
        assert seen["tuft_resident_adapters", ("tuft/demo",)] == 1
        assert seen["tuft_runs", ("ready",)] == 1
        assert seen["tuft_requests_total", ("optim_step", "200")] == 5
        assert seen["tuft_ready", ()] == 1
        assert seen["tuft_engine_busy_seconds_total", ("bob",)] > 0
        assert seen["process_resident_memory_bytes", ()] > 1e6
        assert ("tuft_loop_lag_seconds_count", ()) in seen

    on_server(tmp_path, body)


def test_what_a_tenant_used_counts_on_when_its_runs_leave_the_record(tmp_path: Path) -> None:
    """A counter that falls would be taken for one of a new server, and all of it for used just now."""
    names = ("tuft_trained_tokens_total", "tuft_engine_busy_seconds_total")

    async def before(server: Server) -> None:
        ledger, run = server.host.ledger, await server.new_run(BOB_KEY)
        over = await server.post("/unload_model", {"model_id": run}, BOB_KEY)
        await server.post("/retrieve_future", {"request_id": over["request_id"]}, BOB_KEY)
        ledger.state.runs[run].tokens = 5
        used = [(await scraped(server))[name, ("bob",)] for name in names]
        assert min(used) > 0
        await ledger.record("forgotten", "bob", {"runs": [run], "samplers": [], "sessions": []})
        assert [(await scraped(server))[name, ("bob",)] for name in names] == used
        await ledger.compact()

    async def after(server: Server) -> None:
        assert (await scraped(server))[names[0], ("bob",)] == 5

    on_server(tmp_path, before)
    on_server(tmp_path, after)


UNITS = ("_seconds", "_bytes")
COUNTED = (
    "_ops",
    "_adapters",
    "_runs",
    "_subscribers",
    "_flight",
    "_ready",
    "_requests",
    "_events",
    "_tokens",
)
"""Ends of the names of numbers without a unit: things that are counted, and yes or no."""
PAGE = Path(__file__).parents[2] / "docs" / "observability.md"


def test_metrics_are_named_as_prometheus_wants_and_documented(tmp_path: Path) -> None:
    """S1-69: base units at the end, counters in `_total`, a help text for each, no other labels than the page names."""

    async def body(server: Server) -> None:
        run = await server.new_run(BOB_KEY)
        promise = await server.post("/optim_step", step(run, 1), BOB_KEY)
        await server.post("/retrieve_future", {"request_id": promise["request_id"]}, BOB_KEY)
        await server.post("/telemetry", {"events": [{"event": "SESSION_START", "severity": "INFO"}]}, BOB_KEY)
        text = (await server.ask("GET", "/tuft/metrics")).body.decode()
        families = [  # the rest is of the library itself
            family
            for family in text_string_to_metric_families(text)
            if not family.name.startswith("process_") and not family.name.endswith("_created")
        ]
        page = dict(re.findall(r"^\| `(tuft_\w+)` \| (\w+ \| .*?) \|", PAGE.read_text(), re.MULTILINE))
        shown = {}
        for family in families:
            name = family.name + ("_total" if family.type == "counter" else "")
            assert re.fullmatch(r"tuft(_[a-z]+)+", family.name), family.name
            assert family.name.endswith(UNITS + COUNTED), family.name
            assert family.documentation, family.name
            labels = {
                key for sample in family.samples for key in sample.labels if key not in ("le", "tenant")
            }
            kind, _, told = page[name].partition(" | ")
            assert kind == family.type, name
            assert labels <= set(re.findall(r"\w+", told)), name
            shown[name] = family
        assert shown.keys() == page.keys()

    on_server(tmp_path, body)


def test_metrics_are_for_the_operator_alone(tmp_path: Path) -> None:
    """T4: usage names tenants."""

    async def body(server: Server) -> None:
        assert "admins" in refusal(await server.ask("GET", "/tuft/metrics", key=BOB_KEY))
        assert (await server.ask("GET", "/tuft/metrics", key=None)).code == 401

    on_server(tmp_path, body)


def test_a_jupyter_server_has_its_metrics_where_scrapers_look(alice: JupyterServer) -> None:
    """S1-69: `/tuft/metrics`, beside Jupyter's own `/metrics`."""
    import urllib.request

    ask(f"{alice.url}tuft", "sessions", key_of(alice.work))  # answered once the journal was read
    request = urllib.request.Request(f"{alice.url}tuft/metrics")
    request.add_header("Authorization", f"Bearer {key_of(alice.work)}")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        assert b"tuft_ready 1.0" in answer.read()


def test_alive_is_not_ready(tmp_path: Path) -> None:
    """M10: a server that cannot answer yet says so, and why to those who may know."""

    async def scenario() -> None:
        server = Server(tmp_path)  # not started: the journal is not read
        assert (await server.ask("GET", "/healthz", key=None)).code == 200
        answer = await server.ask("GET", "/readyz", key=None)
        assert answer.code == 503
        assert json.loads(answer.body) == {"status": "waiting"}
        assert server.host.status(server.host.owner)["waiting_for"] == "reading the journal"
        await server.host.start()
        assert (await server.ask("GET", "/readyz", key=None)).code == 200
        server.http.stop()
        await server.host.stop()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_every_answer_names_its_request_and_the_log_does_too(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        given = await server.ask("GET", "/sessions", headers={"X-Request-Id": "abc-1"})
        assert given.headers["X-Request-Id"] == "abc-1"
        for strange in ("a b", "x" * 65, "{}\t", 'a"b'):
            made = await server.ask("GET", "/sessions", headers={"X-Request-Id": strange})
            assert made.headers["X-Request-Id"] != strange
            assert len(made.headers["X-Request-Id"]) == 16

    on_server(tmp_path, body)


def test_a_json_log_is_one_object_a_line_whatever_is_logged() -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.addFilter(logs.Named())
    handler.setFormatter(logs.Json())
    logger = logging.getLogger("tuft_jupyter.test")
    logger.addHandler(handler)
    logs.begin_request("abc-1")
    logger.warning('two\nlines and "quotes" of %s', "a run")
    try:
        raise UserError("wrong")
    except UserError:
        logger.exception("it failed")
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["level"] for line in lines] == ["warning", "error"]
    assert lines[0]["message"] == 'two\nlines and "quotes" of a run'
    assert {line["request_id"] for line in lines} == {"abc-1"}
    assert "UserError: wrong" in lines[1]["traceback"]


def test_asking_a_jupyter_server_for_readiness_needs_no_key(alice: JupyterServer) -> None:
    ask(f"{alice.url}tuft", "sessions", key_of(alice.work))  # answered once the journal was read
    assert ask(f"{alice.url}tuft", "readyz", "") == {"status": "ready"}
