"""Drawing tokens: the right distribution, the right support, the same draw in any company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tuft_jupyter.core.types import SamplingParams
from tuft_jupyter.engine.sampling import Picker, generator

CPU = torch.device("cpu")
# Quarters: two logits are equal or clearly apart, so rounding does not decide what a filter keeps.
LOGITS = hnp.arrays(np.int64, st.integers(1, 40), elements=st.integers(-80, 80)).map(
    lambda quarters: (quarters / 4).astype(np.float32)
)


def params(**kwargs: float) -> SamplingParams:
    return SamplingParams(max_tokens=1, **kwargs)  # type: ignore[arg-type]


def draw(logits_V: np.ndarray, uniforms: list[float], **kwargs: float) -> tuple[np.ndarray, np.ndarray]:
    """One draw from the same logits for each uniform number."""
    count = len(uniforms)
    pick = Picker([params(**kwargs)] * count, len(logits_V), CPU)
    tokens, logprobs, _ = pick(torch.from_numpy(logits_V).expand(count, -1), uniforms)
    return tokens.numpy(), logprobs.numpy()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


GRID = [(i + 0.5) / 200 for i in range(200)]


@given(LOGITS, st.sampled_from([0.3, 1.0, 2.0]))
def test_tokens_follow_the_tempered_distribution(logits: np.ndarray, temperature: float) -> None:
    tokens, logprobs = draw(logits, GRID, temperature=temperature)
    shares = np.bincount(tokens, minlength=len(logits)) / len(GRID)
    np.testing.assert_allclose(shares, softmax(logits / temperature), atol=1.01 / len(GRID))
    np.testing.assert_allclose(logprobs, np.log(softmax(logits)[tokens]), atol=1e-4)


@pytest.mark.parametrize(
    "least", [{"temperature": 1e-46}, {"top_p": 1e-46}, {"temperature": 5e-324, "top_p": 0.5}]
)
def test_what_is_nothing_in_fp32_leaves_the_likeliest_token(least: dict[str, float]) -> None:
    tokens, logprobs = draw(np.array([1, 3, 2, 0], np.float32), GRID, **least)
    assert set(tokens.tolist()) == {1}
    np.testing.assert_allclose(logprobs, np.log(softmax(np.array([1, 3, 2, 0]))[1]), rtol=1e-5)


@given(LOGITS, st.integers(1, 45), st.sampled_from([0.5, 1.0]))
def test_top_k_leaves_the_k_likeliest_tokens(logits: np.ndarray, k: int, temperature: float) -> None:
    tokens, _ = draw(logits, GRID, top_k=k, temperature=temperature)
    drawn = set(tokens.tolist())
    assert len(drawn) <= k
    assert all((logits > logits[token]).sum() < k for token in drawn)
    if len(set(logits.tolist())) == len(logits):
        probs = np.where(np.argsort(np.argsort(-logits)) < k, softmax(logits / temperature), 0)
        shares = np.bincount(tokens, minlength=len(logits)) / len(GRID)
        np.testing.assert_allclose(shares, probs / probs.sum(), atol=1.01 / len(GRID))


@given(LOGITS, st.floats(0.01, 1.0), st.sampled_from([-1, 3, 10]))
def test_top_p_leaves_the_smallest_set_that_reaches_p(logits: np.ndarray, p: float, k: int) -> None:
    tokens, _ = draw(logits, GRID, top_p=p, top_k=k)
    order = np.argsort(-logits, kind="stable")
    probs = softmax(logits)[order][: k if k > 0 else None]
    before = (np.cumsum(probs) - probs) / probs.sum()
    slack = 1e-5  # of fp32 sums
    # Whatever is drawn could be in the nucleus: strictly likelier tokens do not reach p by themselves.
    for token in set(tokens.tolist()):
        likelier = before[np.searchsorted(-logits[order][: len(probs)], -logits[token])]
        assert likelier < p + slack
    if len(set(logits.tolist())) == len(logits) and abs(before - p).min() > slack:
        kept = np.where(before < p, probs, 0)
        shares = np.bincount(tokens, minlength=len(logits))[order][: len(probs)] / len(GRID)
        np.testing.assert_allclose(shares, kept / kept.sum(), atol=1.01 / len(GRID))


def test_a_wide_nucleus_is_found_beyond_the_first_candidates() -> None:
    vocab = 5000
    tokens, _ = draw(np.zeros(vocab, np.float32), [i / 600 for i in range(600)], top_p=0.9)
    assert len(set(tokens.tolist())) == 600
    rows = [params(top_p=0.9), params(top_k=2), params(temperature=0.0), params()]
    logits = torch.stack(
        [torch.zeros(vocab), torch.arange(vocab) / 9, torch.arange(vocab) / 9, torch.zeros(vocab)]
    )
    picked, *_ = Picker(rows, vocab, CPU)(logits, [0.5, 0.01, 0.5, 0.5])
    assert picked.tolist()[1:] == [vocab - 2, vocab - 1, vocab // 2]


def test_an_impossible_token_is_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf], np.float32)
    tokens, logprobs = draw(logits, [0.0, np.nextafter(1.0, 0.0), 0.5, 0.499999])
    assert tokens.tolist() == [1, 3, 3, 1]
    assert np.isfinite(logprobs).all()


@given(
    st.lists(
        st.tuples(LOGITS, st.floats(0, 0.999), st.sampled_from([0.0, 0.7, 1.0]), st.sampled_from([-1, 2]))
    )
)
def test_rows_with_different_parameters_do_not_touch_each_other(
    rows: list[tuple[np.ndarray, float, float, int]],
) -> None:
    if not rows:
        return
    vocab = 40
    logits = torch.full((len(rows), vocab), -30.0)
    for i, (values, *_) in enumerate(rows):
        logits[i, : len(values)] = torch.from_numpy(values)
    chosen = [params(temperature=t, top_k=k) for _, _, t, k in rows]
    together, *_ = Picker(chosen, vocab, CPU)(logits, [u for _, u, *_ in rows])
    for i, (_, u, *_) in enumerate(rows):
        alone, *_ = Picker([chosen[i]], vocab, CPU)(logits[i : i + 1], [u])
        assert alone.tolist() == [together[i]]


def test_a_generator_is_a_function_of_seed_and_sample() -> None:
    draws = {(seed, i): generator(seed, i).random() for seed in (0, 1, 2**64 - 1) for i in range(4)}
    assert len(set(draws.values())) == len(draws)
    assert all(generator(*key).random() == value for key, value in draws.items())
    assert generator(None, 0).random() != generator(None, 0).random()


@given(LOGITS, st.integers(0, 45), st.sampled_from([0.0, 0.5, 2.0]))
def test_processed_log_probabilities_are_those_of_what_was_drawn_from(
    logits: np.ndarray, top_k: int, temperature: float
) -> None:
    """S2-55: after temperature and filters; a greedy row has the model's own; what cannot be drawn is said so."""
    asked = [params(top_k=top_k, temperature=temperature)] * len(GRID)
    pick = Picker(asked, len(logits), CPU, len(logits), processed=True)
    tokens, logprobs, top = pick(torch.from_numpy(logits).expand(len(GRID), -1), GRID)
    told = dict(top[0])
    if temperature == 0:
        expected = np.log(softmax(logits))
    else:
        possible = sorted(set(logits.tolist()), reverse=True)
        kept = [token for token, logprob in told.items() if logprob > -1e4]
        assert len(kept) <= (top_k or len(logits))
        assert min(logits[kept]) >= possible[min(len(kept), len(possible)) - 1]
        masses = np.full(len(logits), -np.inf)
        masses[kept] = logits[kept] / temperature
        expected = np.log(softmax(masses) + 1e-300)
    np.testing.assert_allclose(logprobs.numpy(), expected[tokens.numpy()], atol=1e-4)
    np.testing.assert_allclose([told[token] for token in tokens.tolist()], logprobs.numpy(), atol=1e-4)
    assert min(told.values()) >= -99999.0
