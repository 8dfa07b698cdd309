"""Every loss and its slope against formulas in numpy, in double precision, that share no code with ours.

The references are written from the protocol's text. A slope is the derivative along the imaginary axis (complex step),
which needs no difference of near numbers; what a paper holds constant is passed as a second, real argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

import numpy as np
import pytest
import tinker
import torch
from numpy.typing import NDArray

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.loss_names import BUILT_IN, CUSTOM
from tuft_jupyter.engine.losses import REGISTRY, resolve

Array = NDArray[Any]
STEP = 1e-30
TOLERANCE = 1e-6


def lower(a: Array, b: Array) -> Array:
    """The smaller by real part, so that complex numbers keep to the branch."""
    return np.where(a.real <= b.real, a, b)


def within(r: Array, low: Array, high: Array) -> Array:
    """Clipped by real part; a bound is constant."""
    return np.where(r.real < low, low, np.where(r.real > high, high, r))


def clipped(r: Array, x: Mapping[str, Array]) -> Array:
    held = within(r, x["clip_low_threshold"], x["clip_high_threshold"])
    return -lower(r * x["advantages"], held * x["advantages"])


def gspo(p: Array, fixed: Array, x: Mapping[str, Array]) -> Array:
    mask = x["sequence_ratio_mask"] != 0
    log_s = (fixed - x["logprobs"])[mask].mean()
    return clipped(np.exp(log_s + p - fixed), x)


# (log-probabilities, the same held constant, inputs and settings) -> the loss at each position
REFERENCES: dict[str, Callable[[Array, Array, Mapping[str, Array]], Array]] = {
    "cross_entropy": lambda p, fixed, x: -p * x["weights"],
    "importance_sampling": lambda p, fixed, x: -np.exp(p - x["logprobs"]) * x["advantages"],
    "ppo": lambda p, fixed, x: clipped(np.exp(p - x["logprobs"]), x),
    "cispo": lambda p, fixed, x: (
        -within(np.exp(fixed - x["logprobs"]), x["clip_low_threshold"], x["clip_high_threshold"]).real
        * p
        * x["advantages"]
    ),
    "dro": lambda p, fixed, x: -(p * x["advantages"] - x["beta"] / 2 * (p - x["logprobs"]) ** 2),
    "gspo": gspo,
}

SETTINGS: dict[str, list[dict[str, float]]] = {
    "ppo": [{}, {"clip_low_threshold": 0.9}, {"clip_high_threshold": 1.05}, {"clip_low_threshold": 0.0}],
    "cispo": [{}, {"clip_low_threshold": 0.9}, {"clip_high_threshold": 1.05}, {"clip_high_threshold": 5.0}],
    "dro": [{}, {"beta": 0.0}, {"beta": 0.3}, {"beta": 2.0}],
    "gspo": [{}, {"clip_low_threshold": 0.98, "clip_high_threshold": 1.02}, {"clip_high_threshold": 1.2}],
}
CASES = [(name, settings) for name in REGISTRY for settings in SETTINGS.get(name, [{}])]


def drawn(seed: int, shape: tuple[int, ...], spread: float) -> tuple[Array, dict[str, Array]]:
    """Log-probabilities and every input a loss may ask for, in float32 as they come over the wire."""
    draw = np.random.default_rng(seed)
    p = -draw.exponential(2.0, shape)
    inputs = {
        "weights": draw.normal(size=shape),
        "logprobs": p + spread * draw.normal(size=shape),
        "advantages": draw.normal(size=shape),
        "sequence_ratio_mask": (draw.random(shape) > 0.3).astype(float),
        "clip_low_threshold": 1 - 0.3 * draw.random(shape),
        "clip_high_threshold": 1 + 0.3 * draw.random(shape),
    }
    return p.astype(np.float32), {name: values.astype(np.float32) for name, values in inputs.items()}


def check(name: str, config: Mapping[str, float], p: Array, inputs: Mapping[str, Array]) -> None:
    loss, full = resolve(name, config)
    tensors = {key: torch.from_numpy(values) for key, values in inputs.items()}
    values, slopes = loss.formula(torch.from_numpy(p), tensors, full)
    known = {key: np.asarray(value, np.float64) for key, value in {**full, **inputs}.items()}
    exact = p.astype(np.float64)
    reference = REFERENCES[name]
    expected = reference(exact + 0j, exact, known).real
    expected_slopes = reference(exact + STEP * 1j, exact, known).imag / STEP
    for ours, theirs in ((values, expected), (slopes, expected_slopes)):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=TOLERANCE, atol=TOLERANCE)
    assert abs(float(values.double().sum()) - expected.sum()) <= TOLERANCE * max(1.0, np.abs(expected).sum())


@pytest.mark.parametrize("spread", [1e-4, 0.05, 0.3])
@pytest.mark.parametrize(("name", "config"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])
def test_a_loss_equals_its_formula_in_double_precision(
    name: str, config: dict[str, float], spread: float
) -> None:
    """Values and slopes to 1e-6 on random inputs, for every setting."""
    wanted = set(REGISTRY[name].inputs) - {"clip_low_threshold", "clip_high_threshold"}
    for seed in range(5):
        p, inputs = drawn(seed, (96,), spread)
        check(name, config, p, {key: inputs[key] for key in wanted})


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_thresholds_of_each_token_are_those_of_its_formula(name: str) -> None:
    p, inputs = drawn(11, (96,), 0.2)
    check(name, {}, p, {key: inputs[key] for key in REGISTRY[name].inputs})


def test_several_targets_at_a_position_are_summed_as_their_formula_says() -> None:
    p, inputs = drawn(12, (40, 3), 0.2)
    check("cross_entropy", {}, p, {"weights": inputs["weights"]})


def test_every_loss_and_every_setting_is_held_against_a_formula() -> None:
    assert tuple(REGISTRY) == BUILT_IN
    assert REFERENCES.keys() == REGISTRY.keys()
    for name, loss in REGISTRY.items():
        tried = {key for settings in SETTINGS.get(name, [{}]) for key in settings}
        assert tried == set(loss.config), name


def test_every_name_of_the_newest_sdk_is_answered_with_numbers_or_a_reason() -> None:
    names = set(get_args(tinker.types.LossFnType))
    assert set(REGISTRY) <= names
    assert CUSTOM in names
    for name in names - set(REGISTRY) - {CUSTOM}:  # a graph of its own says what it is: test_custom_loss
        with pytest.raises(
            UserError, match=rf'loss_fn "{name}" is not available on this server: (?!it is not known)'
        ):
            resolve(name, {})
