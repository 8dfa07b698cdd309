"""Every way a request can be wrong is told by datum, field and limit."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.datums import ask, make_datum, make_policy_datum
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import AdamParams, Datum, ForwardBackward
from tuft_jupyter.engine.checks import check_adam, check_request

VOCAB, LENGTH = 320, 64
GOOD = make_datum(6)


def check(made: ForwardBackward) -> None:
    check_request(made, vocab_size=VOCAB, max_length=LENGTH)


def changed(datum: Datum, **inputs: object) -> Datum:
    return Datum(datum.tokens, {k: v for k, v in {**datum.inputs, **inputs}.items() if v is not None})  # type: ignore[dict-item]


POLICY = make_policy_datum(6)
FLOATS = np.ones(6, np.float32)
NO_TOKENS = np.array([], np.int32)


def tokens(*ids: int) -> Datum:
    return Datum(np.array(ids, np.int32), {"target_tokens": np.ones(len(ids), np.int64)})


def targets(*shape: int, value: int = 0, **inputs: object) -> Datum:
    return changed(GOOD, target_tokens=np.full(shape, value), **inputs)


def weighted(*values: float | str) -> Datum:
    numbers = all(isinstance(value, float) for value in values)
    return changed(GOOD, weights=np.array(values, np.float32 if numbers else None))


BAD_DATA: dict[str, tuple[str, Datum, list[str]]] = {
    "token id": ("cross_entropy", tokens(1, VOCAB), ["model_input", "320"]),
    "negative token id": ("cross_entropy", tokens(-1), ["model_input", "-1"]),
    "no tokens": (
        "cross_entropy",
        Datum(NO_TOKENS, {"target_tokens": NO_TOKENS}),
        ["model_input", "no tokens"],
    ),
    "too long": ("cross_entropy", make_datum(LENGTH + 1), ["model_input", "65", "64"]),
    "no targets": ("cross_entropy", Datum(GOOD.tokens, {}), ["target_tokens"]),
    "float targets": ("cross_entropy", changed(GOOD, target_tokens=FLOATS), ["target_tokens", "float32"]),
    "short targets": ("cross_entropy", targets(5), ["target_tokens", "5", "6"]),
    "target id": ("cross_entropy", targets(6, value=VOCAB), ["target_tokens", "320"]),
    "ignored target": ("cross_entropy", targets(6, value=-100), ["target_tokens", "-100"]),
    "cube of targets": ("cross_entropy", targets(6, 2, 2), ["target_tokens", "[N, K]"]),
    "many targets": (
        "ppo",
        changed(POLICY, target_tokens=np.zeros((6, 2), np.int64)),
        ["target_tokens", "[N]"],
    ),
    "weights shape": ("cross_entropy", weighted(*[1.0] * 5), ["weights", "[5]", "[6]"]),
    "weights of many": ("cross_entropy", targets(6, 2, weights=FLOATS), ["weights", "[6, 2]"]),
    "weights nan": (
        "cross_entropy",
        weighted(1.0, 1.0, np.nan, 1.0, 1.0, 1.0),
        ["weights", "element 2", "gradients of your loss"],
    ),
    "weights text": ("cross_entropy", weighted(*"abcdef"), ["weights", "numbers"]),
    "no advantages": (
        "importance_sampling",
        changed(POLICY, advantages=None),
        ["advantages", "importance_sampling"],
    ),
    "no logprobs": ("dro", changed(POLICY, logprobs=None), ["logprobs"]),
    "infinite logprobs": ("cispo", changed(POLICY, logprobs=-np.inf * FLOATS), ["logprobs", "element 0"]),
    "no ratio mask": ("gspo", POLICY, ["sequence_ratio_mask"]),
    "weights of a policy": ("ppo", changed(POLICY, weights=2 * FLOATS), ["weights", "advantages"]),
    "short thresholds": (
        "ppo",
        changed(POLICY, clip_low_threshold=FLOATS[:3]),
        ["clip_low_threshold", "[3]"],
    ),
}


@pytest.mark.parametrize(("loss_fn", "datum", "words"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_a_bad_datum_is_named_with_its_field(loss_fn: str, datum: Datum, words: list[str]) -> None:
    """S1-19, S1-30: over the model's length, outside the vocabulary, and every other bad input."""
    good = changed(POLICY, sequence_ratio_mask=FLOATS) if loss_fn != "cross_entropy" else GOOD
    with pytest.raises(UserError) as refusal:
        check(ask([good, datum], loss_fn))
    assert refusal.value.message.startswith("datum 1: ")
    for word in words:
        assert word in refusal.value.message


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(UserError, match="empty"):
        check(ask([]))


def test_inputs_that_a_loss_does_not_use_are_ignored() -> None:
    check(ask([changed(GOOD, mask=FLOATS, logprobs=np.ones(3, np.float32))]))
    check(ask([changed(POLICY, weights=FLOATS, mask=FLOATS)], "importance_sampling"))


def test_what_the_limits_allow_is_accepted() -> None:
    check(ask([make_datum(LENGTH)]))
    edge = changed(GOOD, target_tokens=np.full((6, 3), VOCAB - 1), weights=-np.ones((6, 3), np.float32))
    check(ask([edge]))


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (AdamParams(learning_rate=float("nan")), "learning_rate"),
        (AdamParams(learning_rate=-1e-4), "learning_rate"),
        (AdamParams(beta1=1.0), "beta1"),
        (AdamParams(beta2=float("nan")), "beta2"),
        (AdamParams(eps=-1e-8), "eps"),
        (AdamParams(eps=0.0), "eps"),
        (AdamParams(eps=1e-46), "eps"),
        (AdamParams(weight_decay=float("inf")), "weight_decay"),
        (AdamParams(grad_clip_norm=-1.0), "grad_clip_norm"),
    ],
)
def test_a_step_that_cannot_be_taken_is_named(params: AdamParams, field: str) -> None:
    with pytest.raises(UserError, match=f"adam_params: {field} must be"):
        check_adam(params)
