"""Sampling on a vLLM server elsewhere, against a small real HTTP server that answers as vLLM does."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.stub_vllm import StubVllm
from tuft_jupyter.config.backends import BackendsConfig
from tuft_jupyter.core.engine import EngineDied, Outcome, Part, TextTask
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import SAMPLED, ModelCard
from tuft_jupyter.engine.remote import http
from tuft_jupyter.engine.remote.http import Server
from tuft_jupyter.engine.remote.vllm_server import KIND, VllmServer
from tuft_jupyter.wire import tuft_wire_pb2 as pb

CARD = ModelCard("tuft/demo", "/models/demo", 256, 64, "Qwen3ForCausalLM")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "TRIES", (0.01, None))


@asynccontextmanager
async def engine(stub: StubVllm, **backends: Any) -> AsyncIterator[VllmServer]:
    config = BackendsConfig(sampling="external", vllm_url=stub.url, **backends)
    made = VllmServer(CARD, Server(KIND, config.vllm_url, config.vllm_key), config, "home")
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


def scenario(body: Callable[[StubVllm], Awaitable[None]], **stub: Any) -> None:
    async def run() -> None:
        with StubVllm(**stub) as server:
            async with asyncio.timeout(30):
                await body(server)

    asyncio.run(run())


def saved(tmp_path: Path, name: str, *modules: str) -> str:
    directory = tmp_path / name
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    (directory / "adapter_config.json").write_text(json.dumps({"target_modules": modules or ["q_proj"]}))
    return str(directory)


def body(prompt: list[int], **more: Any) -> bytes:
    params = {"max_tokens": 3, "temperature": 0.0, **more.pop("sampling_params", {})}
    return json.dumps(
        {"prompt": {"chunks": [{"tokens": prompt}]}, "sampling_params": params, **more}
    ).encode()


def answer(outcome: Outcome) -> pb.SampleResponse:
    assert not outcome.category, outcome.error
    assert outcome.content_type == SAMPLED
    return pb.SampleResponse.FromString(outcome.result)


def tokens(outcome: Outcome) -> list[list[int]]:
    return [np.frombuffer(each.tokens, "<i4").tolist() for each in answer(outcome).sequences]


def test_a_prompt_goes_as_token_ids_and_comes_back_as_a_sample() -> None:
    """S4-06, S4-30: the base model; every number of the protocol's request has its field."""

    async def check(stub: StubVllm) -> None:
        async with engine(stub) as vllm:
            asked = body(
                [1, 2, 3],
                num_samples=2,
                topk_sample_logprobs=2,
                sampling_params={"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 7, "stop": [9, 8]},
            )
            outcome = await vllm.sample("r", None, asked, tenant="alice")
            assert tokens(outcome) == [[3, 3, 3], [4, 4, 4]]
            first = answer(outcome).sequences[0]
            assert np.frombuffer(first.logprobs, "<f4").tolist() == [-0.5] * 3
            assert np.frombuffer(first.topk_sampled_logprobs.token_ids, "<i4").tolist() == [3, 4] * 3
            assert outcome.facts["prompt_tokens"] == 3
            assert outcome.facts["tokens"] == 6
            (sent,) = stub.bodies("/v1/completions")
            expected = {
                "model": "tuft/demo", "prompt": [1, 2, 3], "n": 2, "max_tokens": 3, "temperature": 0.5, "top_p": 0.9,
                "top_k": 5, "stop_token_ids": [9, 8], "ignore_eos": True, "logprobs": 2, "return_token_ids": True,
                "skip_special_tokens": False, "min_p": 0.0, "repetition_penalty": 1.0,
            }  # fmt: skip
            assert {name: sent[name] for name in expected} == expected
            assert 0 <= sent["seed"] < 2**56
            assert "alice" not in sent["cache_salt"]

    scenario(check)


def test_stops_greedy_copies_and_prompt_scores_are_those_of_the_protocol() -> None:
    async def check(stub: StubVllm) -> None:
        async with engine(stub) as vllm:
            asked = body([5, 6], num_samples=3, prompt_logprobs=True, sampling_params={"stop": ["end"]})
            outcome = await vllm.sample("r", None, asked)
            assert tokens(outcome) == [[6, 6, 6]] * 3
            scores = np.frombuffer(answer(outcome).prompt_logprobs, "<f4")
            assert np.isnan(scores[0])
            assert scores[1] == -0.25
            (sent,) = stub.bodies("/v1/completions")
            assert sent["n"] == 1
            assert sent["stop"] == ["end"]
            assert sent["include_stop_str_in_output"] is True
            assert sent["ignore_eos"] is False

    scenario(check)


def test_an_adapter_is_loaded_before_it_is_sampled_and_only_once(tmp_path: Path) -> None:
    """S4-04: the load call, then the completion with that adapter's name."""

    async def check(stub: StubVllm) -> None:
        directory = saved(tmp_path, "a")
        async with engine(stub) as vllm:
            both = await asyncio.gather(*(vllm.sample(f"r{i}", directory, body([1])) for i in range(2)))
            assert [tokens(each) for each in both] == [[[2, 2, 2]]] * 2
            (loaded,) = stub.bodies("/v1/load_lora_adapter")
            assert loaded["lora_path"] == directory
            assert [sent["model"] for sent in stub.bodies("/v1/completions")] == [loaded["lora_name"]] * 2
            assert stub.paths().index("/v1/load_lora_adapter") < stub.paths().index("/v1/completions")

    scenario(check)


def test_every_saved_version_has_a_name_of_its_own(tmp_path: Path) -> None:
    """S4-04: vLLM's prefix cache tells adapters apart by name."""

    async def check(stub: StubVllm) -> None:
        directory = saved(tmp_path, "a")
        async with engine(stub) as vllm:
            await vllm.sample("r", directory, body([1]))
            weights = Path(directory) / "adapter_model.safetensors"
            weights.unlink()
            weights.write_bytes(b"newer weights")
            assert tokens(await vllm.sample("r", directory, body([1]))) == [[3, 3, 3]]
        async with engine(stub) as vllm:
            await vllm.sample("r", directory, body([1]))
        names = [sent["lora_name"] for sent in stub.bodies("/v1/load_lora_adapter")]
        assert len(set(names)) == 3

    scenario(check)


def test_no_more_adapters_are_held_than_configured_and_all_leave_at_the_end(tmp_path: Path) -> None:
    """S4-18, S4-26: the least recently used is unloaded; a stop unloads the rest."""

    async def check(stub: StubVllm) -> None:
        async with engine(stub, max_loras=2) as vllm:
            for name in "abc":
                await vllm.sample("r", saved(tmp_path, name), body([1]))
                assert len(stub.adapters) <= 3
            names = [sent["lora_name"] for sent in stub.bodies("/v1/load_lora_adapter")]
            while len(stub.adapters) > 2:  # noqa: ASYNC110 - the stub is another thread
                await asyncio.sleep(0)
            assert stub.bodies("/v1/unload_lora_adapter") == [{"lora_name": names[0]}]
        assert not stub.adapters

    scenario(check)


def test_adapters_that_were_left_loaded_are_unloaded_at_the_start() -> None:
    async def check(stub: StubVllm) -> None:
        stub.adapters = {"tuft-home-0-1": 1, "tuft-other-0-1": 2}
        async with engine(stub):
            assert list(stub.adapters) == ["tuft-other-0-1"]

    scenario(check)


def test_a_server_that_was_started_anew_is_told_its_adapters_again(tmp_path: Path) -> None:
    """S4-03: what it had loaded is gone with it."""

    async def check(stub: StubVllm) -> None:
        directory = saved(tmp_path, "a")
        async with engine(stub) as vllm:
            await vllm.sample("r", directory, body([1]))
            stub.end()
            stub.begin()
            with pytest.raises(EngineDied, match="does not know its adapters"):
                await vllm.sample("r", directory, body([1]))
            await vllm.start()
            assert not (await vllm.sample("r", directory, body([1]))).category

    scenario(check)


def test_a_connection_that_breaks_is_the_death_of_the_engine() -> None:
    async def check(stub: StubVllm) -> None:
        async with engine(stub) as vllm:
            stub.breaks = 1
            with pytest.raises(EngineDied, match="vLLM server can't be reached"):
                await vllm.sample("r", None, body([1]))
            assert tokens(await vllm.sample("r", None, body([1]))) == [[1, 1, 1]]

    scenario(check)


def test_a_cancelled_request_leaves_the_server() -> None:
    async def check(stub: StubVllm) -> None:
        async with engine(stub) as vllm:
            stub.hold = threading.Event()
            drawing = asyncio.ensure_future(vllm.sample("r", None, body([1])))
            while "/v1/completions" not in stub.paths():  # noqa: ASYNC110 - the stub is another thread
                await asyncio.sleep(0.01)
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)
            stub.hold.set()
            assert await asyncio.to_thread(stub.gone.wait, 10)

    scenario(check)


@pytest.mark.parametrize(
    ("request_body", "message"),
    [
        (body([]), "prompt is empty"),
        (body([99]), "outside the vocabulary"),
        (body([1] * 128), "the context of 128 tokens"),
        (body([1, 2], prompt_alt_tokens_k=1), "set backends.sampling to torch"),
        (b"{", "the sample request is not valid"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_vllm_sees_it(request_body: bytes, message: str) -> None:
    async def check(stub: StubVllm) -> None:
        async with engine(stub) as vllm:
            outcome = await vllm.sample("r", None, request_body)
            assert outcome.category == "user"
            assert message in outcome.error
            assert not stub.bodies("/v1/completions")

    scenario(check)


def test_prompts_are_not_scored_while_an_adapter_on_the_unembedding_is_loaded(tmp_path: Path) -> None:
    async def check(stub: StubVllm) -> None:
        async with engine(stub) as vllm:
            scored = body([1, 2], prompt_logprobs=True)
            assert not (await vllm.sample("r", saved(tmp_path, "a"), scored)).category
            outcome = await vllm.sample("r", saved(tmp_path, "b", "q_proj", "lm_head"), scored)
            assert outcome.category == "user"
            assert "vllm#51594" in outcome.error

    scenario(check)


def test_adapters_that_cannot_be_loaded_say_what_to_do(tmp_path: Path) -> None:
    """S4-04: rank, file system, and a server that may not load any."""

    async def check(stub: StubVllm) -> None:
        async with engine(stub) as vllm:
            broken = saved(tmp_path, "a")
            (Path(broken) / "broken").touch()
            refused = await vllm.sample("r", broken, body([1]))
            assert (refused.category, "max_lora_rank 64" in refused.error) == ("user", True)
            stub.runtime_loras = False
            refused = await vllm.sample("r", saved(tmp_path, "b"), body([1]))
            assert (refused.category, "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in refused.error) == ("user", True)
        async with engine(stub, enable_lora=False) as vllm:
            refused = await vllm.sample("r", broken, body([1]))
            assert (refused.category, "VLLM_ENABLE_LORA" in refused.error) == ("user", True)
            assert not (await vllm.sample("r", None, body([1]))).category

    scenario(check)


def test_a_server_that_does_not_see_the_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S4-04: the file system must be shared."""

    async def check(stub: StubVllm) -> None:
        monkeypatch.setattr(Path, "is_dir", lambda path: False)
        async with engine(stub) as vllm:
            refused = await vllm.sample("r", saved(tmp_path, "a"), body([1]))
            assert refused.category == "user"
            assert "must share this server's file system" in refused.error

    scenario(check)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other/model"}, "serves other/model, not tuft/demo"),
        ({"openai": False}, "trl's takes no adapters"),
        ({"key": "secret"}, "refuses our key: set VLLM_API_KEY"),
    ],
)
def test_a_server_that_cannot_serve_us_says_why_at_the_start(change: dict[str, Any], message: str) -> None:
    """S4-03, S4-04: another model; trl's server; a key."""

    async def check(stub: StubVllm) -> None:
        vars(stub).update(change)
        with pytest.raises(UserError, match=message):
            async with engine(stub):
                pass

    scenario(check)


def test_with_its_key_a_protected_server_serves() -> None:
    async def check(stub: StubVllm) -> None:
        async with engine(stub, vllm_key="secret") as vllm:
            assert tokens(await vllm.sample("r", None, body([1]))) == [[1, 1, 1]]

    scenario(check, key="secret")


def test_nobody_there_is_said_at_once_with_the_address_and_what_to_try() -> None:
    """S4-35: the phrase, the URL, the curl line and how to start one, within ten seconds; both paths are probed."""
    with StubVllm() as stub:
        url = stub.url

    async def check() -> None:
        config = BackendsConfig(sampling="external", vllm_url=url)
        vllm = VllmServer(CARD, Server(KIND, url), config, "home")
        began = time.monotonic()
        with pytest.raises(UserError) as refused:
            await vllm.start()
        assert time.monotonic() - began < 10
        for part in (
            "vLLM server can't be reached",
            url,
            f"curl {url}/health/",
            "vllm serve",
            "--enable-lora",
        ):
            assert part in refused.value.message
        await vllm.stop()

    asyncio.run(check())
    assert list(KIND.health) == ["/health", "/health/"]


async def parts(vllm: VllmServer, asked: dict[str, Any], *, chat: bool = False, **task: Any) -> list[Part]:
    wanted = TextTask("t", task.pop("adapter", None), json.dumps(asked).encode(), chat, **task)
    async with aclosing(vllm.complete(wanted)) as found:
        return [part async for part in found]


def test_requests_in_openais_form_are_handed_on(tmp_path: Path) -> None:
    """S4-01: whole and streamed, for completions and chats, with the model's name as the client has it."""

    async def check(stub: StubVllm) -> None:
        async with engine(stub) as vllm:
            asked = {"model": "tinker://x", "prompt": [1], "max_tokens": 2}
            (whole,) = await parts(vllm, asked, adapter=saved(tmp_path, "a"), tenant="alice")
            assert whole.ended
            assert json.loads(whole.chunks[0])["model"] == "tinker://x"
            assert whole.facts == {"prompt_tokens": 1, "tokens": 2}
            sent = stub.bodies("/v1/completions")[0]
            assert sent["model"] in stub.adapters
            assert (sent["temperature"], sent["max_tokens"]) == (1.0, 2)
            *chunks, last = await parts(vllm, {**asked, "stream": True})
            assert [json.loads(part.chunks[0])["choices"][0]["text"] for part in chunks] == ["x"]
            assert (last.ended, last.facts["tokens"]) == (True, 2)
            told = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
            (whole,) = await parts(vllm, told, chat=True)
            assert json.loads(whole.chunks[0])["choices"][0]["message"]["content"] == "hello"
            (refused,) = await parts(vllm, told, chat=True, input_tokens=3)
            assert refused.category == "user"
            (refused,) = await parts(vllm, {"model": "m", "prompt": "x", "logit_bias": {"1": 5}})
            assert "logit_bias" in refused.error

    scenario(check)


def test_blocking_work_has_as_many_threads_as_configured() -> None:
    """S4-10: eight slow calls go in two waves of four, in threads of their own, and never on the event loop."""
    from concurrent.futures import ThreadPoolExecutor

    wave, seen = threading.Barrier(4, timeout=10), []

    def slow() -> None:
        seen.append(threading.current_thread().name)
        wave.wait()

    async def check() -> None:
        config = BackendsConfig()
        server = Server(
            KIND, "http://127.0.0.1:9", "", ThreadPoolExecutor(config.max_workers, "tuft-backend")
        )
        await asyncio.gather(*(server.work(slow) for _ in range(8)))

    asyncio.run(check())
    assert len(seen) == 8
    assert len(set(seen)) == 4
    assert all(name.startswith("tuft-backend") for name in seen)
