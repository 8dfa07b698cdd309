"""The stock SDK against a server that is full: it waits as it is told, and every answer arrives."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import tinker

from tests.support.fuzz import Target
from tests.support.live import sdk
from tuft_jupyter.core import sampling


@pytest.mark.timeout(120)
def test_the_sdk_comes_back_after_429_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L6: two samples at a time for a client that wants ten; all are drawn, each once."""
    monkeypatch.setattr(sampling, "WAITING", 2)
    monkeypatch.setenv("TINKER_TELEMETRY", "0")

    def client(address: str, key: str) -> list[list[int]]:
        with sdk(address, key) as service:
            sampler = service.create_sampling_client(base_model="tuft/demo")
            params = tinker.SamplingParams(max_tokens=30, temperature=1.0)
            prompts = [tinker.ModelInput.from_ints([5, 6, 7 + i]) for i in range(10)]
            futures = [sampler.sample(prompt, 1, params) for prompt in prompts]
            return [future.result(timeout=60).sequences[0].tokens for future in futures]

    async def scenario() -> None:
        target = Target(tmp_path)
        await target.host.start()
        try:
            drawn = await asyncio.to_thread(client, f"http://127.0.0.1:{target.port}", target.host.key)
        finally:
            target.http.stop()
            await target.host.stop()
        assert len(drawn) == 10
        assert all(drawn)
        counted = {dict(s.labels)["status"]: s.value for s in target.host.service.counters.series()
                   if s.name == "requests" and dict(s.labels)["route"] == "asample"}  # fmt: skip
        assert counted["429"] > 0
        assert counted["200"] == 10

    asyncio.run(scenario())
