"""What a sampling worker promises, on a fake that computes exactly."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from tinker.proto.response_conv import deserialize_sample_response

from tests.support.fake_engine import CONTEXT, VOCAB, FakeSampler, Faults
from tests.support.loops import on_a_loop
from tuft_jupyter.engine.sampling_worker import SamplingWorker


def sample_body(*prompt: int, **fields: Any) -> bytes:
    request = {
        "prompt": {"chunks": [{"tokens": list(prompt), "type": "encoded_text"}]},
        "num_samples": 1,
        "sampling_params": {"max_tokens": 3},
        **fields,
    }
    return json.dumps(request).encode()


@on_a_loop
async def test_many_samples_at_once_each_get_their_own() -> None:
    worker = SamplingWorker(FakeSampler())
    try:
        outcomes = await asyncio.gather(*(worker.sample(f"r{i}", None, sample_body(i)) for i in range(50)))
    finally:
        worker.close()
    for i, outcome in enumerate(outcomes):
        assert outcome.request_id == f"r{i}"
        assert deserialize_sample_response(outcome.result).sequences[0].tokens == [i] * 3
        assert (outcome.facts["tokens"], outcome.facts["prompt_tokens"]) == (3, 1)


@on_a_loop
async def test_a_sample_without_max_tokens_goes_as_far_as_the_context() -> None:
    worker = SamplingWorker(FakeSampler())
    try:
        outcome = await worker.sample("r", None, sample_body(1, sampling_params={}))
    finally:
        worker.close()
    assert outcome.facts["tokens"] == CONTEXT - 1


@pytest.mark.parametrize("body", [b"{", sample_body(VOCAB), sample_body(1, num_samples=0)])
@on_a_loop
async def test_a_bad_sample_request_is_the_users(body: bytes) -> None:
    worker = SamplingWorker(FakeSampler())
    try:
        assert (await worker.sample("r", None, body)).category == "user"
    finally:
        worker.close()


@on_a_loop
async def test_an_unreadable_adapter_fails_its_own_request(tmp_path: Path) -> None:
    worker = SamplingWorker(FakeSampler())
    try:
        outcome = await worker.sample("r", str(tmp_path), sample_body(1))
        assert outcome.category == "server"
        assert str(tmp_path) not in outcome.error
        assert not (await worker.sample("s", None, sample_body(1))).category
    finally:
        worker.close()


@on_a_loop
async def test_a_cancelled_sample_ends_at_once_and_alone() -> None:
    faults = Faults(hang_on=7)
    worker = SamplingWorker(FakeSampler(faults))
    try:
        hanging = asyncio.create_task(worker.sample("r", None, sample_body(7)))
        other = asyncio.create_task(worker.sample("s", None, sample_body(1)))
        await asyncio.to_thread(faults.hanging.wait)
        worker.cancel("r")
        worker.cancel("unknown")
        assert (await hanging).category == "user"
        faults.release.set()
        assert not (await other).category
    finally:
        worker.close()


@on_a_loop
async def test_a_broken_sampler_tells_everybody_and_then_dies() -> None:
    """F9: a dead engine does not look alive."""
    died = threading.Event()
    faults = Faults(hang_on=7)
    worker = SamplingWorker(FakeSampler(faults), on_death=died.set)
    waiting = [asyncio.create_task(worker.sample(f"r{i}", None, sample_body(7))) for i in range(3)]
    await asyncio.to_thread(faults.hanging.wait)
    faults.corpse = True
    faults.release.set()
    outcomes = await asyncio.gather(*waiting)
    assert {outcome.category for outcome in outcomes} == {"server"}
    assert "illegal memory access" in outcomes[0].error
    assert await asyncio.to_thread(died.wait, 5)
    late = await worker.sample("late", None, sample_body(1))
    assert late.category == "server"


@on_a_loop
async def test_where_adapters_are_off_a_request_for_one_is_told_so_and_the_base_model_is_sampled() -> None:
    """S2-54: enable_lora: false."""
    worker = SamplingWorker(FakeSampler(), adapters=False)
    try:
        refused = await worker.sample("r1", "/adapters/one", sample_body(1))
        assert refused.category == "user"
        assert "enable_lora is false" in refused.error
        assert not (await worker.sample("r2", None, sample_body(1))).category
    finally:
        worker.close()
