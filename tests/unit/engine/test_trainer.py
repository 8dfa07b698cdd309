"""The trainer against plain PEFT and autograd, and its promises between runs."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.datums import ask, make_datum, make_policy_datum
from tests.support.plain_peft import assert_as_peft, cross_entropy, in_double, plain_peft, target_logprobs
from tests.support.tiny_models import make_model
from tests.support.training import (
    OTHER,
    SPEC,
    STEP,
    assert_same_gradients,
    forward_backward,
    gradients,
    ok,
    step,
    warmed,
    weights,
)
from tuft_jupyter.core.types import AdamParams, Datum, ForwardBackward, LoraSpec
from tuft_jupyter.engine import head
from tuft_jupyter.engine.losses import resolve
from tuft_jupyter.engine.passes import Pass
from tuft_jupyter.engine.trainer import PeftTrainer


def mixed_data() -> list[Datum]:
    g = np.random.default_rng(3)
    return [
        make_datum(9),
        make_datum(17, weights=g.normal(size=17).astype(np.float32)),
        make_datum(17, seed=5, weights=np.r_[np.zeros(9), np.ones(8)].astype(np.float32)),
        make_datum(1),
        make_datum(6, weights=np.zeros(6, np.float32)),
    ]


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("spec", [SPEC, OTHER], ids=["attention and mlp", "attention and unembedding"])
def test_losses_logprobs_and_gradients_equal_plain_peft(
    family: str, spec: LoraSpec, request: pytest.FixtureRequest
) -> None:
    """fp32, rtol 1e-5: packed, chunked and fused against one datum at a time through PEFT and autograd."""
    directory = request.getfixturevalue(family)
    trainer = PeftTrainer(directory, micro_batch_tokens=32)
    warmed(trainer, "run", spec)
    data = mixed_data()
    result = forward_backward(trainer, "run", ask(data))
    peft = plain_peft(directory, spec, trainer.bank.state_dict("run"))
    loss, logprobs, theirs = cross_entropy(peft, data)
    assert result.loss_sum == pytest.approx(loss, rel=1e-5)
    assert result.metrics == {"loss:sum": result.loss_sum}
    for mine, theirs_ in zip(result.logprobs, logprobs, strict=True):
        np.testing.assert_allclose(mine, theirs_.numpy(), rtol=1e-5, atol=1e-5)
    assert_as_peft(gradients(trainer, "run"), theirs, lambda: cross_entropy(in_double(peft), data)[2])


def test_several_targets_per_position_equal_plain_peft(qwen3: Path) -> None:
    g = np.random.default_rng(1)
    data = [
        make_datum(n, seed=n) if k is None else
        make_datum(n, target_tokens=g.integers(0, 320, (n, k)), weights=g.normal(size=(n, k)).astype(np.float32))
        for n, k in ((5, 3), (8, None), (5, 2), (7, 3))
    ]  # fmt: skip
    trainer = PeftTrainer(qwen3)
    warmed(trainer, "run", OTHER)
    result = forward_backward(trainer, "run", ask(data))
    loss, logprobs, theirs = cross_entropy(plain_peft(qwen3, OTHER, trainer.bank.state_dict("run")), data)
    assert result.loss_sum == pytest.approx(loss, rel=1e-5)
    for mine, expected in zip(result.logprobs, logprobs, strict=True):
        assert mine.shape == expected.shape
        np.testing.assert_allclose(mine, expected.numpy(), rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(trainer, "run"), theirs)


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_policy_losses_reach_the_adapter_as_autograd_would_take_them(qwen3: Path, loss_fn: str) -> None:
    g = np.random.default_rng(2)
    data = [
        make_policy_datum(n, sequence_ratio_mask=(g.random(n) > 0.3).astype(np.float32)) for n in (11, 30, 5)
    ]
    trainer = PeftTrainer(qwen3, micro_batch_tokens=40)
    warmed(trainer, "run", OTHER)
    result = forward_backward(trainer, "run", ask(data, loss_fn))
    loss, config = resolve(loss_fn, {})
    peft = plain_peft(qwen3, OTHER, trainer.bank.state_dict("run"))
    total = 0.0
    for datum in data:
        logprobs = target_logprobs(peft, datum)
        inputs = {n: torch.from_numpy(v) for n, v in datum.inputs.items() if n != "target_tokens"}
        values, slopes = loss.formula(logprobs.detach(), inputs, config)
        total += float(values.sum())
        logprobs.backward(slopes)
    theirs = {n.replace(".default", ""): p.grad for n, p in peft.named_parameters() if p.grad is not None}
    assert result.loss_sum == pytest.approx(total, rel=1e-5, abs=1e-4)  # positive and negative terms cancel
    assert result.weight_sum == sum(int((d.inputs["advantages"] != 0).sum()) for d in data)
    assert_same_gradients(gradients(trainer, "run"), theirs, 1e-5)


def test_a_run_without_weights_shares_a_pass_with_others(qwen3: Path) -> None:
    """Also where only its prompt falls into a chunk of the head: nothing fails, nothing is run twice."""
    trainer = PeftTrainer(qwen3)
    for run, spec in (("a", SPEC), ("b", OTHER)):
        warmed(trainer, run, spec)
    silent = ask([make_datum(9, weights=np.zeros(9, np.float32))])
    batch = Pass(trainer.base, [("a", silent), ("b", ask([make_datum(8)]))], 64)
    first, second = batch.run()
    assert first.loss_sum == 0
    assert second.loss_sum > 0


def test_the_head_in_chunks_equals_the_head_in_one(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [*mixed_data(), make_datum(7, target_tokens=np.zeros((7, 2), np.int64))]
    policy = [make_policy_datum(30, sequence_ratio_mask=np.ones(30, np.float32))]
    found = []
    for chunk in (1 << 20, 5 * 320):
        monkeypatch.setattr(head, "_CHUNK_ELEMENTS", {"cpu": chunk})
        monkeypatch.setattr(head, "_SMALLEST_CHUNK", 1)
        trainer = PeftTrainer(qwen3)
        warmed(trainer, "run", OTHER)
        a = forward_backward(trainer, "run", ask(data))
        b = forward_backward(trainer, "run", ask(policy, "gspo"))
        found.append((a.loss_sum, b.loss_sum, gradients(trainer, "run")))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    assert_same_gradients(found[0][2], found[1][2])


def test_missing_weights_are_ones(qwen3: Path) -> None:
    """S1-36: a cross_entropy datum without weights counts every token once."""
    trainer = PeftTrainer(qwen3)
    warmed(trainer, "run", SPEC)
    found = []
    for data in ([make_datum(4)], [make_datum(4, weights=np.ones(4, np.float32))]):
        result = forward_backward(trainer, "run", ask(data))
        found.append((result.loss_sum, result.weight_sum, gradients(trainer, "run")))
        step(trainer, "run", AdamParams(learning_rate=0))
    assert found[0][:2] == found[1][:2]
    assert found[0][1] == 4
    assert_same_gradients(found[0][2], found[1][2], 0)


def test_the_answer_has_one_logprob_per_token_and_a_loss_sum(qwen3: Path) -> None:
    """S1-37: four tokens give four log-probabilities; the metrics are floats and not empty."""
    trainer = PeftTrainer(qwen3)
    trainer.create("run", SPEC)
    result = forward_backward(trainer, "run", ask([make_datum(4)]))
    assert [p.shape for p in result.logprobs] == [(4,)]
    assert result.logprobs[0].dtype == np.float32
    assert result.metrics["loss:sum"] == pytest.approx(-float(result.logprobs[0].sum()), rel=1e-6)


def test_chunks_of_a_batch_equal_the_batch(qwen3: Path) -> None:
    data = mixed_data()
    trainer = PeftTrainer(qwen3)
    for run in ("whole", "chunks"):
        warmed(trainer, run, SPEC)
    whole = forward_backward(trainer, "whole", ask(data))
    parts = [forward_backward(trainer, "chunks", ask([datum])) for datum in data]
    assert sum(part.loss_sum for part in parts) == pytest.approx(whole.loss_sum, rel=1e-6)
    assert sum(part.weight_sum for part in parts) == whole.weight_sum
    assert_same_gradients(gradients(trainer, "chunks"), gradients(trainer, "whole"))


def test_a_forward_pass_gives_the_same_numbers_and_no_gradient(qwen3: Path) -> None:
    trainer = PeftTrainer(qwen3)
    warmed(trainer, "run", SPEC)
    both = [ask([make_datum(9), make_datum(4)], backward=backward) for backward in (False, True)]
    looked = forward_backward(trainer, "run", both[0])
    assert not any(g.any() for g in gradients(trainer, "run").values())
    learned = forward_backward(trainer, "run", both[1])
    assert looked.loss_sum == learned.loss_sum
    for a, b in zip(looked.logprobs, learned.logprobs, strict=True):
        assert np.array_equal(a, b)


# ---- several runs


def one_of_each(i: int) -> list[tuple[str, ForwardBackward]]:
    return [
        ("a", ask([make_datum(9, seed=i), make_datum(9, seed=i + 50)])),
        ("b", ask([make_policy_datum(13, seed=i)], "ppo")),
        ("c", ask([make_datum(5, seed=i)])),
    ]


SPECS = {"a": SPEC, "b": OTHER, "c": LoraSpec(rank=2, alpha=16, seed=3, train_attn=False)}


def train(trainer: PeftTrainer, runs: Sequence[str], *, together: bool) -> None:
    for run in runs:
        trainer.create(run, SPECS[run])
    for i in range(3):
        batch = [(run, asked) for run, asked in one_of_each(i) if run in runs]
        for part in [batch] if together else [[item] for item in batch]:
            for result in trainer.forward_backward(part):
                ok(result)
        trainer.optim_step([(run, STEP) for run in runs])


def test_tenants_in_one_pass_equal_each_alone(qwen3: Path) -> None:
    """F15: different ranks, alphas, targets and losses share every pass; nobody's numbers change."""
    together = PeftTrainer(qwen3)
    train(together, "abc", together=True)
    for run in "abc":
        alone = PeftTrainer(qwen3)
        train(alone, [run], together=True)
        difference = (weights(together, run) - weights(alone, run)).norm() / weights(alone, run).norm()
        assert float(difference) <= 1e-5, run


def test_tenants_interleaved_at_random_equal_each_alone_bit_by_bit(qwen3: Path) -> None:
    """F15, P7: eight runs, calls in random order; every adapter has the bits it gets alone."""
    runs = {f"run{i}": LoraSpec(rank=1 + i % 4, alpha=8, seed=i, train_mlp=i % 2 == 0) for i in range(8)}

    def calls(trainer: PeftTrainer, run: str) -> Iterator[Callable[[], object]]:
        yield lambda: trainer.create(run, runs[run])
        for i in range(3):
            asked = ask([make_datum(7, seed=i), make_datum(3, seed=runs[run].seed)])
            yield lambda asked=asked: forward_backward(trainer, run, asked)
            yield lambda: step(trainer, run, AdamParams(learning_rate=1e-2, weight_decay=0.1))

    mixed = PeftTrainer(qwen3)
    waiting = {run: calls(mixed, run) for run in runs}
    rng = random.Random(0)
    while waiting:
        run = rng.choice(sorted(waiting))
        call = next(waiting[run], None)
        if call is None:
            del waiting[run]
        else:
            call()
    for run in runs:
        alone = PeftTrainer(qwen3)
        for call in calls(alone, run):
            call()
        assert torch.equal(weights(mixed, run), weights(alone, run)), run


def test_a_run_that_is_removed_leaves_no_tensor_behind(qwen3: Path) -> None:
    """L7: neither weights, gradients nor moments, in whatever layers they took part; at once, on a GPU it counts."""
    trainer = PeftTrainer(qwen3)
    held = []
    for run in ("first", "second"):
        warmed(trainer, run, SPEC)
        live = trainer._runs[run]
        held += [weakref.ref(live.adapter.weights), weakref.ref(live.grads)]
        held += [weakref.ref(vector) for vector in live.adam.moments]
        del live
    trainer.remove("first")
    assert [vector() is None for vector in held] == [True] * 4 + [False] * 4


def test_weight_decay_of_one_run_leaves_the_others_untouched(qwen3: Path) -> None:
    trainer = PeftTrainer(qwen3)
    for run in ("a", "b"):
        warmed(trainer, run, SPEC)
    before = weights(trainer, "b")
    for _ in range(5):
        step(trainer, "a", AdamParams(learning_rate=0.1, weight_decay=0.5))
    assert torch.equal(weights(trainer, "b"), before)


def test_the_same_calls_give_the_same_bits(qwen3: Path) -> None:
    """S1-38: a second run with the same seed is identical, and a step changes what forward says."""
    trainer = PeftTrainer(qwen3, micro_batch_tokens=24)
    seen = []
    for run in ("first", "second"):
        trainer.create(run, SPEC)
        before = forward_backward(trainer, run, ask([make_datum(8)], backward=False))
        for i in range(3):
            forward_backward(
                trainer, run, ForwardBackward([*mixed_data(), make_datum(20, seed=i)], "cross_entropy")
            )
            step(trainer, run)
        after = forward_backward(trainer, run, ask([make_datum(8)], backward=False))
        assert not np.array_equal(before.logprobs[0], after.logprobs[0])
        seen.append((after.loss_sum, weights(trainer, run)))
    assert seen[0][0] == seen[1][0]
    assert torch.equal(seen[0][1], seen[1][1])


# ---- optimizer


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_steps_are_those_of_torch_adamw(qwen3: Path, clip: float) -> None:
    params = AdamParams(
        learning_rate=3e-3, beta1=0.8, beta2=0.97, eps=1e-7, weight_decay=0.1, grad_clip_norm=clip
    )
    trainer = PeftTrainer(qwen3)
    trainer.create("run", SPEC)
    mirror = torch.nn.Parameter(weights(trainer, "run"))
    adamw = torch.optim.AdamW([mirror], lr=3e-3, betas=(0.8, 0.97), eps=1e-7, weight_decay=0.1)
    for i in range(4):
        if i != 2:  # a step without gradients is one with gradients of 0
            forward_backward(trainer, "run", ask([make_datum(10, seed=i)]))
        grads = trainer.bank["run"].grads
        assert grads is not None
        mirror.grad = grads.clone()
        norm = torch.nn.utils.clip_grad_norm_([mirror], clip) if clip else mirror.grad.norm()
        metrics = step(trainer, "run", params)
        adamw.step()
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-6)
        assert metrics["grad_norm_clipped"] == pytest.approx(min(float(norm), clip or np.inf), rel=1e-6)
        assert metrics["learning_rate"] == 3e-3
        assert metrics["step"] == i + 1
        assert not grads.any()
        torch.testing.assert_close(weights(trainer, "run"), mirror.detach(), rtol=1e-6, atol=1e-8)


def test_training_lowers_the_loss_it_is_trained_on(qwen3: Path) -> None:
    trainer = PeftTrainer(qwen3)
    trainer.create("run", SPEC)
    asked = ask([make_datum(12)])
    first = forward_backward(trainer, "run", asked).loss_sum
    for _ in range(15):
        step(trainer, "run")
        last = forward_backward(trainer, "run", asked).loss_sum
    assert last < 0.5 * first


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_models_train_with_fp32_adapters(tmp_path: Path, tied: bool) -> None:
    trainer = PeftTrainer(make_model(tmp_path / "m", tied=tied, dtype=torch.bfloat16), dtype=torch.bfloat16)
    warmed(trainer, "run", LoraSpec(rank=4, alpha=8, seed=1))
    exact = PeftTrainer(tmp_path / "m", dtype=torch.float32)
    exact.create("run", LoraSpec(rank=4, alpha=8, seed=1))
    exact.bank["run"].weights.copy_(weights(trainer, "run"))
    asked = ask([make_datum(20), make_datum(30, seed=1)])
    rounded, true = (forward_backward(t, "run", asked) for t in (trainer, exact))
    assert rounded.loss_sum == pytest.approx(true.loss_sum, rel=2e-2)
    a, b = (torch.cat([g.flatten() for g in gradients(t, "run").values()]) for t in (trainer, exact))
    assert float((a - b).norm() / b.norm()) < 0.1
