"""A ``VllmServer`` on the stub that answers as vLLM does, and what it is asked and answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.stub_vllm import StubVllm
from tuft_jupyter.config.backends import BackendsConfig
from tuft_jupyter.core.engine import Outcome, Part, TextTask
from tuft_jupyter.core.types import SAMPLED, ModelCard
from tuft_jupyter.engine.remote.http import Server
from tuft_jupyter.engine.remote.vllm_server import KIND, VllmServer
from tuft_jupyter.wire import tuft_wire_pb2 as pb

CARD = ModelCard("tuft/demo", "/models/demo", 256, 64, "Qwen3ForCausalLM")


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


async def parts(vllm: VllmServer, asked: dict[str, Any], *, chat: bool = False, **task: Any) -> list[Part]:
    wanted = TextTask("t", task.pop("adapter", None), json.dumps(asked).encode(), chat, **task)
    async with aclosing(vllm.complete(wanted)) as found:
        return [part async for part in found]
