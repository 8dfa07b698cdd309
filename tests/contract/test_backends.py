"""Training and sampling elsewhere, through our HTTP handlers: what is served, what is refused, and what is shown."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.http_server import Server, on_server, refusal
from tests.support.stub_vllm import StubVllm
from tuft_jupyter.config.backends import BackendsConfig
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.engine.remote import http
from tuft_jupyter.kernel.report import status_table
from tuft_jupyter.wire import tuft_wire_pb2 as pb

SAMPLE = {"num_samples": 1, "prompt": {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]}}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "PROBE_SECONDS", 0.05)


async def sampled(server: Server, **more: Any) -> Any:
    """The answer to a sample of the base model: parsed, or the error of the promise."""
    session = (await server.post("/create_session", {}))["session_id"]
    opened = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tuft/demo"}
    sampler = (await server.post("/create_sampling_session", opened))["sampling_session_id"]
    params = {"max_tokens": 2, "temperature": 0.0}
    asked = {**SAMPLE, "sampling_session_id": sampler, "seq_id": 0, "sampling_params": params, **more}
    promise = await server.post("/asample", asked)
    while True:
        reply = await server.ask("POST", "/retrieve_future", {"request_id": promise["request_id"]})
        if reply.code != 408:
            break
    if "protobuf" in reply.headers["Content-Type"]:
        answer = pb.SampleResponse.FromString(reply.body)
        return [np.frombuffer(each.tokens, "<i4").tolist() for each in answer.sequences]
    return json.loads(reply.body)


async def offered(server: Server) -> tuple[bool, bool]:
    """Whether the model is said to be trained and sampled from here."""
    told = json.loads((await server.ask("GET", "/get_server_capabilities")).body)
    (model,) = told["supported_models"]
    return model["trainable"], model["sampleable"]


async def healthy(server: Server) -> bool:
    return (await server.ask("GET", "/healthz")).code == 200


def test_a_server_without_training_samples_and_says_how_to_train(tmp_path: Path) -> None:
    """S4-06, S4-07, S4-34: create_model, forward_backward and optim_step fail at once; HTTP stays healthy."""
    runs: list[str] = []

    async def before(server: Server) -> None:
        runs.append(await server.new_run())

    async def check(server: Server) -> None:
        assert await sampled(server) == [[3, 3]]
        session = (await server.post("/create_session", {}))["session_id"]
        made = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "tuft/demo",
            "lora_config": {"rank": 8},
        }
        datum = {
            "model_input": {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}]},
            "loss_fn_inputs": {"target_tokens": {"data": [2, 3], "dtype": "int64", "shape": [2]}},
        }
        given = {"data": [datum], "loss_fn": "cross_entropy"}
        of_run = {"model_id": runs[0], "seq_id": 1}
        for path, body in (
            ("/create_model", made),
            ("/forward_backward", {**of_run, "forward_backward_input": given}),
            ("/optim_step", {**of_run, "adam_params": {"learning_rate": 0.1}}),
        ):
            reply = await server.ask("POST", path, body, headers={"Content-Type": "application/json"})
            assert reply.code == 400, (path, reply.body)
            assert json.loads(reply.body)["category"] == "user"
            assert "Training not supported in non-Megatron mode" in refusal(reply)
            assert "no training backend" in refusal(reply)
        assert await offered(server) == (False, True)
        assert await healthy(server)

    on_server(tmp_path, before)
    with StubVllm() as stub:
        on_server(tmp_path, check, backends=BackendsConfig("none", "external", vllm_url=stub.url))


def test_without_any_sampling_backend_a_sample_fails_with_both_ways_out(tmp_path: Path) -> None:
    """S4-31, S4-33."""

    async def check(server: Server) -> None:
        failed = await sampled(server)
        assert failed["category"] == "user"
        for part in ("No valid sampling backend configured", "USE_VLLM=true", "USE_MEGATRON=true"):
            assert part in failed["error"]
        assert await healthy(server)

        assert await offered(server) == (False, False)

    on_server(tmp_path, check, backends=BackendsConfig("none", "none"))


def test_a_vllm_server_that_is_down_fails_a_sample_in_seconds_and_nothing_else(tmp_path: Path) -> None:
    """S4-35: the phrase, the URL tried, the curl line, within ten seconds."""

    async def check(server: Server) -> None:
        began = time.monotonic()
        failed = await sampled(server)
        assert time.monotonic() - began < 10
        assert failed["category"] == "user"
        url = server.host.settings.backends.vllm_url
        for part in ("vLLM server can't be reached", url, f"curl {url}/health/"):
            assert part in failed["error"]
        assert await healthy(server)
        assert await server.new_run(), "training goes on in our own workers"

    with StubVllm() as stub:
        url = stub.url
    on_server(tmp_path, check, backends=BackendsConfig("peft", "external", vllm_url=url))


def test_a_server_started_before_its_backend_shows_it_unreachable_then_healthy(tmp_path: Path) -> None:
    """S4-03: no restart; and the same once more when the backend goes and comes back."""
    stub = StubVllm()
    stub.begin()
    stub.end()

    async def shown(server: Server, state: str) -> dict[str, Any]:
        while True:
            status = json.loads((await server.ask("GET", "/tuft/status")).body)
            (backend,) = status["servers"]
            if backend["state"] == state:
                return status
            await asyncio.sleep(0.01)

    async def check(server: Server) -> None:
        status = await shown(server, "unreachable")
        assert status["servers"][0]["url"] == stub.url
        assert any("can't be reached" in note for note in status["notes"])
        told = repr(status_table("http://here", "a test", status, owned=False))
        assert f"vLLM server at {stub.url}: unreachable" in told
        assert "can't be reached" in (await sampled(server))["error"]
        for _ in range(2):
            stub.begin()
            status = await shown(server, "reachable")
            assert not status["notes"]
            assert {model["state"] for model in status["models"]} <= {"idle", "ready"}
            assert await sampled(server) == [[3, 3]]
            stub.end()
            await shown(server, "unreachable")

    on_server(tmp_path, check, backends=BackendsConfig("peft", "external", vllm_url=stub.url))


def test_a_rank_that_vllm_cannot_sample_is_refused_when_the_run_is_made(tmp_path: Path) -> None:
    """S4-19: at create, not at the first sample."""

    async def check(server: Server) -> None:
        session = (await server.post("/create_session", {}))["session_id"]
        made = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "tuft/demo",
            "lora_config": {"rank": 65},
        }
        assert "65 is outside 1..64" in refusal(await server.ask("POST", "/create_model", made))

    with StubVllm() as stub:
        given = {"supported_models": [{"model_name": "tuft/demo", "max_lora_rank": 128}]}
        on_server(tmp_path, check, backends=BackendsConfig("peft", "external", vllm_url=stub.url), **given)


def test_with_nothing_configured_nothing_is_in_between(tmp_path: Path) -> None:
    """X10: no connection, no note, our own engines as they were made."""

    async def check(server: Server) -> None:
        assert await offered(server) == (True, True)
        status = json.loads((await server.ask("GET", "/tuft/status")).body)
        assert status["servers"] == []
        assert server.host.service.engines is server.host.engines

    on_server(tmp_path, check)


def test_our_own_vllm_gets_what_the_environment_says(tmp_path: Path) -> None:
    """S4-01, S4-09, S4-16, S4-17, S4-18, X9: the fraction, the adapters, whether there are any."""
    from tuft_jupyter import models
    from tuft_jupyter.config import load_settings
    from tuft_jupyter.engine.ray_engines import RayEngines

    def told(**env: str) -> tuple[str, Any]:
        settings = load_settings(None, {"TUFT_HOME": str(tmp_path), **env})
        made: Any = RayEngines(settings).sampling(models.resolve("tuft/demo"))
        return made._asked, made._options.vllm

    asked, vllm = told()
    assert (asked, vllm.gpu_memory, vllm.enable_lora) == ("auto", 0.4, True)
    asked, vllm = told(USE_VLLM="true")
    assert (asked, vllm.gpu_memory, vllm.max_loras) == ("vllm", 0.2, 4)
    given = {"VLLM_GPU_MEMORY_UTIL": "0.05", "VLLM_MAX_LORAS": "2", "VLLM_ENABLE_LORA": "false"}
    _, vllm = told(USE_VLLM="true", **given)
    assert (vllm.gpu_memory, vllm.max_loras, vllm.enable_lora) == (0.05, 2, False)
    assert told(USE_VLLM="false")[0] == "torch"


def test_an_engine_that_nobody_serves_is_refused_with_its_reason(tmp_path: Path) -> None:
    async def check(server: Server) -> None:
        (card, *_) = server.host.service.catalog.cards()
        with pytest.raises(UserError, match="no training backend"):
            server.host.elsewhere.training(card)

    on_server(tmp_path, check, backends=BackendsConfig("none", "torch"))
