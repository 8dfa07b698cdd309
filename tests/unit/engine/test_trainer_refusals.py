"""What the trainer refuses, and that a request which fails leaves no trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.datums import ask, make_datum, make_policy_datum
from tests.support.training import (
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
from tuft_jupyter.core.errors import NotFound, ServerError, TuftError, UserError
from tuft_jupyter.core.types import LoraSpec
from tuft_jupyter.engine import head
from tuft_jupyter.engine.trainer import PeftTrainer


def test_a_run_that_is_not_here_fails_alone(qwen3: Path) -> None:
    trainer = PeftTrainer(qwen3)
    trainer.create("here", SPEC)
    lost, found = trainer.forward_backward([("gone", ask([make_datum(4)])), ("here", ask([make_datum(4)]))])
    assert isinstance(lost, NotFound)
    assert "gone" in lost.message
    ok(found)
    metrics, lost_step = trainer.optim_step([("here", STEP), ("gone", STEP)])
    assert isinstance(lost_step, NotFound)
    assert not isinstance(metrics, TuftError)


def test_a_request_that_fails_leaves_no_trace_and_fails_alone(qwen3: Path) -> None:
    """Its own earlier gradient stays, other requests of the pass get the numbers they get alone."""
    exploding = ask(
        [
            make_policy_datum(6),
            make_policy_datum(20, seed=1, logprobs=np.full(20, -500, np.float32)),
        ],
        "importance_sampling",
    )
    asked = ask([make_datum(9)])
    trainer, alone = (PeftTrainer(qwen3, micro_batch_tokens=16) for _ in range(2))
    for t in (trainer, alone):
        for run in ("a", "b"):
            warmed(t, run, SPEC)
            forward_backward(t, run, ask([make_datum(11)]))
    failed, fine, same_run = trainer.forward_backward([("a", exploding), ("b", asked), ("a", asked)])
    assert isinstance(failed, UserError)
    assert failed.message.startswith("datum 1: ")
    assert "logprobs" in failed.message
    for run, result in (("b", fine), ("a", same_run)):
        assert ok(result).loss_sum == forward_backward(alone, run, asked).loss_sum
        assert_same_gradients(gradients(trainer, run), gradients(alone, run), 0)


def test_a_fault_of_the_trainer_is_no_fault_of_the_user(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = PeftTrainer(qwen3)
    trainer.create("run", SPEC)
    forward_backward(trainer, "run", ask([make_datum(9)]))
    before = gradients(trainer, "run")
    with monkeypatch.context() as broken:
        broken.setattr(head, "run", lambda *args, **kwargs: 1 / 0)
        result = trainer.forward_backward([("run", ask([make_datum(9)]))])[0]
    assert isinstance(result, ServerError)
    assert "ZeroDivisionError" in result.message
    assert_same_gradients(gradients(trainer, "run"), before, 0)


def test_a_gradient_that_is_not_finite_is_dropped_before_it_reaches_the_weights(qwen3: Path) -> None:
    trainer = PeftTrainer(qwen3)
    warmed(trainer, "run", SPEC)
    before = weights(trainer, "run")
    grads = trainer.bank["run"].grads
    assert grads is not None
    grads[3] = float("inf")
    result = trainer.optim_step([("run", STEP)])[0]
    assert isinstance(result, UserError)
    assert "not finite" in result.message
    assert torch.equal(weights(trainer, "run"), before)
    forward_backward(trainer, "run", ask([make_datum(9)]))
    assert step(trainer, "run")["grad_norm"] > 0


@pytest.mark.parametrize("rank", [0, 999])
def test_a_rank_out_of_bounds_is_refused_with_the_bound(qwen3: Path, rank: int) -> None:
    """S1-34: rank 8 is fine, rank 999 is an error that says what is allowed."""
    trainer = PeftTrainer(qwen3, max_rank=32)
    trainer.create("fine", LoraSpec(rank=8, alpha=16, seed=0))
    with pytest.raises(UserError, match=rf"rank must be from 1 to 32 .*not {rank}"):
        trainer.create("run", LoraSpec(rank=rank, alpha=16, seed=0))


@pytest.mark.parametrize("alpha", [0.0, float("nan")])
def test_an_alpha_that_means_nothing_is_refused(qwen3: Path, alpha: float) -> None:
    with pytest.raises(UserError, match="alpha"):
        PeftTrainer(qwen3).create("run", LoraSpec(rank=8, alpha=alpha, seed=0))


def test_the_limits_of_the_model_are_checked_and_named(qwen3: Path) -> None:
    """S1-19, S1-30: one token over the length, and id = vocabulary size."""
    trainer = PeftTrainer(qwen3, max_length=40)
    trainer.check(ask([make_datum(40)]))
    with pytest.raises(UserError, match="41 tokens, the model takes at most 40"):
        trainer.check(ask([make_datum(41)]))
    with pytest.raises(UserError, match="token id 320 is outside the vocabulary of 320"):
        trainer.check(ask([make_datum(3, target_tokens=np.array([1, 320, 2]))]))


def test_removed_runs_are_gone_and_their_id_is_free(qwen3: Path) -> None:
    trainer = PeftTrainer(qwen3)
    trainer.create("run", SPEC)
    with pytest.raises(UserError, match="exists already"):
        trainer.create("run", SPEC)
    trainer.remove("run")
    trainer.remove("run")
    assert isinstance(trainer.optim_step([("run", STEP)])[0], NotFound)
    trainer.create("run", SPEC)


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        PeftTrainer(tmp_path)
