"""The Tinker routes over real HTTP: access, error shape, sizes and bad input, for every row of the table."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.support.fuzz_cases import LOSS
from tests.support.http_server import BOB_KEY, ROOT, Server, filled, on_server, refusal
from tuft_jupyter.config import ModelSettings
from tuft_jupyter.core.loss_graph import from_id
from tuft_jupyter.core.promises import Answer
from tuft_jupyter.core.types import JSON, PROTOBUF, SAMPLED
from tuft_jupyter.core.views import state_view
from tuft_jupyter.wire import tuft_wire_pb2 as pb
from tuft_jupyter.wire.routes import ROUTES, Access


def test_every_route_refuses_no_key_with_401_and_a_wrong_one_with_403(tmp_path: Path) -> None:
    """S1-24, T1, M5: no route is forgotten, because the table is the test's list too."""

    async def body(server: Server) -> None:
        for method, path in [(r.method, r.path) for r in ROUTES if r.access is Access.KEY]:
            for key, code in ((None, 401), ("tml-wrong", 403)):
                response = await server.ask(method, filled(path), key=key)
                assert response.code == code, (method, path, key)
                refusal(response)
                assert "Set-Cookie" not in response.headers
        cookie = {"Cookie": "username-127-0-0-1=alice; _xsrf=x"}
        assert (await server.ask("GET", "/sessions", key=None, headers=cookie)).code == 401
        assert json.loads((await server.ask("GET", "/healthz", key=None)).body)["status"] == "ok"

    on_server(tmp_path, body)


def test_any_configured_key_opens_and_our_own_are_such_that_the_sdk_takes_them(tmp_path: Path) -> None:
    """X2, S1-31: TuFT's own example key over raw HTTP, and one that we make."""

    async def body(server: Server) -> None:
        made = (await server.post("/tuft/keys", {"tenant": "carol"}))["key"]
        assert made.startswith("tml-")
        assert server.host.key.startswith("tml-")
        for key in ("local-dev-key", made):
            assert (await server.ask("GET", "/sessions", key=key)).code == 200
        assert (await server.ask("GET", "/sessions", key="local-dev-keY")).code == 403

    on_server(tmp_path, body, authorized_users={"local-dev-key": "dev"})


def test_the_seed_of_a_toy_engine_is_accepted_and_said_to_do_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """S1-23."""
    with caplog.at_level("INFO", "tuft_jupyter"):
        Server(tmp_path, toy_backend_seed=7).http.stop()
    assert "toy_backend_seed is read and has no effect" in caplog.text


def test_a_path_that_is_none_says_so_and_is_not_retried(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        for method, path in (("GET", "/nowhere"), ("POST", "/create_model/x"), ("DELETE", "/create_model")):
            refusal(await server.ask(method, path))

    on_server(tmp_path, body)


def test_graphs_of_losses_are_not_taken_unless_the_operator_says_so(tmp_path: Path) -> None:
    """H9: the SDK is told beforehand, and runs them on its own side; who sends one anyway is told the setting."""

    async def off(server: Server) -> None:
        session = (await server.post("/create_session", {}))["session_id"]
        assert (await server.post("/client/config", {}))["custom_loss_server_side"] is False
        response = await server.ask("POST", "/create_custom_loss", {"session_id": session, **LOSS})
        assert response.code == 404
        assert "custom_loss_server_side" in refusal(response)

    async def on(server: Server) -> None:
        session = (await server.post("/create_session", {}))["session_id"]
        assert (await server.post("/client/config", {}))["custom_loss_server_side"] is True
        asked = {"session_id": session, **LOSS}
        promise = await server.post("/create_custom_loss", asked)
        answer = await server.post("/retrieve_future", promise)
        assert from_id(answer["loss_id"]).id == answer["loss_id"]
        for wrong, words in (
            ({"graph": {"format": 2, "nodes": []}}, "graph.format"),
            ({"graph": {"nodes": []}}, "graph.nodes"),
            ({"inputs": [{"name": "logprobs", "rank": 7}]}, "rank"),
        ):
            assert words in refusal(await server.ask("POST", "/create_custom_loss", {**asked, **wrong}))

    on_server(tmp_path / "off", off)
    on_server(tmp_path / "on", on, custom_loss_server_side=True)


BAD = [
    ("/create_model", {"base_model": "no/such"}, "no/such.*Supported models: tuft/demo"),
    ("/create_model", {"lora_config": {"rank": 999}}, r"rank: 999 is outside 1\.\.64"),
    ("/create_model", {"lora_config": {"rank": 0}}, "rank: 0 is outside"),
    ("/create_model", {"lora_config": {"rank": "8"}}, "lora_config.rank"),
    ("/create_model", {"session_id": "nope"}, "session 'nope' does not exist"),
    ("/create_model", {"optimizer_config": {"type": "dimuon"}}, "dimuon"),
    ("/optim_step", {"adam_params": {"learning_rate": -1}}, "learning_rate: -1.0 must be"),
    ("/optim_step", b'{"model_id": "RUN", "adam_params": {"learning_rate": NaN}}', "not JSON"),
    ("/optim_step", b'{"model_id": "RUN", "adam_params": {"learning_rate": 1e999}}', "learning_rate"),
    ("/optim_step", {"adam_params": {"beta1": 1.5}}, "beta1: 1.5 must be"),
    ("/optim_step", {"optimizer_params": {"type": "dimuon"}}, "dimuon"),
    ("/optim_step", {"model_id": "x:train:0"}, "does not exist"),
    ("/save_weights", {"path": "../../etc/passwd"}, "is not a checkpoint name"),
    ("/save_weights", {"ttl_seconds": -5}, "ttl_seconds: -5"),
    ("/load_weights", {"path": "/etc/passwd"}, "no checkpoint path"),
    ("/load_weights", {"path": "tinker://x:train:0/weights/y"}, "does not exist"),
    (
        "/load_weights",
        {"path": "tinker://x/weights/y", "model_id": None, "session_id": None},
        "give model_id, or",
    ),
    ("/create_sampling_session", {"model_path": None, "base_model": None}, "base_model or model_path"),
    ("/asample", {"sampling_session_id": "x"}, "sampler 'x' does not exist"),
    ("/asample", {"num_samples": 10**6}, "num_samples: 1000000 is outside"),
    ("/retrieve_future", {"request_id": "x"}, "not known here"),
    ("/forward_backward", b"\xff\xff\xff", "protobuf|truncated|malformed"),
    ("/forward_backward", b"", "model_id|no datum|data"),
    ("/create_session", b"{", "not JSON"),
    ("/create_session", b"[" * 100_000, "not JSON|request body"),
    ("/create_session", {"tags": "x"}, "tags"),
]


@pytest.mark.parametrize(
    ("path", "change", "said"), BAD, ids=[f"{p[1:]}-{i}" for i, (p, _, _) in enumerate(BAD)]
)
def test_bad_input_is_refused_at_once_by_name(tmp_path: Path, path: str, change: Any, said: str) -> None:
    """S1-34: a 4xx that names the field and the way out; nothing is disturbed."""

    async def body(server: Server) -> None:
        run = await server.new_run()
        good = {
            "session_id": run.split(":")[0],
            "model_seq_id": 3,
            "sampling_session_seq_id": 3,
            "base_model": "tuft/demo",
            "lora_config": {"rank": 8},
            "model_id": run,
            "seq_id": 5,
            "path": "tinker://x/weights/y" if path == "/load_weights" else "name",
            "sampling_session_id": "x",
        }
        before = state_view(server.host.ledger.state)
        asked = change.replace(b"RUN", run.encode()) if isinstance(change, bytes) else {**good, **change}
        headers = {"Content-Type": "application/x-protobuf"} if path == "/forward_backward" else {}
        detail = refusal(await server.ask("POST", path, asked, headers=headers))
        assert re.search(said, detail), detail
        assert state_view(server.host.ledger.state) == before
        assert await server.new_run() != run

    on_server(tmp_path, body)


def test_a_checkpoint_of_another_base_model_is_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    """S1-34, S1-21: at once, with both models' names and the way out; both are offered."""

    async def body(server: Server) -> None:
        async def done(verb: str, **asked: Any) -> None:
            promise = await server.post(verb, asked)
            told = await server.post("/retrieve_future", {"request_id": promise["request_id"]})
            assert "error" not in told

        run = await server.new_run()
        session = run.split(":")[0]
        await done("/save_weights", model_id=run, path="n", seq_id=1)
        other = {"session_id": session, "model_seq_id": 1, "base_model": "other"}
        await done("/create_model", **other, lora_config={"rank": 8})
        offered = json.loads((await server.ask("GET", "/get_server_capabilities")).body)["supported_models"]
        assert [model["model_name"] for model in offered] == ["tuft/demo", "other"]
        before = state_view(server.host.ledger.state)
        asked = {"model_id": f"{session}:train:1", "path": f"tinker://{run}/weights/n", "seq_id": 1}
        told = refusal(await server.ask("POST", "/load_weights", asked))
        assert (
            "trained on tuft/demo, this model on other: create a training client from the checkpoint" in told
        )
        assert state_view(server.host.ledger.state) == before

    models = [ModelSettings("tuft/demo"), ModelSettings("other", model_path="tuft/demo")]
    on_server(tmp_path, body, supported_models=models)


def test_a_body_over_the_limit_is_refused_with_413_also_when_it_is_compressed(tmp_path: Path) -> None:
    """H3: a bomb is not unpacked further than the limit."""

    async def body(server: Server) -> None:
        response = await server.ask("POST", "/create_session", b"x" * (2**20 + 1))
        assert response.code == 413
        assert "limit of /create_session is 1048576" in refusal(response)
        bomb = zstandard.compress(b"\0" * 2**28)
        response = await server.ask("POST", "/forward_backward", bomb, headers={"Content-Encoding": "zstd"})
        assert response.code == 413
        refusal(response)
        response = await server.ask(
            "POST", "/forward_backward", b"junk", headers={"Content-Encoding": "zstd"}
        )
        assert "zstd" in refusal(response)
        response = await server.ask(
            "POST", "/forward_backward", b"junk", headers={"Content-Encoding": "gzip"}
        )
        assert response.code == 415

    on_server(tmp_path, body)


def test_a_client_that_goes_away_while_it_waits_leaves_nothing_behind(tmp_path: Path) -> None:
    """L4: its op goes on, and the answer can still be fetched."""

    async def body(server: Server) -> None:
        run = await server.new_run()
        promise = server.host.ledger.promises.open("slow", server.host.owner.tenant, run)
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        text = b'{"request_id": "slow"}'
        head = f"POST {ROOT}/retrieve_future HTTP/1.1\r\nHost: x\r\nX-API-Key: {server.host.key}\r\n"
        writer.write(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        while promise.waiters is None:  # noqa: ASYNC110 - the promise itself says when somebody waits
            await asyncio.sleep(0)
        (waiting,) = [t for t in asyncio.all_tasks() if t.get_coro().__qualname__ == "BaseHandler._answer"]
        writer.close()
        await asyncio.wait([waiting], timeout=5)
        assert waiting.cancelled()
        server.host.ledger.promises.settle("slow", Answer(b'{"done": 1}'))
        assert await server.post("/retrieve_future", {"request_id": "slow"}) == {"done": 1}

    on_server(tmp_path, body)


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        (None, SAMPLED),
        ("*/*", SAMPLED),
        ("application/x-protobuf", SAMPLED),
        ("application/x-protobuf, application/json", SAMPLED),
        ("application/json", JSON),
    ],
)
def test_a_sample_comes_in_the_form_that_is_accepted(tmp_path: Path, accept: str | None, form: str) -> None:
    """S1-02: SDKs since 0.18 read protobuf, the ones before JSON; a pass stays as it was asked."""
    sampled = pb.SampleResponse(sequences=[pb.SampledSequence(tokens=b"\5\0\0\0", logprobs=b"\0\0\0\0")])

    async def body(server: Server) -> None:
        promises, owner = server.host.ledger.promises, server.host.owner.tenant
        answers = {"sample": SAMPLED, "pass": PROTOBUF}
        for request_id, content_type in answers.items():
            promises.open(request_id, owner, "")
            promises.settle(request_id, Answer(sampled.SerializeToString(), content_type))
        headers = {} if accept is None else {"Accept": accept}
        got = {
            name: await server.ask("POST", "/retrieve_future", {"request_id": name}, headers=headers)
            for name in answers
        }
        assert got["pass"].headers["Content-Type"] == PROTOBUF
        assert got["sample"].headers["Content-Type"] == form
        if form == JSON:
            sequence = {"stop_reason": "stop", "tokens": [5], "logprobs": [0.0]}
            assert json.loads(got["sample"].body) == {"type": "sample", "sequences": [sequence]}
        else:
            assert got["sample"].body == sampled.SerializeToString()

    on_server(tmp_path, body)


def test_one_poll_tells_which_samples_ended(tmp_path: Path) -> None:
    """retrieve_futures: a cursor that only grows, each end told once, and each answer fetched by its own id."""

    async def body(server: Server) -> None:
        session = (await server.post("/create_session", {}))["session_id"]
        made = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tuft/demo"}
        sampler = (await server.post("/create_sampling_session", made))["sampling_session_id"]
        asked = []
        for seq in (0, 1, 5 * 10**9):
            sample = {"sampling_session_id": sampler, "seq_id": seq, "num_samples": 2}
            promise = await server.post("/asample", sample)
            assert len(set(promise["sample_sequence_ids"])) == 2
            asked.append(promise["request_id"])
        ended: set[str] = set()
        cursor = 0
        while len(ended) < 2:
            poll = {
                "target": {"type": "sampling_session", "sampling_session_id": sampler},
                "prev_cursor": cursor,
            }
            told = await server.post("/retrieve_futures", poll)
            assert told["cursor"] > cursor
            cursor = told["cursor"]
            new = {one["request_id"] for one in told["completions"]}
            assert not new & ended
            assert {one["state"] for one in told["completions"]} == {"finished"}
            ended |= new
        assert ended == set(asked[:2]), "the samples of a clone are another list"
        again = {**poll, "prev_cursor": cursor, "timeout": 0}
        assert await server.post("/retrieve_futures", again) == {"completions": [], "cursor": cursor}
        fetched = await server.ask("POST", "/retrieve_future", {"request_id": asked[0]})
        assert fetched.body == b"base"
        foreign = await server.ask("POST", "/retrieve_futures", poll, BOB_KEY)
        assert "does not exist" in refusal(foreign)

    on_server(tmp_path, body)


def test_the_table_is_served_for_programs_without_a_key(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        answer = await server.ask("GET", "/openapi.json", key=None)
        document = json.loads(answer.body)
        assert document["servers"] == [
            {"url": f"http://127.0.0.1:{server.port}{ROOT.removesuffix('/api/v1')}"}
        ]
        assert server.host.key not in answer.body.decode()
        assert str(tmp_path) not in answer.body.decode()

    on_server(tmp_path, body)


def test_telemetry_is_counted_by_kind_and_its_content_is_nowhere(tmp_path: Path) -> None:
    async def body(server: Server) -> None:
        secret = "/home/somebody/secret.py"
        events = [
            {"event": "SESSION_START", "severity": "INFO", "event_data": {"path": secret}},
            {"event": "UNHANDLED_EXCEPTION", "severity": "ERROR", "traceback": secret},
            {"event": "UNHANDLED_EXCEPTION", "severity": "ERROR", "traceback": secret},
            {"event": secret, "severity": secret},
        ]
        sent = {"events": events, "platform": "Linux", "sdk_version": "0.38.0", "session_id": "s"}
        assert await server.post("/telemetry", sent) == {"status": "accepted"}
        assert await server.post("/telemetry", {}) == {"status": "accepted"}
        series = server.host.service.counters.series()
        counted = {dict(s.labels)["event"]: s.value for s in series if s.name == "sdk_events"}
        assert counted == {"SESSION_START": 1, "UNHANDLED_EXCEPTION": 2, "other": 1}
        assert secret not in repr(series)

    on_server(tmp_path, body)
