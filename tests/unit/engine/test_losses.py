"""Loss functions against their definitions, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.engine.losses import REGISTRY, resolve


def clip(r: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(torch.maximum(r, torch.tensor(low)), torch.tensor(high))


def ratio(p: Tensor, i: dict[str, Tensor]) -> Tensor:
    return torch.exp(p - i["logprobs"])


def gspo(p: Tensor, i: dict[str, Tensor], low: float, high: float) -> Tensor:
    mask = i["sequence_ratio_mask"] != 0
    log_s = (p.detach() - i["logprobs"])[mask].mean()
    r = torch.exp(log_s + p - p.detach())
    return -torch.minimum(r * i["advantages"], clip(r, low, high) * i["advantages"]).sum()


REFERENCE: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "cross_entropy": lambda p, i: -(p * i["weights"]).sum(),
    "importance_sampling": lambda p, i: -(ratio(p, i) * i["advantages"]).sum(),
    "ppo": lambda p, i: (
        -torch.minimum(ratio(p, i) * i["advantages"], clip(ratio(p, i), 0.8, 1.2) * i["advantages"]).sum()
    ),
    "cispo": lambda p, i: -(clip(ratio(p, i), 0.8, 1.2).detach() * p * i["advantages"]).sum(),
    "dro": lambda p, i: -(p * i["advantages"] - 0.5 * 0.05 * (p - i["logprobs"]) ** 2).sum(),
    "gspo": lambda p, i: gspo(p, i, 1 - 3e-4, 1 + 4e-4),
}


def case(seed: int, spread: float, n: int = 40) -> tuple[Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    p = -torch.rand(n, generator=g) * 5
    return p, {
        "weights": torch.randn(n, generator=g),
        "logprobs": p + spread * torch.randn(n, generator=g),
        "advantages": torch.randn(n, generator=g),
        "sequence_ratio_mask": (torch.rand(n, generator=g) > 0.3).float(),
    }


@pytest.mark.parametrize("spread", [1e-4, 0.05, 0.5])
@pytest.mark.parametrize("name", list(REGISTRY))
def test_every_loss_and_its_slope_are_those_of_its_definition(name: str, spread: float) -> None:
    loss, config = resolve(name, {})
    p, inputs = case(3, spread)
    leaf = p.clone().requires_grad_()
    expected = REFERENCE[name](leaf, inputs)
    expected.backward()
    values, slopes = loss.formula(p, inputs, config)
    assert leaf.grad is not None
    torch.testing.assert_close(values.sum(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slopes, leaf.grad, rtol=1e-5, atol=1e-6)


def test_the_reference_covers_every_registered_loss() -> None:
    assert REFERENCE.keys() == REGISTRY.keys()


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_clip_thresholds_given_per_token_replace_the_configured_ones(name: str) -> None:
    p, inputs = case(5, 0.5)
    loss, config = resolve(name, {"clip_low_threshold": 0.6, "clip_high_threshold": 1.5})
    given = {
        **inputs,
        "clip_low_threshold": torch.full_like(p, 0.6),
        "clip_high_threshold": torch.full_like(p, 1.5),
    }
    _, defaults = resolve(name, {})
    for mine, configured in zip(
        loss.formula(p, given, defaults), loss.formula(p, inputs, config), strict=True
    ):
        assert torch.equal(mine, configured)


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "gspo"])
def test_positions_without_advantage_are_zero_whatever_their_logprobs(name: str) -> None:
    p, inputs = case(7, 0.1)
    inputs["advantages"][::2] = 0
    inputs["sequence_ratio_mask"] = (inputs["advantages"] != 0).float()
    inputs["logprobs"][::2] = -99999.0
    loss, config = resolve(name, {})
    values, slopes = loss.formula(p, inputs, config)
    assert torch.equal(values[::2], torch.zeros(20))
    assert torch.equal(slopes[::2], torch.zeros(20))
    assert torch.isfinite(values).all()


def test_gspo_with_an_empty_mask_has_ratio_one() -> None:
    p, inputs = case(9, 0.5)
    inputs["sequence_ratio_mask"] = torch.zeros_like(p)
    loss, config = resolve("gspo", {})
    values, _ = loss.formula(p, inputs, config)
    torch.testing.assert_close(values, -inputs["advantages"])


@pytest.mark.parametrize("name", ["stable_reinforce", "mse"])
def test_a_loss_that_is_not_here_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(UserError) as refusal:
        resolve(name, {})
    assert f'"{name}"' in refusal.value.message
    for known in REGISTRY:
        assert known in refusal.value.message


def test_stable_reinforce_is_told_what_to_use_instead() -> None:
    with pytest.raises(UserError, match=r'formula is not public\..*Use loss_fn="importance_sampling"'):
        resolve("stable_reinforce", {"kl_coeff": 0.01})


@pytest.mark.parametrize(
    ("name", "config", "names"),
    [
        ("ppo", {"clip_lo": 0.5}, ["clip_lo", "clip_low_threshold"]),
        ("cross_entropy", {"beta": 0.1}, ["beta", "none"]),
        ("dro", {"beta": float("nan")}, ["beta", "finite"]),
        ("dro", {"beta": "0.1"}, ["beta", "finite"]),
        ("ppo", {"clip_low_threshold": 1.5}, ["clip_low_threshold", "clip_high_threshold"]),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(
    name: str, config: dict[str, float | str], names: list[str]
) -> None:
    with pytest.raises(UserError) as refusal:
        resolve(name, config)
    for word in names:
        assert word in refusal.value.message
