"""KL from the sampling policy, against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from tuft_jupyter.core.types import Datum, ForwardBackward, ForwardBackwardResult
from tuft_jupyter.engine.divergence import sampled_kl


def asked(*inputs: dict[str, list[float]]) -> ForwardBackward:
    data = [
        Datum(
            np.zeros(len(next(iter(each.values()))), np.int32),
            {name: np.array(values, np.float32) for name, values in each.items()},
        )
        for each in inputs
    ]
    return ForwardBackward(data, "importance_sampling")


def answered(*logprobs: list[float]) -> ForwardBackwardResult:
    return ForwardBackwardResult([np.array(each, np.float32) for each in logprobs], 0.0, 0.0)


def test_the_estimate_is_k3_over_positions_with_an_advantage() -> None:
    request = asked(
        {"logprobs": [-1.0, -2.0, 0.0], "advantages": [1.0, -1.0, 0.0]},
        {"logprobs": [-0.5], "advantages": [2.0]},
    )
    found = sampled_kl(request, answered([-1.5, -1.0, -9.0], [-0.5]))
    ratios = np.exp([-0.5, 1.0, 0.0])
    assert found["kl_tokens"] == 3
    assert found["kl_sum"] == pytest.approx(float((ratios - 1 - np.log(ratios)).sum()))


def test_the_estimate_is_the_divergence_of_the_two_policies_on_average() -> None:
    """Drawn from the sampler, the mean of k3 tends to KL(sampler || learner)."""
    rng = np.random.default_rng(0)
    sampler, learner = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.4, 0.2])
    drawn = rng.choice(3, size=200_000, p=sampler)
    request = asked({"logprobs": np.log(sampler)[drawn].tolist(), "advantages": [1.0] * len(drawn)})
    found = sampled_kl(request, answered(np.log(learner)[drawn].tolist()))
    exact = float((sampler * np.log(sampler / learner)).sum())
    assert found["kl_sum"] / found["kl_tokens"] == pytest.approx(exact, rel=0.05)


def test_a_loss_without_a_sampler_has_none_and_what_no_number_holds_is_not_told() -> None:
    assert sampled_kl(asked({"weights": [1.0]}), answered([-1.0])) == {}
    assert sampled_kl(asked({"logprobs": [-1.0], "advantages": [0.0]}), answered([-1.0])) == {}
    assert sampled_kl(asked({"logprobs": [-9999.0], "advantages": [1.0]}), answered([-1.0])) == {}


@pytest.mark.parametrize(
    ("sampler", "advantages"), [((3,), (2,)), ((2,), (3,)), ((3,), (3,)), ((1,), (1,)), ((3, 1), (3, 1))]
)
def test_inputs_that_the_loss_does_not_take_may_have_any_shape(
    sampler: tuple[int, ...], advantages: tuple[int, ...]
) -> None:
    """Nobody checks those: distillation over [N, K] targets of data that was drawn, say."""
    given = {"logprobs": np.zeros(sampler, np.float32), "advantages": np.ones(advantages, np.float32)}
    request = ForwardBackward([Datum(np.zeros(3, np.int32), given)], "cross_entropy")
    answer = ForwardBackwardResult([np.zeros((3, 2), np.float32)], 0.0, 0.0)
    assert sampled_kl(request, answer) == {}
