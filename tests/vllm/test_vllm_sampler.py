"""The vLLM sampler against the torch sampler, on a real vLLM engine (its CPU build, or a GPU if there is one)."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make vllm-test")

from tests.support.adapters import make_adapter
from tests.support.canaries import make_canaries
from tests.support.sampling import ask, drain, prompt, run, tokens_of
from tests.support.tiny_models import make_model
from tuft_jupyter.core.engine import EngineDied
from tuft_jupyter.core.errors import NotFound, UserError
from tuft_jupyter.core.types import StopReason
from tuft_jupyter.engine.torch_sampler import TorchSampler
from tuft_jupyter.engine.vllm_sampler import VllmSampler

TOKENS = (40, 80, 120, 160, 200, 240)
MAX_LENGTH = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "qwen3", hidden=256, max_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(home / "a", model, seed=1),
        make_adapter(home / "b", model, seed=2, rank=2),
        make_adapter(home / "c", model, seed=3, modules=("q_proj", "v_proj")),
        make_adapter(home / "d", model, seed=4, modules=("o_proj", "lm_head")),
    ]


@pytest.fixture(scope="module")
def sampler(model: Path) -> Iterator[VllmSampler]:
    made = VllmSampler(model, dtype="float32", device="cpu", max_rank=8, max_adapters=4)
    yield made
    made.close()


@pytest.fixture(scope="module")
def torch_sampler(model: Path) -> TorchSampler:
    return TorchSampler(model)


def both(jobs: list[Any], *samplers: Any) -> Iterator[tuple[Any, Any]]:
    return zip(*(run(sampler, jobs) for sampler in samplers), strict=True)


def test_greedy_tokens_and_logprobs_equal_the_torch_samplers_in_a_mixed_batch(
    sampler: VllmSampler, torch_sampler: TorchSampler, adapters: list[Path]
) -> None:
    """S1-42, S2-51: base model and adapters of different ranks and targets, all in one batch."""
    jobs = [
        (adapter, ask(prompt(5 + 7 * i, seed=i), temperature=0.0, max_tokens=24))
        for i, adapter in enumerate([*adapters, None, *adapters, None])
    ]
    for ours, theirs in both(jobs, sampler, torch_sampler):
        assert tokens_of(ours) == tokens_of(theirs)
        np.testing.assert_allclose(ours.sequences[0].logprobs, theirs.sequences[0].logprobs, atol=2e-5)


def test_prompt_logprobs_equal_the_torch_samplers(
    sampler: VllmSampler, torch_sampler: TorchSampler, adapters: list[Path]
) -> None:
    request = ask(prompt(21), max_tokens=1, prompt_logprobs=True, topk_prompt_logprobs=3)
    last = replace(request, prompt_logprobs_last_n=4)
    jobs = [(adapters[0], request), (None, request), (adapters[3], request), (adapters[1], last)]
    for ours, theirs in both(jobs, sampler, torch_sampler):
        np.testing.assert_allclose(ours.prompt_logprobs, theirs.prompt_logprobs, atol=2e-5)
        np.testing.assert_array_equal(ours.topk_prompt_ids, theirs.topk_prompt_ids)
        np.testing.assert_allclose(ours.topk_prompt_logprobs, theirs.topk_prompt_logprobs, atol=2e-5)


def test_sampled_logprobs_are_the_models_own_whatever_the_filters(
    sampler: VllmSampler, torch_sampler: TorchSampler, adapters: list[Path]
) -> None:
    """At temperature one and without filters, as a scored prompt has them."""
    tokens = prompt(9)
    request = ask(tokens, 2, seed=3, temperature=0.6, top_k=7, top_p=0.9)
    (drawn,) = run(sampler, [(adapters[1], request)])
    for sequence in drawn.sequences:
        whole = np.concatenate([tokens, sequence.tokens])
        (scored,) = run(torch_sampler, [(adapters[1], ask(whole, max_tokens=1, prompt_logprobs=True))])
        np.testing.assert_allclose(sequence.logprobs, scored.prompt_logprobs[len(tokens) :], atol=2e-5)


def test_a_seed_gives_the_same_samples_in_any_company(sampler: VllmSampler, adapters: list[Path]) -> None:
    request = ask(prompt(8), 3, seed=2**64 - 1, max_tokens=20)
    neighbour = ask(prompt(8), 3, seed=2**64 - 2, max_tokens=20)
    (alone,) = run(sampler, [(adapters[0], request)])
    crowd = [(adapter, ask(prompt(5 + i, seed=i), 2, max_tokens=7 + i)) for i, adapter in enumerate(adapters)]
    answers = run(sampler, [*crowd, (adapters[0], request), *crowd, (adapters[0], neighbour)])
    assert tokens_of(answers[len(crowd)]) == tokens_of(alone)
    assert len({tuple(tokens) for tokens in [*tokens_of(alone), *tokens_of(answers[-1])]}) == 6


def test_sequences_end_as_the_torch_samplers_do(sampler: VllmSampler, torch_sampler: TorchSampler) -> None:
    """S1-44: by token, by text, by the model's own end of sequence, or by length."""
    (free,) = run(torch_sampler, [(None, ask(prompt(6), temperature=0.0, max_tokens=40))])
    token = tokens_of(free)[0][5]
    greedy: dict[str, Any] = {"temperature": 0.0, "max_tokens": 40}
    requests = [
        ask(prompt(6), stop_tokens=(token,), **greedy),
        ask(prompt(6), stop_strings=(chr(token - 3) if 36 < token < 97 else "e",), **greedy),
        ask(prompt(6), stop_tokens=None, **greedy),
        ask(prompt(6), 2, **greedy),
        ask(prompt(MAX_LENGTH - 5), temperature=0.0, max_tokens=None),
    ]
    answers = list(both([(None, request) for request in requests], sampler, torch_sampler))
    for ours, theirs in answers:
        assert tokens_of(ours) == tokens_of(theirs)
        assert [s.stop_reason for s in ours.sequences] == [s.stop_reason for s in theirs.sequences]
    assert answers[0][0].sequences[0].stop_reason is StopReason.STOP
    assert len(answers[-1][0].sequences[0].tokens) == 5


def test_each_tenant_hears_its_own_weights_in_any_order(
    sampler: VllmSampler, model: Path, tmp_path: Path
) -> None:
    """T8: more adapters than are held, more versions than tenants, and names used again."""
    rng = np.random.default_rng(0)
    wrong = heard = 0
    for version in range(2):
        canaries = make_canaries(tmp_path, model, TOKENS if version else TOKENS[::-1])
        said = dict(zip(canaries, TOKENS if version else TOKENS[::-1], strict=True))
        if version:  # the same directories now hold each other's weights
            swapped = tmp_path / "swapped"
            for path, other in pairwise(canaries):
                path.rename(swapped)
                other.rename(path)
                swapped.rename(other)
            said = dict(zip(canaries, [*TOKENS[1:], TOKENS[0]], strict=True))
        for _ in range(10):
            asked = [canaries[i] for i in rng.integers(0, len(canaries), 25)]
            jobs = [(path, ask(prompt(8, seed=5), max_tokens=3, temperature=0.0)) for path in asked]
            for path, answer in zip(asked, run(sampler, jobs), strict=True):
                heard += 1
                wrong += bool((answer.sequences[0].tokens != said[path]).any())
    assert heard == 500
    assert wrong == 0


def test_a_bad_request_is_refused_before_the_engine_sees_it(
    sampler: VllmSampler, model: Path, adapters: list[Path], tmp_path: Path
) -> None:
    """An oversized prompt, a path without weights, damaged weights, too high a rank: each fails alone."""
    with pytest.raises(UserError, match="context of 256 tokens"):
        sampler.check(ask(prompt(MAX_LENGTH)))
    damaged = Path(shutil.copytree(adapters[0], tmp_path / "damaged"))
    (damaged / "adapter_model.safetensors").write_bytes(b"nothing")
    high = make_adapter(tmp_path / "high", model, seed=1, rank=9)
    good = ask(prompt(5), temperature=0.0)
    jobs = [
        (None, ask(prompt(MAX_LENGTH))),
        (tmp_path / "nowhere", good),
        (damaged, good),
        (high, good),
        (adapters[0], good),
    ]
    oversized, missing, torn, ranked, answer = run(sampler, jobs)
    assert isinstance(oversized, UserError)
    assert isinstance(missing, NotFound)
    assert "cannot be read" in torn.message
    assert "its rank is 9; the limit here is 8" in ranked.message
    assert len(answer.sequences[0].tokens) == 12


def test_tokens_are_heard_as_they_are_drawn(sampler: VllmSampler, torch_sampler: TorchSampler) -> None:
    """With the likeliest tokens at each place, and for every sample of a greedy request."""
    request = ask(prompt(7), 2, temperature=0.0, topk_sample_logprobs=2, max_tokens=9)
    heard: list[Any] = []
    sampler.submit("r", None, request, heard.append)
    ours = drain(sampler)["r"]
    (theirs,) = run(torch_sampler, [(None, request)])
    for index, (sequence, expected) in enumerate(zip(ours.sequences, theirs.sequences, strict=True)):
        mine = [drawn for drawn in heard if drawn.index == index]
        assert [drawn.token for drawn in mine] == sequence.tokens.tolist() == expected.tokens.tolist()
        assert [drawn.stop_reason for drawn in mine] == [None] * 8 + [StopReason.LENGTH]
        np.testing.assert_array_equal(sequence.topk_ids, expected.topk_ids)
        np.testing.assert_allclose(sequence.topk_logprobs, expected.topk_logprobs, atol=2e-5)
        assert [each[0] for each in mine[3].top] == expected.topk_ids[3].tolist()


def test_a_cancelled_request_ends_and_leaves_the_others(sampler: VllmSampler) -> None:
    sampler.submit("long", None, ask(prompt(4), 8, max_tokens=250))
    sampler.submit("short", None, ask(prompt(4), max_tokens=2))
    sampler.cancel("long")
    sampler.cancel("unknown")
    ended = []
    while sampler.busy():
        ended += sampler.step()
    assert [key for key, _ in ended] == ["short"]


def test_the_prefix_cache_is_shared_within_a_tenant_only(sampler: VllmSampler) -> None:
    """T9: the same prompt of two tenants is computed twice."""

    def cached(salt: str) -> int:
        seen: list[int] = []
        generate = sampler._engine.generate

        async def spied(*args: Any, **kwargs: Any) -> Any:
            async for output in generate(*args, **kwargs):
                seen.append(output.num_cached_tokens)
                yield output

        sampler._engine.generate = spied
        try:
            run(sampler, [(None, replace(ask(prompt(200, seed=77), max_tokens=1), salt=salt))])
        finally:
            del sampler._engine.generate
        return seen[-1]

    assert cached("alice") == 0
    assert cached("alice") >= 128
    assert cached("bob") == 0


def test_the_death_of_the_engine_is_noticed_and_told(model: Path) -> None:
    """F9: requests under way fail, later ones too, and whoever runs us is told, also if nobody asks."""
    died = threading.Event()
    before = set(psutil.Process().children(recursive=True))
    sampler = VllmSampler(model, dtype="float32", device="cpu", on_death=died.set)
    processes = set(psutil.Process().children(recursive=True)) - before
    sampler.submit("r", None, ask(prompt(4), 4, max_tokens=250))
    next(process for process in processes if "EngineCore" in process.name()).kill()
    with pytest.raises(EngineDied, match="dead"):
        drain(sampler)
    assert died.wait(10)
    sampler.close()
    assert not psutil.wait_procs(processes, timeout=20)[1]
