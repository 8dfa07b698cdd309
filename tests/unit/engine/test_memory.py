"""When memory is short: layers are computed again, a batch is split once, and only what cannot fit fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from tests.support.datums import ask, make_datum
from tests.support.tiny_models import make_model
from tuft_jupyter.core.errors import TuftError, UserError
from tuft_jupyter.core.types import LoraSpec
from tuft_jupyter.engine import memory
from tuft_jupyter.engine.trainer import PeftTrainer

SPEC = LoraSpec(rank=4, alpha=8, seed=1, train_unembed=False)


def started(directory: Path, **options: Any) -> PeftTrainer:
    trainer = PeftTrainer(directory, **options)
    for run in ("a", "b"):
        trainer.create(run, SPEC)
        trainer.bank[run].weights.normal_(std=0.1, generator=torch.Generator().manual_seed(5))
        trainer.bank[run].refresh()
    return trainer


def gradients(trainer: PeftTrainer, run: str) -> Tensor:
    grads = trainer.bank[run].grads
    assert grads is not None
    return grads.clone()


@pytest.mark.parametrize("family", ["qwen3", "mistral"], ids=["written out", "modules"])
def test_layers_computed_again_give_the_same_bits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = {"sliding_window": 4} if family == "mistral" else {}
    directory = make_model(tmp_path, family, **extra)
    batch = [("a", ask([make_datum(40), make_datum(9)])), ("b", ask([make_datum(23)]))]
    found = []
    for free in (1 << 50, 1000):
        trainer = started(directory)
        monkeypatch.setattr(memory, "available", lambda device, free=free: free)
        assert memory.is_tight(trainer.base, 72) is (free == 1000)
        first, second = trainer.forward_backward(batch)
        assert not isinstance(first, TuftError)
        assert not isinstance(second, TuftError)
        found.append((first.loss_sum, second.loss_sum, gradients(trainer, "a"), gradients(trainer, "b")))
    (a1, b1, *kept), (a2, b2, *again) = found
    assert (a1, b1) == (a2, b2)
    for one, other in zip(kept, again, strict=True):
        assert one.abs().sum() > 0
        assert torch.equal(one, other)


def live_peak(trainer: PeftTrainer, tokens: int) -> int:
    """Highest sum of live memory in a pass over one datum, above its start."""
    from torch.profiler import ProfilerActivity, profile

    batch = [("a", ask([make_datum(tokens)]))]
    trainer.forward_backward(batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trainer.forward_backward(batch)
    live = peak = 0
    events: list[Any] = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_what_is_computed_again_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = started(make_model(tmp_path, layers=8))
    kept = live_peak(trainer, 300)
    assert kept <= 1.5 * memory.activations(trainer.base, 300)  # the estimate is of the right size
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    assert live_peak(trainer, 300) < 0.5 * kept


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where control groups are, and none yet."""
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    memory._limits.cache_clear()
    yield tmp_path
    memory._limits.cache_clear()


@pytest.mark.parametrize(
    ("own", "files"),
    [
        (
            "0::/",
            {
                "memory.max": "9000000", "memory.current": "5000000",
                "memory.stat": "inactive_file 300000\nactive_file 700000",
            },
        ),
        (
            "0::/users/alice\n",  # JupyterHub's systemdspawner: a limit for each user, and one for all
            {
                "users/alice/memory.max": "max", "users/memory.max": "9000000", "users/memory.current": "5000000",
                "users/memory.stat": "anon 1\ninactive_file 1000000", "memory.max": "90000000",
                "memory.current": "6000000", "memory.stat": "",
            },
        ),
        (
            "5:cpu:/\n4:memory:/docker/1f\n0::/",  # the container's own is the top one that it sees
            {
                "memory/memory.limit_in_bytes": "9000000", "memory/memory.usage_in_bytes": "5000000",
                "memory/memory.stat": "total_inactive_file 1000000",
            },
        ),
    ],
)  # fmt: skip
def test_memory_ends_where_the_container_does(own: str, files: dict[str, str], groups: Path) -> None:
    """Else a pod of 4 GB on a machine of 256 is killed instead of told that something does not fit."""
    (groups / "own").write_text(own)
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    assert memory.available(torch.device("cpu")) == 5_000_000
    assert memory.total() == 9_000_000
    assert memory.for_adapters(torch.device("cpu")) == (1_125_000, 0)


@pytest.mark.parametrize("own", [None, "", "0::/", "3:cpu:/\n2:memory:/gone"])
def test_without_a_limit_memory_is_the_machines(own: str | None, groups: Path) -> None:
    if own is not None:
        (groups / "own").write_text(own)
    assert memory.total() == psutil.virtual_memory().total
    assert memory.available(torch.device("cpu")) > 0


def test_sizes_may_differ_from_layer_to_layer(qwen3: Path) -> None:
    """The largest counts: a configuration has a list where most have a number (Gemma 3n, Hunyuan's MoE)."""
    base = started(qwen3).base
    config = vars(base.hf.config)  # Qwen's own class takes no lists
    kept = memory.activations(base, 9)
    config["intermediate_size"] = [16, config["intermediate_size"]]
    assert memory.activations(base, 9) == kept
    config |= {"num_experts_per_tok": [1, 4], "moe_intermediate_size": [8, 512]}
    assert memory.activations(base, 9) > kept


def short_of(trainer: PeftTrainer, monkeypatch: pytest.MonkeyPatch, limit: int) -> list[int]:
    """Have every pass over more than ``limit`` tokens run out of memory; the tokens of the passes tried."""
    tried: list[int] = []
    run = trainer.base.run

    class Short:
        def __call__(self, packed: Any, *args: Any, **options: Any) -> Any:
            tried.append(packed.tokens)
            if packed.tokens > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return run(packed, *args, **options)

    from dataclasses import replace

    monkeypatch.setattr(trainer, "base", replace(trainer.base, run=Short()))
    return tried


def test_a_batch_that_runs_out_of_memory_is_split_once(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """L9: everybody is answered, in smaller passes, with the gradients of the larger ones."""
    batch = [("a", ask([make_datum(20), make_datum(15)])), ("b", ask([make_datum(18)]))]
    calm, short = started(qwen3, micro_batch_tokens=64), started(qwen3, micro_batch_tokens=64)
    expected = calm.forward_backward(batch)
    tried = short_of(short, monkeypatch, limit=40)
    results = short.forward_backward(batch)
    assert tried[0] == 53
    assert max(tried[1:]) <= 32
    for mine, theirs in zip(results, expected, strict=True):
        assert not isinstance(mine, TuftError)
        assert not isinstance(theirs, TuftError)
        assert mine.loss_sum == pytest.approx(theirs.loss_sum, rel=1e-6)
    for run in ("a", "b"):
        torch.testing.assert_close(gradients(short, run), gradients(calm, run), rtol=1e-4, atol=1e-5)


def test_only_the_op_that_cannot_fit_fails(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """L9: the error names datums and tokens, the others get their answers, and nothing of it is left behind."""
    trainer = started(qwen3, micro_batch_tokens=64)
    short_of(trainer, monkeypatch, limit=40)
    large, small = ask([make_datum(50), make_datum(7)]), ask([make_datum(18)])
    refused, answered = trainer.forward_backward([("a", large), ("b", small)])
    assert isinstance(refused, UserError)
    assert "2 datums of together 57 tokens, the longest 50" in refused.message
    assert not isinstance(answered, TuftError)
    assert gradients(trainer, "a").abs().sum() == 0
    assert gradients(trainer, "b").abs().sum() > 0


def test_who_has_no_memory_for_the_way_back_to_its_gradient_fails_alone(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L9: an accumulated gradient is copied before more is added to it; of a model with experts it has gigabytes."""
    trainer = started(qwen3)
    batch = [(run, ask([make_datum(9)])) for run in ("a", "b")]
    trainer.forward_backward(batch[:1])
    before, own, clone = gradients(trainer, "a"), trainer.bank["a"].grads, torch.Tensor.clone

    def short(tensor: Tensor, **options: Any) -> Tensor:
        if tensor is own:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return clone(tensor, **options)

    monkeypatch.setattr(torch.Tensor, "clone", short)
    refused, answered = trainer.forward_backward(batch)
    assert isinstance(refused, UserError)
    assert not isinstance(answered, TuftError)
    assert own is not None
    assert torch.equal(own, before)
