"""OpenAI-compatible inference: the stock ``openai`` client on a real server, and access over scripted engines."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tinker
from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream
from tornado.netutil import Resolver
from tornado.tcpclient import TCPClient
from tornado.testing import bind_unused_port
from tornado.web import Application

from examples.run_on_server import Server
from tests.support.live import key_of, sdk
from tests.support.local_engines import LocalEngines
from tests.support.scripted_engine import ScriptedEngines
from tuft_jupyter.config import load_settings
from tuft_jupyter.core import sampling
from tuft_jupyter.core.errors import Overloaded
from tuft_jupyter.core.types import CheckpointKind
from tuft_jupyter_server.host import Host
from tuft_jupyter_server.tinker import openai_handlers

BOB_KEY = "tml-bob"
ROOT = "/tuft/oai/api/v1"
HELLO = [{"role": "user", "content": "What is the capital of France?"}]


# ---- the stock client on a real Jupyter server


@pytest.fixture(scope="module")
def client(alice: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{alice.url}tuft/oai/api/v1", api_key=key_of(alice.work), max_retries=0)


def sampled(server: Server) -> dict[str, int]:
    """Tokens that its owner sampled without a session, by kind, as the usage of the account tells."""
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    query = {
        "starting_on": (hour - timedelta(days=1)).isoformat().replace("+00:00", "Z"),
        "ending_before": (hour + timedelta(hours=1)).isoformat().replace("+00:00", "Z"),
    }
    told = httpx.get(
        f"{server.url}tuft/api/v1/billing/usage/events",
        params=query,
        headers={"X-API-Key": key_of(server.work)},
    ).raise_for_status()
    found: Counter[str] = Counter()
    for event in told.json()["data"]:
        if event["session_id"] is None:
            found[event["event_info"]["type"]] += event["event_info"]["token_count"]
    return dict(found)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_stock_client_chats_and_streams(alice: Server, client: openai.OpenAI) -> None:
    before = sampled(alice)
    asked: dict[str, Any] = {"model": "tuft/demo", "messages": HELLO, "max_tokens": 24, "seed": 3}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert whole.usage is not None
    assert len(choice.logprobs.content) == whole.usage.completion_tokens
    for said in choice.logprobs.content:
        assert len(said.top_logprobs) == 2
        assert said.top_logprobs[0].logprob >= said.logprob - 1e-6
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert len(chunks) > 3
    assert chunks[-1].usage == whole.usage
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == choice.message.content
    assert chunks[-2].choices[0].finish_reason == choice.finish_reason
    after = sampled(alice)
    drawn = {kind: tokens - before.get(kind, 0) for kind, tokens in after.items()}
    assert drawn == {
        "sampling_prefill": 2 * whole.usage.prompt_tokens,
        "sampling_sample": 2 * whole.usage.completion_tokens,
    }


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_adapter_in_training_answers_by_its_path_its_run_and_its_sampler(
    alice: Server, client: openai.OpenAI
) -> None:
    """The same weights through both dialects draw the same tokens with the same log-probabilities."""
    with sdk(f"{alice.url}tuft", key_of(alice.work)) as service:
        training = service.create_lora_training_client("tuft/demo", rank=4)
        path = training.save_weights_for_sampler("now").result().path
        prompt = [101, 42, 37, 102]
        params = tinker.SamplingParams(max_tokens=12, temperature=0.0)
        sampler = training.create_sampling_client(path)
        drawn = sampler.sample(tinker.ModelInput.from_ints(prompt), 1, params).result().sequences[0]
        names = [path, training.model_id]
        assert path in [model.id for model in client.models.list()]
        for name in names:
            answer = client.completions.create(
                model=name, prompt=prompt, max_tokens=12, temperature=0.0, logprobs=0
            ).choices[0]
            assert answer.logprobs is not None
            assert answer.logprobs.token_logprobs == pytest.approx(drawn.logprobs, abs=1e-4)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=path + "x", prompt="a")


@pytest.mark.timeout(240)
def test_the_lab_streams_with_jupyters_own_login_and_xsrf(alice: Server) -> None:
    """The panel's playground: cookies of the notebook server, no key; refused without them, or from elsewhere."""

    async def scenario() -> None:
        http = AsyncHTTPClient(force_instance=True)
        address = f"{alice.url}tuft/lab/oai/chat/completions"
        body = json.dumps({"model": "tuft/demo", "messages": HELLO, "max_tokens": 4, "stream": True})
        login = {"Authorization": f"token {alice.token}"}
        for headers in ({}, {"X-API-Key": key_of(alice.work)}):
            refused = await http.fetch(address, method="POST", body=body, headers=headers, raise_error=False)
            assert refused.code == 403
        answer = await http.fetch(address, method="POST", body=body, headers=login, request_timeout=200)
        assert answer.headers["Content-Type"] == "text/event-stream"
        events = answer.body.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert json.loads(events[0].removeprefix("data: "))["object"] == "chat.completion.chunk"
        listed = await http.fetch(f"{alice.url}tuft/lab/oai/models", headers=login)
        assert "tuft/demo" in listed.body.decode()

    asyncio.run(scenario())


# ---- access, over scripted engines


class Scripted:
    """Two tenants on a host with scripted engines."""

    def __init__(self, home: Path, engines: Any = None, **overrides: Any) -> None:
        given = {"authorized_users": {BOB_KEY: "bob"}, **overrides}
        settings = load_settings(None, {"TUFT_HOME": str(home)}, given)
        self.engines = engines or ScriptedEngines()
        self.host = Host(settings, engines=self.engines)
        self.http = HTTPServer(Application(openai_handlers(ROOT, self.host.api, self.host.keys, 2**22)))
        socket, self.port = bind_unused_port()
        self.http.add_socket(socket)
        self.client = AsyncHTTPClient(force_instance=True)

    async def ask(self, path: str, body: Any = None, **headers: str) -> HTTPResponse:
        return await self.client.fetch(
            f"http://127.0.0.1:{self.port}{ROOT}{path}",
            method="GET" if body is None else "POST",
            body=None if body is None else json.dumps(body),
            headers={name.replace("_", "-"): value for name, value in headers.items()},
            raise_error=False,
        )

    async def checkpoint(self, tenant: str, *, public: bool = False) -> str:
        """A saved adapter of a tenant's; returns its path."""
        state = self.host.ledger.state
        session = await self.host.service.sessions.open(self.principal(tenant), {"tags": []})
        run = f"{session}:train:0"
        saved = self.host.service.checkpoints.plan(
            run, CheckpointKind.SAMPLER, "w", ttl=None, overwrite=True, user_metadata=None
        )
        Path(saved["directory"]).mkdir(parents=True)  # noqa: ASYNC240 - one directory
        data = {
            "run": run,
            "step": 1,
            "args": {"session": session, "base_model": "tuft/demo", "lora": {"rank": 8, "seed": 1}},
            "facts": {"checkpoint": saved, "size_bytes": 1},
            "source": "",
        }
        await self.host.ledger.record("weights_copied", tenant, data)
        if public:
            change = {"path": saved["path"], "public": True}
            await self.host.ledger.record("checkpoint_changed", tenant, change)
        assert saved["path"] in state.checkpoints
        return str(saved["path"])

    def principal(self, tenant: str) -> Any:
        return self.host.keys.principal({"bob": BOB_KEY}.get(tenant, self.host.key))


def scripted(tmp_path: Path, body: Any, engines: Any = None, **overrides: Any) -> None:
    async def scenario() -> None:
        server = Scripted(tmp_path, engines, **overrides)
        await server.host.start()
        try:
            async with asyncio.timeout(30):
                await body(server)
        finally:
            server.http.stop()
            await server.host.stop()

    asyncio.run(scenario())


def refusal(response: HTTPResponse, status: int) -> str:
    assert response.code == status
    error = json.loads(response.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


def test_only_a_key_opens_any_of_the_routes(tmp_path: Path) -> None:
    async def body(server: Scripted) -> None:
        asked = {"model": "tuft/demo", "prompt": "a"}
        for path, sent in [("/models", None), ("/models/tuft%2Fdemo", None), ("/completions", asked)]:
            refusal(await server.ask(path, sent), 401)
            refusal(await server.ask(path, sent, X_API_Key="tml-wrong"), 403)
            assert (await server.ask(path, sent, X_API_Key=BOB_KEY)).code == 200
            assert (await server.ask(path, sent, Authorization=f"Bearer {BOB_KEY}")).code == 200
        assert "no such path" in refusal(await server.ask("/embeddings", {}, X_API_Key=BOB_KEY), 404)
        assert "answers POST" in refusal(await server.ask("/completions", None, X_API_Key=BOB_KEY), 400)

    scripted(tmp_path, body)


def test_nobody_samples_what_is_somebody_elses(tmp_path: Path) -> None:
    """T8, M2: a path, a run and a sampler of another tenant look missing; published weights are everybody's."""

    async def body(server: Scripted) -> None:
        private = await server.checkpoint("owner")
        shared = await server.checkpoint("owner", public=True)
        own = await server.checkpoint("bob")
        run = private.split("/")[2]
        missing = "tinker://nobody:train:0/sampler_weights/w"
        for name in (private, missing, run, run.replace("train", "sample")):
            for path in ("/completions", "/chat/completions"):
                answer = await server.ask(path, {"model": name, "prompt": "a"}, X_API_Key=BOB_KEY)
                assert "does not exist, or belongs to somebody else" in refusal(answer, 404)
        for name in (shared, own, own.split("/")[2]):
            answer = await server.ask("/completions", {"model": name, "prompt": "a"}, X_API_Key=BOB_KEY)
            assert answer.code == 200
        listed = json.loads((await server.ask("/models", X_API_Key=BOB_KEY)).body)["data"]
        assert [model["id"] for model in listed] == ["tuft/demo", own]
        for name in (
            "tuft/demo",
            "tuft%2Fdemo",
            own,
            own.replace("/", "%2F"),
        ):  # not every client encodes a slash
            found = await server.ask(f"/models/{name}", X_API_Key=BOB_KEY)
            assert json.loads(found.body)["id"] == name.replace("%2F", "/")

    scripted(tmp_path, body)


def test_a_client_that_goes_away_stops_the_drawing(tmp_path: Path) -> None:
    """L4: the sample of a closed connection is cancelled, streamed or not."""

    async def body(server: Scripted) -> None:
        sampler = server.engines.sampler
        for stream in (True, False):
            before = sampler.closed
            connection = await hanging(server, stream=stream)
            if stream:
                await connection.read_until(b"data: ")
            connection.close()
            while sampler.closed == before:  # noqa: ASYNC110 - a plain number
                await asyncio.sleep(0.001)

    scripted(tmp_path, body)


async def hanging(server: Scripted, *, stream: bool) -> IOStream:
    """A connection on which Bob has asked for what is drawn until he goes."""
    connection = await TCPClient(resolver=Resolver()).connect("127.0.0.1", server.port)
    sent = json.dumps({"model": "tuft/demo", "prompt": "a", "stream": stream, "user": "hang"})
    head = f"POST {ROOT}/completions HTTP/1.1\r\nHost: x\r\nX-API-Key: {BOB_KEY}\r\n"
    await connection.write(f"{head}Content-Length: {len(sent)}\r\n\r\n{sent}".encode())
    return connection


def test_a_dead_worker_is_replaced_before_the_first_chunk(tmp_path: Path) -> None:
    async def body(server: Scripted) -> None:
        asked = {"model": "tuft/demo", "prompt": "a"}
        server.engines.sampler.dies = 1
        assert (await server.ask("/completions", asked, X_API_Key=BOB_KEY)).code == 200
        server.engines.sampler.dies = 2
        assert "died" in refusal(await server.ask("/completions", asked, X_API_Key=BOB_KEY), 500)

    scripted(tmp_path, body)


def test_a_tenant_with_too_much_under_way_is_told_to_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L6: samples and texts share one limit; room is left as soon as a client goes."""
    monkeypatch.setattr(sampling, "WAITING", 1)

    async def body(server: Scripted) -> None:
        asked = {"model": "tuft/demo", "prompt": "a"}
        connection = await hanging(server, stream=False)
        while not server.host.service.sampling._count:  # noqa: ASYNC110 - a plain number
            await asyncio.sleep(0.001)
        refused = await server.ask("/completions", asked, X_API_Key=BOB_KEY)
        assert "wait for results" in refusal(refused, 429)
        assert refused.headers["Retry-After"] == "1"
        assert (await server.ask("/completions", asked, X_API_Key=server.host.key)).code == 200
        connection.close()
        while server.host.service.sampling._count:  # noqa: ASYNC110 - a plain number
            await asyncio.sleep(0.001)
        assert (await server.ask("/completions", asked, X_API_Key=BOB_KEY)).code == 200

    scripted(tmp_path, body)


def test_a_tenant_may_not_send_more_tokens_at_once_here_than_anywhere(tmp_path: Path) -> None:
    """S2-44: counted as the model's tokenizer counts, over all prompts of a request; with the limit and the way out."""

    async def body(server: Scripted) -> None:
        async def said(path: str, **asked: Any) -> HTTPResponse:
            return await server.ask(path, {"model": "tuft/demo", "max_tokens": 1, **asked}, X_API_Key=BOB_KEY)

        for path, asked, tokens in (
            ("/completions", {"prompt": [1] * 41}, "41"),
            ("/completions", {"prompt": [[1] * 20, [2] * 21]}, "41"),
            ("/completions", {"prompt": "a word " * 60, "stream": True}, r"\d+"),
            ("/chat/completions", {"messages": [{"role": "user", "content": "a word " * 60}]}, r"\d+"),
        ):
            told = refusal(await said(path, **asked), 400)
            assert re.search(rf"Input tokens \({tokens}\) exceed maximum allowed \(40\): send fewer", told), (
                told
            )
        assert (await said("/completions", prompt=[1] * 40)).code == 200

    scripted(tmp_path, body, LocalEngines(), max_input_tokens=40)


def test_a_tenants_rates_hold_here_too(tmp_path: Path) -> None:
    """S2-42: 429 with the time to come back; requests and tokens of all its APIs are one account."""

    async def body(server: Scripted) -> None:
        asked = {"model": "tuft/demo", "prompt": "x" * 4000}
        answers = [await server.ask("/completions", asked, X_API_Key=BOB_KEY) for _ in range(2)]
        assert [answer.code for answer in answers] == [200, 429]
        assert int(answers[1].headers["Retry-After"]) >= 1
        assert "tokens a second" in refusal(answers[1], 429)
        with pytest.raises(Overloaded):
            await server.host.service.quotas.pace("bob", 1, 100)
        assert (await server.ask("/completions", asked, X_API_Key=server.host.key)).code == 200

    scripted(tmp_path, body, tps_limit=50)
