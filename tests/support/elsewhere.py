"""Two of our servers, of which one trains for the other: real engines in this process, real HTTP, the stock SDK."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from tinker import types
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerRequest
from tornado.netutil import bind_sockets
from tornado.web import Application

from tests.support.live import sdk
from tests.support.local_engines import LocalEngines
from tuft_jupyter.config import load_settings
from tuft_jupyter_server.host import Host
from tuft_jupyter_server.tinker import handlers, openai_handlers

IDS = [101, 42, 37, 102, 57, 12, 7, 99]


class _Logging(Application):
    def __init__(self, rules: list[Any], asked: list[str]) -> None:
        super().__init__(rules)
        self._asked = asked

    def find_handler(self, request: HTTPServerRequest, **rest: Any) -> Any:
        self._asked.append(f"{request.method} {request.path.removeprefix('/api/v1')}")
        return super().find_handler(request, **rest)


class Daemon:
    """A server at ``/api/v1`` that can be ended and begun again, on its port and in its home. ``asked`` logs paths."""

    def __init__(self, home: Path, env: Mapping[str, str] | None = None, config: Path | None = None) -> None:
        self.home, self._env, self._config = home, dict(env or {}), config
        self.port = 0
        self.asked: list[str] = []
        self.clients = contextlib.ExitStack()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def begin(self) -> None:
        settings = load_settings(self._config, {"TUFT_HOME": str(self.home), **self._env})
        self.host = Host(settings, engines=LocalEngines())
        self.host.api.hold_seconds = 0.2
        shared = (self.host.api, self.host.keys, 2**23)
        rules = handlers("/api/v1", *shared) + openai_handlers("/oai/api/v1", *shared)
        self._http = HTTPServer(_Logging(rules, self.asked))
        sockets = bind_sockets(self.port, "127.0.0.1")
        self.port = sockets[0].getsockname()[1]
        self._http.add_sockets(sockets)
        await self.host.start()

    async def end(self) -> None:
        self._http.stop()
        await self._http.close_all_connections()
        await self.host.stop()

    async def __aenter__(self) -> Self:
        await self.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.clients.close)
        await self.end()

    def count(self, path: str) -> int:
        return self.asked.count(f"POST {path}")


def trainer_of(remote: Daemon) -> dict[str, str]:
    """The environment of a server that trains at ``remote``."""
    return {
        "USE_MEGATRON": "true",
        "USE_VLLM": "false",
        "MEGATRON_SERVER_URL": remote.url,
        "MEGATRON_SERVER_KEY": remote.host.key,
    }


def scenario(body: Callable[[], Awaitable[None]], seconds: float = 100) -> None:
    asyncio.run(asyncio.wait_for(body(), seconds))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Seen:
    """What a client sees: a digest of every log-probability of each step, the losses, the sampled tokens."""

    bits: tuple[str, ...]
    losses: tuple[float, ...]
    tokens: tuple[int, ...] = ()


class Client:
    """The stock SDK at a server; every call blocks, and belongs into a thread."""

    def __init__(self, server: Daemon, model: str = "tuft/demo") -> None:
        self.service = server.clients.enter_context(sdk(server.url, server.host.key))
        made: Any = self.service.create_lora_training_client(base_model=model, rank=8, seed=7)
        self.training: Any = made.result()

    def steps(self, count: int, training: Any = None) -> Seen:
        training = training or self.training
        bits, losses = [], []
        for _ in range(count):
            passed = training.forward_backward([datum()], "cross_entropy")
            stepped = training.optim_step(types.AdamParams(learning_rate=1e-2))
            result = passed.result(timeout=60)
            stepped.result(timeout=60)
            logprobs = np.array(result.loss_fn_outputs[0]["logprobs"].data, np.float32)
            bits.append(hashlib.sha256(logprobs.tobytes()).hexdigest())
            losses.append(float(result.metrics["loss:sum"]))
        return Seen(tuple(bits), tuple(losses))

    def sampled(self, sampling: Any = None) -> tuple[int, ...]:
        """Greedy tokens of the run as it is now, saved for that."""
        sampling = sampling or self.training.save_weights_and_get_sampling_client().result()
        answer = sampling.sample(
            prompt=types.ModelInput.from_ints(IDS[:3]),
            num_samples=1,
            sampling_params=types.SamplingParams(max_tokens=5, temperature=0.0),
        ).result(timeout=60)
        return tuple(answer.sequences[0].tokens)


def names_in(directory: str) -> set[str]:
    return {file.name for file in Path(directory).iterdir()}


def datum() -> types.Datum:
    targets = types.TensorData(data=IDS[1:], dtype="int64", shape=[len(IDS) - 1])
    return types.Datum(
        model_input=types.ModelInput.from_ints(IDS[:-1]), loss_fn_inputs={"target_tokens": targets}
    )


def direct(server: Daemon, steps: int) -> Seen:
    """The same work with nobody in between."""
    client = Client(server)
    seen = client.steps(steps)
    return Seen(seen.bits, seen.losses, client.sampled())
