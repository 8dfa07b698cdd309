"""Tasks for engines that are Ray actors, and how their processes die."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from typing import Any

import psutil
import pytest
from tinker import types as sdk

from tests.support.sdk_bodies import sdk_body
from tuft_jupyter.core.engine import EngineDied, Outcome, Task
from tuft_jupyter.core.types import PROTOBUF, OpKind
from tuft_jupyter.engine.ray_engines import RaySamplingEngine, RayTrainingEngine

CANARY = "tml-canary"
"""The value of every secret in the environment that Ray is started from."""

RUN = "s:train:0"
LORA = {"rank": 4, "alpha": 8.0, "seed": 1}
ADAM = {"learning_rate": 1e-2}


def create() -> Task:
    return Task("create", RUN, OpKind.CREATE_MODEL, {"lora": LORA})


def forward_backward(*tokens: int, key: str = "pass") -> Task:
    targets = list(tokens)
    datum = sdk.Datum(
        model_input=sdk.ModelInput.from_ints(targets), loss_fn_inputs={"target_tokens": targets}
    )
    return Task(key, RUN, OpKind.FORWARD_BACKWARD, {}, sdk_body([datum]), PROTOBUF, 1 << 20)


def optim_step(key: str = "step") -> Task:
    return Task(key, RUN, OpKind.OPTIM_STEP, {"adam": ADAM})


def sample_body(*prompt: int, max_tokens: int = 4) -> bytes:
    return json.dumps(
        {
            "prompt": {"chunks": [{"tokens": list(prompt), "type": "encoded_text"}]},
            "num_samples": 2,
            "sampling_params": {"max_tokens": max_tokens, "temperature": 0.0, "stop": []},
        }
    ).encode()


def good(outcome: Outcome) -> Outcome:
    assert outcome.category == "", outcome.error
    return outcome


async def until_dead(engine: RayTrainingEngine | RaySamplingEngine, call: Any) -> float:
    """Kill the engine's process during a call; seconds until the call says so."""
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGSTOP)  # so that it cannot answer before it dies
    waiting = asyncio.ensure_future(call)
    await asyncio.sleep(0)
    os.kill(engine.pid, signal.SIGKILL)
    began = time.perf_counter()
    with pytest.raises(EngineDied, match="is gone"):
        await waiting
    return time.perf_counter() - began


def runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
