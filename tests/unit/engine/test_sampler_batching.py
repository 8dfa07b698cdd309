"""The torch sampler with many requests at once: what is decoded together, and with how much memory."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.sampling import ask, drain, prompt, run, tokens_of
from tests.support.tiny_models import make_model
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.engine import kv_cache
from tuft_jupyter.engine.packing import Packed
from tuft_jupyter.engine.torch_sampler import TorchSampler


def test_places_are_refilled_as_sequences_end(sampled: Path) -> None:
    jobs = [(None, ask(prompt(3 + i, seed=i), 1 + i % 3, seed=i, max_tokens=2 + 3 * i)) for i in range(7)]
    narrow = TorchSampler(sampled, max_live=3)
    for i, (adapter, request) in enumerate(jobs):
        narrow.submit(str(i), adapter, request)
    answers: dict[str, Any] = {}
    steps = 0
    while narrow.busy():
        answers.update(narrow.step())
        steps += 1
        assert len(narrow._live) <= 3
    wide = run(TorchSampler(sampled), jobs)
    assert [tokens_of(answers[str(i)]) for i in range(7)] == [tokens_of(answer) for answer in wide]
    drawn = sum(len(s.tokens) for answer in wide for s in answer.sequences)
    assert steps < 0.6 * drawn, "sequences are decoded together"


def test_a_small_request_does_not_wait_for_a_large_one_in_the_queue(sampled: Path) -> None:
    sampler = TorchSampler(sampled, max_live=4)
    sampler.submit("large", None, ask(prompt(4), 40, max_tokens=4))
    sampler.submit("small", None, ask(prompt(4), 1, max_tokens=4))
    order = []
    while sampler.busy():
        order += [key for key, _ in sampler.step()]
    assert order == ["small", "large"]


def rows_of(sampler: TorchSampler, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each packed row that the sampler will run."""
    rows: list[int] = []
    forward = sampler._forward

    def counted(packed: Packed, *args: Any) -> torch.Tensor:
        rows.append(packed.tokens)
        return forward(packed, *args)

    monkeypatch.setattr(sampler, "_forward", counted)
    return rows


def test_a_prompt_is_run_once_for_all_its_samples(
    sampler: TorchSampler, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(sampler, monkeypatch)
    request = ask(prompt(20), 6, max_tokens=3)
    answers = run(sampler, [(adapters[0], request), (adapters[0], request), (adapters[1], request)])
    assert rows == [40, 18, 18]
    assert all(len(answer.sequences) == 6 for answer in answers)


def test_a_long_prompt_holds_up_nobody_who_decodes(sampled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens are run a few at a time, beside a token for everybody else in every step."""
    sampler = TorchSampler(sampled, chunk_tokens=16)
    rows = rows_of(sampler, monkeypatch)
    sampler.submit("first", None, ask(prompt(4), max_tokens=30))
    sampler.step()
    sampler.submit("long", None, ask(prompt(80, seed=1), max_tokens=4))
    drain(sampler)
    assert rows[:14] == [4, 1] + [16, 1] * 4 + [16, 2, 2, 2]


def test_a_short_prompt_passes_a_long_one(sampled: Path) -> None:
    sampler = TorchSampler(sampled, prefill_tokens=16, chunk_tokens=16)
    sampler.submit("long", None, ask(prompt(80), max_tokens=1))
    sampler.submit("short", None, ask(prompt(5), max_tokens=1))
    order = []
    while sampler.busy():
        order += [key for key, _ in sampler.step()]
    assert order == ["short", "long"]


PROMPTS = {"prompt_logprobs": True, "topk_prompt_logprobs": 3}


@pytest.mark.parametrize("options", [{"prefill_tokens": 7, "chunk_tokens": 5}, {"kv_tokens": 1100}])
def test_neither_pieces_nor_scarce_memory_change_what_is_drawn(
    sampled: Path, adapters: list[Path], options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens, and the same log-probabilities to the rounding of fp32, also of the prompt."""
    monkeypatch.setattr(kv_cache, "SMALLEST", 16)  # these prompts are short, and are to outgrow their slots
    jobs = [
        (adapter, ask(prompt(70 - 9 * i, seed=i), 3, seed=i, max_tokens=25, **PROMPTS))
        for i, adapter in enumerate([*adapters, None, adapters[0]])
    ]
    jobs.append((adapters[0], ask(prompt(70), 2, seed=0, max_tokens=9)))  # the first prompt once more
    plain = run(TorchSampler(sampled, kv_tokens=100_000), jobs)
    tight = TorchSampler(sampled, **options)
    for ours, expected in zip(run(tight, jobs), plain, strict=True):
        assert tokens_of(ours) == tokens_of(expected)
        for one, other in zip(ours.sequences, expected.sequences, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        if ours.prompt_logprobs is not None:
            np.testing.assert_allclose(ours.prompt_logprobs, expected.prompt_logprobs, atol=1e-5)
            assert np.array_equal(ours.topk_prompt_ids, expected.topk_prompt_ids)
    assert tight._cache.taken == 0


def test_memory_is_bounded_and_who_began_last_goes_on_where_it_was(
    sampled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "SMALLEST", 16)
    sampler = TorchSampler(sampled, kv_tokens=512)
    preempted: set[int] = set()
    jobs = [ask(prompt(12, seed=i), seed=i, max_tokens=80) for i in range(24)]
    for i, request in enumerate(jobs):
        sampler.submit(str(i), None, request)
    answers: dict[str, Any] = {}
    each = 2 * sum(
        k[0, :, 0].nbytes for k, _ in next(iter(_layers(sampler, answers).values())).layers.values()
    )
    while sampler.busy():
        answers.update(sampler.step())
        preempted |= {int(live.job.key) for live in sampler._preempted}
        assert sampler._cache.taken <= 512
        assert sampler._cache.bytes <= 512 * each
    assert preempted, "the memory was never short"
    assert 0 not in preempted, "who came first never waits for others"
    expected = run(TorchSampler(sampled), [(None, request) for request in jobs])
    assert [tokens_of(answers[str(i)]) for i in range(24)] == [tokens_of(answer) for answer in expected]


def _layers(sampler: TorchSampler, answers: dict[str, Any]) -> dict[int, kv_cache.Bucket]:
    """The buckets, after a first step."""
    answers.update(sampler.step())
    return sampler._cache.buckets


def test_who_waits_is_told_for_what(sampled: Path, adapters: list[Path]) -> None:
    narrow = TorchSampler(sampled, max_live=1, max_adapters=1)
    narrow.submit("a", adapters[0], ask(prompt(4), max_tokens=9))
    narrow.submit("b", None, ask(prompt(4), max_tokens=1))
    narrow.step()
    assert narrow.waits_for("a") == narrow.waits_for("never heard of") == ""
    assert narrow.waits_for("b") == "1 sequences are being decoded, which is this sampler's limit"
    full = TorchSampler(sampled, max_adapters=1, kv_tokens=512)
    for i in range(8):
        full.submit(str(i), adapters[0], ask(prompt(90, seed=i), max_tokens=4))
    full.submit("other", adapters[1], ask(prompt(4), max_tokens=1))
    full.step()
    assert "of the 512 tokens that the KV cache holds are taken" in full.waits_for("7")
    drain(full)


def test_a_prompt_that_can_never_fit_is_refused_with_the_limit(tmp_path: Path) -> None:
    sampler = TorchSampler(make_model(tmp_path / "m", max_length=1000), kv_tokens=1000)
    with pytest.raises(UserError, match=r"500 tokens; the context of 400 tokens \(two fifths of the 1000"):
        sampler.check(ask(prompt(500)))
    with pytest.raises(
        UserError, match=r"390 tokens.* 400 tokens \(two fifths.*set max_tokens to 10 or less"
    ):
        sampler.check(ask(prompt(390), max_tokens=11))
    (answer,) = run(sampler, [(None, ask(prompt(390), max_tokens=None))])
    assert [len(sequence.tokens) for sequence in answer.sequences] == [10]


def test_samples_of_a_large_request_run_its_prompt_once_though_they_begin_in_turn(
    sampled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = TorchSampler(sampled, max_live=2)
    rows = rows_of(sampler, monkeypatch)
    request = ask(prompt(40), 6, seed=3, max_tokens=3)
    (answer,) = run(sampler, [(None, request)])
    assert [row for row in rows if row > 2] == [40]
    (expected,) = run(TorchSampler(sampled), [(None, request)])
    assert tokens_of(answer) == tokens_of(expected)


def test_what_is_shared_of_a_prompt_is_shared_within_a_tenant(
    sampled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T9: the same prompt of two tenants is run twice, so its time tells neither of the other."""
    sampler = TorchSampler(sampled)
    rows = rows_of(sampler, monkeypatch)
    mine, theirs = (replace(ask(prompt(20), max_tokens=1), salt=salt) for salt in ("a", "b"))
    run(sampler, [(None, mine), (None, theirs), (None, mine)])
    assert rows == [40]


def test_cancelling_frees_the_place(sampled: Path, adapters: list[Path]) -> None:
    sampler = TorchSampler(sampled, max_live=1, max_adapters=1)
    sampler.submit("long", adapters[0], ask(prompt(4), max_tokens=80))
    sampler.submit("queued", adapters[0], ask(prompt(4), max_tokens=80))
    sampler.submit("next", adapters[1], ask(prompt(4), seed=1, max_tokens=3))
    sampler.step()
    sampler.cancel("long")
    sampler.cancel("queued")
    sampler.cancel("never heard of")
    answers = drain(sampler)
    assert list(answers) == ["next"]
    (expected,) = run(TorchSampler(sampled), [(adapters[1], ask(prompt(4), seed=1, max_tokens=3))])
    assert tokens_of(answers["next"]) == tokens_of(expected)


def test_requests_may_be_submitted_while_others_decode(sampler: TorchSampler, adapters: list[Path]) -> None:
    def send(name: str) -> None:
        for i in range(10):
            sampler.submit(f"{name}{i}", adapters[i % 3], ask(prompt(4, seed=i), seed=i, max_tokens=5))

    threads = [threading.Thread(target=send, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    answers: dict[str, Any] = {}
    while sampler.busy() or any(thread.is_alive() for thread in threads):
        answers.update(sampler.step())
    assert len(answers) == 30
    for i in range(10):
        assert tokens_of(answers[f"a{i}"]) == tokens_of(answers[f"b{i}"]) == tokens_of(answers[f"c{i}"])
