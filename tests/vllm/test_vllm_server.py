"""Sampling on a real ``vllm serve`` elsewhere, against the torch sampler: the same tokens, over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make vllm-test")

from tests.support.adapters import make_adapter
from tests.support.live import until
from tests.support.loops import on_a_loop
from tests.support.sampling import ask, prompt, run, tokens_of
from tests.support.tiny_models import make_model
from tuft_jupyter import models
from tuft_jupyter.config.backends import BackendsConfig
from tuft_jupyter.core.engine import Outcome, TextTask
from tuft_jupyter.engine.remote.http import Server
from tuft_jupyter.engine.remote.vllm_server import KIND, VllmServer
from tuft_jupyter.engine.torch_sampler import TorchSampler
from tuft_jupyter.wire import tuft_wire_pb2 as pb

MAX_LENGTH = 256
HELD = 2
SERVE = f"--enable-lora --max-loras {HELD + 2} --max-cpu-loras {HELD + 2} --max-lora-rank 8 --dtype float32 \
--enforce-eager --max-model-len {MAX_LENGTH} --host 127.0.0.1 --disable-log-stats"
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "qwen3", hidden=256, max_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("adapters")
    return [make_adapter(home / name, model, seed=seed) for seed, name in enumerate("abc", 1)]


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    # what "vllm serve" runs; that command wants a distribution of the name vllm, which the build for CPUs is not
    serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command = [*serve, "--port", str(port), *SERVE.split()]
    log = tmp_path_factory.mktemp("vllm") / "log"

    def healthy() -> bool:
        assert server.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{address}/health", trust_env=False).status_code == 200
        return False

    with (
        log.open("w") as out,
        subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdout=out, stderr=subprocess.STDOUT
        ) as server,
    ):
        try:
            until(healthy, 240, "vllm serve does not answer")
            yield address
        finally:
            server.terminate()


@contextlib.asynccontextmanager
async def engine(url: str, model: Path) -> AsyncIterator[VllmServer]:
    config = BackendsConfig(sampling="external", vllm_url=url, max_loras=HELD)
    server = Server(KIND, url)
    made = VllmServer(models.resolve(str(model)), server, config, "test")
    await made.start()
    try:
        yield made
    finally:
        await made.stop()
        await server.close()


def body(tokens: list[int], **more: Any) -> bytes:
    params = {"max_tokens": 16, "temperature": 0.0, "stop": [], **more.pop("sampling_params", {})}
    return json.dumps(
        {"prompt": {"chunks": [{"tokens": tokens}]}, "sampling_params": params, **more}
    ).encode()


def answer(outcome: Outcome) -> pb.SampleResponse:
    assert not outcome.category, outcome.error
    return pb.SampleResponse.FromString(outcome.result)


def tokens(outcome: Outcome) -> list[list[int]]:
    return [np.frombuffer(each.tokens, "<i4").tolist() for each in answer(outcome).sequences]


@pytest.mark.timeout(300)
@on_a_loop
async def test_a_vllm_server_draws_what_the_torch_sampler_draws(
    url: str, model: Path, adapters: list[Path]
) -> None:
    """S4-04, S4-06: base model and adapters, more of them than are held, at once."""
    jobs = [
        (adapter, prompt(5 + 7 * i, seed=i)) for i, adapter in enumerate([*adapters, None, *adapters, None])
    ]
    expected = run(TorchSampler(model), [(a, ask(p, temperature=0.0, max_tokens=16)) for a, p in jobs])
    async with engine(url, model) as vllm:
        drawn = await asyncio.gather(
            *(
                vllm.sample(
                    f"r{i}", None if adapter is None else str(adapter), body(p.tolist()), tenant="alice"
                )
                for i, (adapter, p) in enumerate(jobs)
            )
        )
    for outcome, theirs in zip(drawn, expected, strict=True):
        assert tokens(outcome) == tokens_of(theirs)
        logprobs = np.frombuffer(answer(outcome).sequences[0].logprobs, "<f4")
        np.testing.assert_allclose(logprobs, theirs.sequences[0].logprobs, atol=2e-5)
    server = Server(KIND, url)
    listed = (await server.ask("GET", "/v1/models")).json()["data"]
    await server.close()
    assert len(listed) == 1, "every adapter of ours was unloaded"


@pytest.mark.timeout(300)
@on_a_loop
async def test_scores_seeds_and_alternatives_are_those_of_the_protocol(url: str, model: Path) -> None:
    """S4-04: over HTTP nothing of a request is lost."""
    tokens_in = prompt(9, seed=3)
    asked = ask(tokens_in, temperature=0.0, max_tokens=4, prompt_logprobs=True, topk_prompt_logprobs=2)
    (expected,) = run(TorchSampler(model), [(None, asked)])
    async with engine(url, model) as vllm:
        scored = await vllm.sample(
            "s",
            None,
            body(tokens_in.tolist(), prompt_logprobs=True, topk_prompt_logprobs=2, topk_sample_logprobs=3),
        )
        found = answer(scored)
        np.testing.assert_allclose(
            np.frombuffer(found.prompt_logprobs, "<f4")[1:], expected.prompt_logprobs[1:], atol=2e-5
        )
        top = np.frombuffer(found.topk_prompt_logprobs.token_ids, "<i4").reshape(-1, 2)
        assert top[1:].tolist() == expected.topk_prompt_ids[1:].tolist()
        ranked = np.frombuffer(found.sequences[0].topk_sampled_logprobs.logprobs, "<f4").reshape(-1, 3)
        assert (np.diff(ranked) <= 0).all()

        async def drawn(seed: int) -> list[list[int]]:
            params = {"temperature": 1.0, "seed": seed}
            return tokens(
                await vllm.sample("d", None, body([5, 6, 7], num_samples=3, sampling_params=params))
            )

        assert await drawn(1) == await drawn(1) != await drawn(2)
        assert len({tuple(each) for each in await drawn(1)}) == 3
        refused = await vllm.sample("x", str(model / "nothing"), body([5]))
        assert refused.category == "user"


@pytest.mark.timeout(300)
@on_a_loop
async def test_text_comes_as_it_is_drawn(url: str, model: Path, adapters: list[Path]) -> None:
    """S4-01: OpenAI's form, whole and streamed, from an adapter."""
    asked = {"model": "tinker://mine", "prompt": prompt(6).tolist(), "max_tokens": 6, "temperature": 0}

    async def parts(**more: Any) -> list[Any]:
        task = TextTask(
            "t", str(adapters[0]), json.dumps({**asked, **more}).encode(), chat=False, input_tokens=10
        )
        return [part async for part in vllm.complete(task)]

    async with engine(url, model) as vllm:
        (whole,) = await parts()
        text = json.loads(whole.chunks[0])["choices"][0]["text"]
        assert whole.facts == {"prompt_tokens": 6, "tokens": 6}
        *streamed, last = await parts(stream=True)
        assert "".join(json.loads(part.chunks[0])["choices"][0]["text"] for part in streamed) == text
        assert len(streamed) > 1
        assert last.facts["tokens"] == 6
        (refused,) = await parts(prompt=prompt(11).tolist())
        assert refused.category == "user"
