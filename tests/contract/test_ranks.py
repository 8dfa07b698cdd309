"""Data parallel without Ray: real processes that share the datums of every batch, against one that runs them all."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from tests.support import ranks
from tests.support.tiny_models import make_model
from tuft_jupyter.engine.trainer import PeftTrainer

RANKS = 2


@pytest.mark.timeout(300)
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """S2-41: losses, log-probabilities and weights over several steps, with a bad datum and a checkpoint between."""
    qwen3 = make_model(tmp_path / "qwen3", "qwen3")
    spawn = get_context("spawn")
    processes = [spawn.Process(target=ranks.rank, args=(i, RANKS, qwen3, tmp_path)) for i in range(RANKS)]
    for process in processes:
        process.start()
    ranks.train(PeftTrainer(qwen3, micro_batch_tokens=32), tmp_path / "alone")
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0] * RANKS
    alone, first, second = (ranks.numbers(tmp_path / name) for name in ("alone", "all", "rank1"))
    assert first.keys() == alone.keys()
    for name, expected in alone.items():
        torch.testing.assert_close(first[name], expected, rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(first[name], second[name]), name  # no rank drifts from the others
