"""More runs than the model has room for: idle ones wait in memory or on disk, and go on as if nothing had been."""

from __future__ import annotations

import random
from pathlib import Path

import psutil
import pytest
import torch

from tests.support.datums import ask, make_datum
from tuft_jupyter.core.engine import RunMemory
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import AdamParams, ForwardBackwardResult, LoraSpec
from tuft_jupyter.engine import memory
from tuft_jupyter.engine.offload import OffloadStore
from tuft_jupyter.engine.trainer import PeftTrainer

STEP = AdamParams(learning_rate=1e-2, weight_decay=0.01)


def spec(i: int) -> LoraSpec:
    return LoraSpec(rank=2 + i % 3, alpha=8, seed=i, train_unembed=i % 2 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 1 << 30], ids=["on disk", "in host memory"])
def test_runs_that_were_put_away_go_on_bit_by_bit(qwen3: Path, tmp_path: Path, host: int) -> None:
    """With room for none but those of a call, also between a gradient and its step, against room for all."""
    crowded = PeftTrainer(qwen3, adapter_bytes=(0, host), spill=tmp_path)
    roomy = PeftTrainer(qwen3)
    runs = [str(i) for i in range(5)]
    g = random.Random(0)
    calls = [(g.choice(["pass", "pass", "step", "save"]), g.sample(runs, g.randint(1, 3))) for _ in range(40)]
    for trainer in (crowded, roomy):
        for i, run in enumerate(runs):
            trainer.create(run, spec(i))
        for turn, (kind, chosen) in enumerate(calls):
            if kind == "pass":
                batch = [(run, ask([make_datum(5 + int(run), seed=turn)])) for run in chosen]
                assert all(isinstance(r, ForwardBackwardResult) for r in trainer.forward_backward(batch))
            elif kind == "step":
                trainer.optim_step([(run, STEP) for run in chosen])
            else:
                trainer.save(chosen[0], tmp_path / f"{id(trainer)}-{turn}", optimizer=True)
    assert sum(run in crowded.bank for run in runs) <= 3
    assert sum(run in roomy.bank for run in runs) == 5
    for run in runs:
        for trainer in (crowded, roomy):
            trainer.optim_step([(run, STEP)])
        assert torch.equal(crowded.bank[run].weights, roomy.bank[run].weights)
    crowded.remove("0")
    crowded.remove("1")
    assert "gone" not in crowded.bank
    crowded.create("0", spec(9))
    with pytest.raises(UserError, match="exists already"):
        crowded.create("2", spec(2))


@pytest.mark.parametrize("host", [0, 1 << 30], ids=["on disk", "in host memory"])
def test_each_run_says_what_it_takes_of_memory(qwen3: Path, tmp_path: Path, host: int) -> None:
    """Weights and gradients at first, Adam's moments with the first step; only what is kept while it is idle."""
    trainer = PeftTrainer(qwen3, adapter_bytes=(0, host), spill=tmp_path)
    trainer.create("a", spec(0))
    weights = trainer.bank["a"].weights.nbytes
    assert trainer.memory()["a"] == RunMemory(model=2 * weights)
    trainer.optim_step([("a", STEP)])
    assert trainer.memory()["a"] == RunMemory(model=4 * weights)
    trainer.create("b", spec(1))
    assert trainer.memory()["a"] == RunMemory(idle=3 * weights if host else 0)
    trainer.remove("a")
    assert trainer.memory().keys() == {"b"}


def short_of(trainer: PeftTrainer, monkeypatch: pytest.MonkeyPatch, runs: int) -> None:
    """Have memory for so many of the runs that are in the model now."""
    size = 4 * max(adapter.weights.nbytes for adapter in trainer.bank._adapters.values())

    def free(device: torch.device) -> int:
        return runs * size - sum(4 * adapter.weights.nbytes for adapter in trainer.bank._adapters.values())

    monkeypatch.setattr(memory, "available", free)


def test_where_memory_is_short_runs_that_nobody_uses_leave_the_model_first(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = PeftTrainer(qwen3)
    for run in "ab":
        trainer.create(run, LoraSpec(4, 4, 0))
        trainer.forward_backward([(run, ask([make_datum(5)]))])
    grads = [trainer._runs[run].grads.clone() for run in "ab"]
    short_of(trainer, monkeypatch, 2)
    trainer.create("c", LoraSpec(4, 4, 0))
    assert "a" not in trainer.bank
    for run, before in zip("ab", grads, strict=True):
        assert torch.equal(trainer._runs[run].grads, before)


def test_runs_for_which_there_is_not_room_at_once_are_run_one_after_the_other(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L9: of a batch, and only who does not fit even alone is refused."""
    alone, short = PeftTrainer(qwen3), PeftTrainer(qwen3)
    batch = [(run, ask([make_datum(5, seed=i)])) for i, run in enumerate("ab")]
    for trainer in (alone, short):
        for run in "ab":
            trainer.create(run, LoraSpec(4, 4, 0))
    expected = [alone.forward_backward([item])[0] for item in batch]
    short_of(short, monkeypatch, 1)
    short.create("small", LoraSpec(1, 4, 0))  # both are away
    for ours, theirs in zip(short.forward_backward(batch), expected, strict=True):
        assert isinstance(ours, ForwardBackwardResult)
        assert isinstance(theirs, ForwardBackwardResult)
        assert ours.loss_sum == theirs.loss_sum
    monkeypatch.setattr(memory, "available", lambda device: 0)
    for ended in short.forward_backward([("a", batch[0][1]), ("small", batch[1][1])]):
        assert isinstance(ended, UserError)
    assert all(run in short.memory() for run in ("a", "b", "small"))


@pytest.mark.slow
def test_three_hundred_runs_take_the_memory_of_a_few(qwen3: Path, tmp_path: Path) -> None:
    big = LoraSpec(rank=64, alpha=64, seed=0)
    one = PeftTrainer(qwen3)
    one.create("x", big)
    size = 4 * one.bank["x"].weights.nbytes  # with its gradient and moments
    trainer = PeftTrainer(qwen3, adapter_bytes=(8 * size, 0), spill=tmp_path)

    def begin(first: int, last: int) -> int:
        for i in range(first, last):
            trainer.create(str(i), big)
            trainer.forward_backward([(str(i), ask([make_datum(3)]))])
            trainer.optim_step([(str(i), STEP)])
        return psutil.Process().memory_info().rss

    before = begin(0, 40)
    assert begin(40, 300) - before < 30 * size
    assert sum(str(i) in trainer.bank for i in range(300)) <= 9
    assert list(tmp_path.iterdir()) == []  # the file has no name: nothing is left of it
    assert isinstance(trainer.forward_backward([("0", ask([make_datum(3)]))])[0], ForwardBackwardResult)


def test_vectors_come_back_from_a_file_whose_room_is_used_again(tmp_path: Path) -> None:
    store = OffloadStore(0, tmp_path)
    vectors = [[torch.randn(n), torch.randn(3)] for n in (5, 7, 5)]
    handles = [store.put(some) for some in vectors]
    for _ in range(10):
        for i in (2, 0, 1):
            back = store.take(handles[i])
            assert all(torch.equal(a, b) for a, b in zip(back, vectors[i], strict=True))
            handles[i] = store.put(back)
    assert store._end == 4 * (5 + 7 + 5 + 9)


def test_where_the_disk_is_full_memory_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwritev", full)
    store = OffloadStore(0, tmp_path)
    vector = torch.randn(5)
    assert torch.equal(store.take(store.put([vector]))[0], vector)
