"""Sampling on a vLLM server elsewhere, against a small real HTTP server that answers as vLLM does."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.stub_vllm import StubVllm
from tests.support.vllm_elsewhere import CARD, answer, body, engine, parts, saved, scenario, tokens
from tuft_jupyter.config.backends import BackendsConfig
from tuft_jupyter.core.engine import EngineDied
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.engine.remote.http import Server
from tuft_jupyter.engine.remote.vllm_server import KIND, VllmServer


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


def test_a_streamed_text_may_hold_any_line_separator_of_unicode() -> None:
    """JSON leaves U+2028 and U+0085 as they are; an event ends at a line feed only."""

    async def check(stub: StubVllm) -> None:
        async with engine(stub) as vllm:
            for character in ("\u2028", "\u0085"):
                stub.text = character
                first, *_ = await parts(vllm, {"model": "m", "prompt": "p", "stream": True})
                assert json.loads(first.chunks[0])["choices"][0]["text"] == character

    scenario(check)


def test_a_server_that_is_busy_is_no_fault_of_the_request() -> None:
    async def check(stub: StubVllm) -> None:
        async with engine(stub) as vllm:
            stub.busy = 1
            refused = await vllm.sample("r", None, body([1, 2]))
            assert (refused.category, "Too many requests" in refused.error) == ("server", True)
            assert tokens(await vllm.sample("s", None, body([1, 2]))) == [[2, 2, 2]]

    scenario(check)
