"""The two engines over the same weights: they give one another's tokens the same numbers, and draw by them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support import datums
from tests.support.sampling import ask, prompt, run
from tuft_jupyter.core.types import AdamParams, Datum, ForwardBackwardResult, LoraSpec
from tuft_jupyter.engine.torch_sampler import TorchSampler
from tuft_jupyter.engine.trainer import PeftTrainer


@pytest.fixture(scope="module")
def trainer(qwen3: Path) -> PeftTrainer:
    """With a run ``r`` a few steps from its start, its unembedding included."""
    made = PeftTrainer(qwen3)
    made.create("r", LoraSpec(rank=4, alpha=8, seed=1))
    for i in range(3):
        made.forward_backward([("r", datums.ask([datums.make_datum(24, seed=i)]))])
        made.optim_step([("r", AdamParams(learning_rate=2e-2))])
    return made


@pytest.fixture(scope="module")
def adapter(trainer: PeftTrainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("saved") / "r"
    trainer.save("r", target, optimizer=False)
    return target


def scored(trainer: PeftTrainer, tokens: np.ndarray) -> np.ndarray:
    """The trainer's log-probability of each token but the first."""
    datum = Datum(tokens[:-1], {"target_tokens": tokens[1:].astype(np.int64)})
    (result,) = trainer.forward_backward([("r", datums.ask([datum], backward=False))])
    assert isinstance(result, ForwardBackwardResult)
    return np.asarray(result.logprobs[0])


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 9, "top_p": 0.95}]
)
def test_logprobs_of_sampled_tokens_are_those_of_the_trainer(
    qwen3: Path, trainer: PeftTrainer, adapter: Path, params: dict[str, float]
) -> None:
    """In fp32 to 1e-4, prompt and samples, whatever they were drawn with: importance ratios begin at 1."""
    tokens = prompt(13)
    asked = ask(tokens, 4, seed=5, max_tokens=24, prompt_logprobs=True, **params)
    (answer,) = run(TorchSampler(qwen3), [(adapter, asked)])
    for sequence in answer.sequences:
        whole = np.concatenate([tokens, sequence.tokens])
        ours = np.concatenate([answer.prompt_logprobs[1:], sequence.logprobs])
        np.testing.assert_allclose(ours, scored(trainer, whole), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, -1), (0.5, -1), (1.0, 5)])
def test_a_thousand_samples_of_one_request_are_distributed_as_the_model_says(
    qwen3: Path, trainer: PeftTrainer, adapter: Path, temperature: float, top_k: int
) -> None:
    """num_samples, temperature and top_k through the engine, by a chi-squared test that another temperature fails."""
    tokens, count = prompt(7), 1000
    asked = ask(tokens, count, seed=3, max_tokens=1, temperature=temperature, top_k=top_k)
    (answer,) = run(TorchSampler(qwen3), [(adapter, asked)])
    drawn = np.array([sequence.tokens[0] for sequence in answer.sequences])
    assert len(drawn) == count

    def misfit(temperature: float) -> float:
        """Pearson's statistic, less its mean, in standard deviations."""
        logits = logprobs / temperature
        if top_k > 0:
            logits[np.argsort(-logits)[top_k:]] = -np.inf
        share = np.exp(logits - logits.max())
        expected = count * share / share.sum()
        seen = np.bincount(drawn, minlength=len(expected)).astype(float)
        common = expected >= 5
        pooled = [np.append(a[common], a[~common].sum()) for a in (seen, expected)]
        if pooled[1][-1] < 1e-9:
            pooled = [a[:-1] for a in pooled]
        free = len(pooled[0]) - 1
        return float((((pooled[0] - pooled[1]) ** 2 / pooled[1]).sum() - free) / np.sqrt(2 * free))

    logprobs = np.array(
        [scored(trainer, np.append(tokens, token).astype(np.int32))[-1] for token in range(320)], np.float64
    )
    assert abs(np.exp(logprobs).sum() - 1) < 1e-4
    assert misfit(temperature) < 5
    assert misfit(temperature * 2) > 10
