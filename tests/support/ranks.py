"""What every process of a data-parallel trainer does in a test, and what it leaves in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.support.datums import ask, make_datum, make_policy_datum
from tuft_jupyter.core.types import AdamParams, Datum, ForwardBackward, ForwardBackwardResult, LoraSpec
from tuft_jupyter.engine.parallel import Group, ParallelTrainer
from tuft_jupyter.engine.trainer import PeftTrainer

RUNS = {
    "a": LoraSpec(rank=4, alpha=8, seed=1, train_unembed=False),
    "b": LoraSpec(rank=7, alpha=14, seed=2, train_mlp=False),
}


def rounds() -> list[list[tuple[str, ForwardBackward]]]:
    """Batches of both runs: more datums than ranks, one datum, a loss over whole sequences, one without gradients."""
    policy = [
        make_policy_datum(n, seed=n, sequence_ratio_mask=np.ones(n, np.float32)) for n in (14, 3, 25, 9, 30)
    ]
    return [
        [("a", ask([make_datum(n, seed=n) for n in (9, 31, 4, 12)])), ("b", ask([make_datum(20)]))],
        [
            ("a", ask(policy, "gspo")),
            ("b", ask(policy[:2], "ppo")),
            ("b", ask([make_datum(6)], backward=False)),
        ],
    ]


def far() -> Datum:
    """One whose importance ratio overflows."""
    return make_policy_datum(8, logprobs=np.full(8, -1e4, np.float32))


def train(trainer: PeftTrainer, out: Path) -> None:
    """A few steps, a bad datum among good ones, a save and a load; numbers and weights go to ``out``."""
    numbers: dict[str, torch.Tensor] = {}
    for run, spec in RUNS.items():
        trainer.create(run, spec)
    for turn, batch in enumerate(rounds() * 2):
        for i, result in enumerate(trainer.forward_backward(batch)):
            assert isinstance(result, ForwardBackwardResult), result
            numbers[f"{turn}.{i}.loss"] = torch.tensor([result.loss_sum, result.weight_sum])
            numbers[f"{turn}.{i}.metrics"] = torch.tensor(
                [result.metrics[key] for key in sorted(result.metrics)]
            )
            numbers[f"{turn}.{i}.logprobs"] = torch.from_numpy(np.concatenate(result.logprobs))
        bad = ask([*(make_policy_datum(n) for n in (5, 9, 2)), far()], "importance_sampling")
        fine, failed = trainer.forward_backward([("b", ask([make_datum(11), make_datum(7)])), ("a", bad)])
        assert isinstance(fine, ForwardBackwardResult), fine
        assert "datum 3: the loss is" in str(failed), failed
        trainer.optim_step([(run, AdamParams(learning_rate=1e-2)) for run in RUNS])
    trainer.save("a", out.parent / f"{out.name}.saved", optimizer=True)
    trainer.load("b2", out.parent / f"{out.name}.saved", optimizer=True)
    for run in (*RUNS, "b2"):
        numbers[f"weights.{run}"] = trainer.bank[run].weights.clone()
    save_file(numbers, out)


def rank(number: int, ranks: int, model: Path, home: Path) -> None:
    """One process."""
    torch.set_num_threads(1)
    group = Group(number, ranks, f"file://{home / 'meeting'}", "cpu")
    trainer = ParallelTrainer(model, group=group, micro_batch_tokens=32)
    mine = home / "all"
    train(trainer, mine) if number == 0 else train_beside(trainer, home, number)


def train_beside(trainer: PeftTrainer, home: Path, number: int) -> None:
    """As :func:`train`, with files of its own but the checkpoint of the first rank."""
    out = home / f"rank{number}"
    (home / f"{out.name}.saved").symlink_to(home / "all.saved")
    train(trainer, out)


def numbers(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)
