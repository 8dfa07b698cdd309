"""Adapters that are trained together, as on a GPU, get the numbers that each gets after the other."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.datums import ask, make_datum
from tests.support.training import assert_same_gradients, gradients, ok, warmed
from tuft_jupyter.core.types import LoraSpec
from tuft_jupyter.engine.grouped import Groups, groups_of
from tuft_jupyter.engine.llama import LlamaDecoder
from tuft_jupyter.engine.packing import boundaries, segments_of
from tuft_jupyter.engine.trainer import PeftTrainer

CPU = torch.device("cpu")
LENGTHS = {"equal": (6, 6, 6), "different": (5, 9, 7)}


def trainer_with(model: Path, ranks: dict[str, int], *, together: bool) -> PeftTrainer:
    trainer = PeftTrainer(model)
    assert isinstance(trainer.base.run, LlamaDecoder)
    trainer.base.run.grouped = together
    for i, (run, rank) in enumerate(ranks.items()):
        warmed(trainer, run, LoraSpec(rank=rank, alpha=6 + 5 * i, seed=i, train_unembed=i != 1))
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("rank", [8, 3], ids=["a grouped kernel", "no kernel for this rank"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_together_get_the_gradients_of_one_after_the_other(
    rank: int, lengths: tuple[int, ...], recompute: bool, qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alphas differ, one adapter leaves the unembedding out, and half of each datum is a prompt."""
    monkeypatch.setattr("tuft_jupyter.engine.memory.is_tight", lambda *_: recompute)
    seen: list[int] = []
    matmul = Groups.matmul
    monkeypatch.setattr(Groups, "matmul", lambda self, x, w: (seen.append(len(w)), matmul(self, x, w))[1])
    runs = dict.fromkeys("abc", rank)
    found = []
    for together in (False, True):
        trainer = trainer_with(qwen3, runs, together=together)
        batch = [
            (run, ask([make_datum(n, seed=n, weights=(np.arange(n) >= n // 2).astype(np.float32))]))
            for run, n in zip(runs, lengths, strict=True)
        ]
        results = [ok(result) for result in trainer.forward_backward(batch)]
        assert bool(seen) is together
        found.append(([r.loss_sum for r in results], [gradients(trainer, run) for run in runs]))
    (losses, alone), (losses_together, together_) = found
    assert losses_together == pytest.approx(losses, rel=1e-5)
    for mine, theirs in zip(together_, alone, strict=True):
        assert_same_gradients(mine, theirs)


def test_adapters_of_different_rank_are_left_to_their_own_matmuls(qwen3: Path) -> None:
    found = []
    for together in (False, True):
        trainer = trainer_with(qwen3, {"a": 8, "b": 4}, together=together)
        for result in trainer.forward_backward([("a", ask([make_datum(6)])), ("b", ask([make_datum(5)]))]):
            ok(result)
        found.append([gradients(trainer, run) for run in "ab"])
    for mine, theirs in zip(found[1], found[0], strict=True):
        assert_same_gradients(mine, theirs)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has no grouped matmul")
@pytest.mark.parametrize("columns", [slice(0, 24), slice(8, 24), slice(3, 24)])
def test_a_grouped_matmul_is_each_adapters_own(columns: slice) -> None:
    """Whole rows, a part of their columns, and one that no kernel takes."""
    lengths = (4, 7, 1)
    groups = Groups(segments_of(lengths, "abc"), CPU)
    x, w = torch.randn(12, 24)[:, columns], torch.randn(3, columns.stop - columns.start, 16)
    alone = [x[a:b] @ w[i] for i, (a, b) in enumerate(pairwise(boundaries(lengths)))]
    torch.testing.assert_close(groups.matmul(x, w), torch.cat(alone))


def test_rows_that_would_be_mostly_padding_are_not_grouped() -> None:
    assert groups_of(segments_of((90, 2, 3), "abc"), CPU) is None
    assert groups_of(segments_of((9, 9), ("a", None)), CPU) is None
    assert groups_of(segments_of((9,), "a"), CPU) is None
    assert groups_of(segments_of((9, 8), "ab"), CPU) is not None
