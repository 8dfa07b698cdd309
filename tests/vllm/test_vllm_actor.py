"""The vLLM sampler in its Ray actor: chosen by the settings, noticed when it dies, started again, gone at the end."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import psutil
import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make vllm-test")

from tests.support.loops import on_a_loop
from tests.support.tiny_models import make_model
from tuft_jupyter import models
from tuft_jupyter.config import Settings
from tuft_jupyter.core.engine import EngineDied, Outcome
from tuft_jupyter.engine.ray_engines import RayEngines, RaySamplingEngine

BODY = json.dumps(
    {
        "prompt": {"chunks": [{"tokens": [5, 6, 7], "type": "encoded_text"}]},
        "num_samples": 2,
        "sampling_params": {"max_tokens": 8, "stop": []},
    }
).encode()


async def sample(engine: RaySamplingEngine, key: str) -> Outcome:
    return await asyncio.wait_for(engine.sample(key, None, BODY, tenant="alice"), 60)


async def is_told(engine: RaySamplingEngine) -> bool:
    """False once the actor is gone."""
    try:
        outcome = await sample(engine, "second")
    except EngineDied:
        return False
    assert outcome.category == "server"
    return True


@pytest.mark.timeout(300)
@on_a_loop
async def test_a_dead_engine_ends_its_actor_and_a_new_one_takes_over(tmp_path: Path) -> None:
    """F9, S2-51, S3-06: sampler_type vllm; the actor does not outlive its engine, and nothing outlives the actor."""
    card = models.resolve(str(make_model(tmp_path / "model", hidden=256)))
    engine = RayEngines(Settings(tmp_path, tmp_path / "checkpoints", sampler_type="vllm")).sampling(card)
    started: set[psutil.Process] = set()
    try:
        await engine.start()
        outcome = await sample(engine, "first")
        assert (outcome.category, outcome.facts["tokens"]) == ("", 16)
        started |= set(psutil.Process(engine.pid).children(recursive=True))
        core = next(process for process in started if "EngineCore" in process.name())
        core.kill()
        while await is_told(engine):  # one that came just before the end is told that the engine is dead
            pass
        await engine.start()
        assert not (await sample(engine, "third")).category
        started |= set(psutil.Process(engine.pid).children(recursive=True))
    finally:
        await engine.stop()
    assert not psutil.wait_procs(started, timeout=20)[1]
