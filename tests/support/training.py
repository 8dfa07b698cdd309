"""Short ways to train with a trainer in this process, and to look at what came of it."""

from __future__ import annotations

from torch import Tensor

from tests.support.datums import ask, make_datum
from tuft_jupyter.core.errors import TuftError
from tuft_jupyter.core.types import AdamParams, ForwardBackward, ForwardBackwardResult, LoraSpec
from tuft_jupyter.engine.trainer import PeftTrainer

SPEC = LoraSpec(rank=4, alpha=8, seed=1, train_unembed=False)
OTHER = LoraSpec(rank=7, alpha=14, seed=2, train_mlp=False)
STEP = AdamParams(learning_rate=1e-2)


def ok(result: ForwardBackwardResult | TuftError) -> ForwardBackwardResult:
    assert isinstance(result, ForwardBackwardResult), result
    return result


def forward_backward(trainer: PeftTrainer, run: str, asked: ForwardBackward) -> ForwardBackwardResult:
    trainer.check(asked)
    return ok(trainer.forward_backward([(run, asked)])[0])


def step(trainer: PeftTrainer, run: str, params: AdamParams = STEP) -> dict[str, float]:
    metrics = trainer.optim_step([(run, params)])[0]
    assert not isinstance(metrics, TuftError), metrics
    return dict(metrics)


def gradients(trainer: PeftTrainer, run: str) -> dict[str, Tensor]:
    adapter = trainer.bank[run]
    assert adapter.grads is not None
    return {name: view.clone() for name, view in adapter.split(adapter.grads).items()}


def weights(trainer: PeftTrainer, run: str) -> Tensor:
    return trainer.bank[run].weights.clone()


def warmed(trainer: PeftTrainer, run: str, spec: LoraSpec, steps: int = 2) -> None:
    """A run a few steps from its start, so that no gradient is 0."""
    trainer.create(run, spec)
    for i in range(steps):
        forward_backward(trainer, run, ask([make_datum(12, seed=100 + i)]))
        step(trainer, run)


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], limit: float = 2e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).norm()) <= limit * float(gradient.norm()), name
