"""Adapters for sampling beyond what the model holds: in host memory beside a GPU, else in their directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.engine import checkpoint, memory
from tuft_jupyter.engine.adapter_cache import AdapterCache
from tuft_jupyter.engine.base import load_base


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directories that were read."""
    found: list[str] = []
    read = checkpoint.read

    def counted(directory: Path, *args: Any, **options: Any) -> Any:
        found.append(directory.name)
        return read(directory, *args, **options)

    monkeypatch.setattr(checkpoint, "read", counted)
    return found


def use(cache: AdapterCache, directory: Path) -> torch.Tensor:
    """What the model computes with."""
    name = cache.take(directory)
    assert name is not None
    weights = cache._bank[name].compute.clone()
    cache.give_back(name)
    return weights


@pytest.mark.parametrize("host_bytes", [0, 1 << 30, None])
def test_an_evicted_adapter_comes_back_with_the_same_bits(
    host_bytes: int | None, sampled: Path, adapters: list[Path], reads: list[str]
) -> None:
    """From host memory where there is some for it, else (as on a CPU, which has no other memory) from its files."""
    cache = AdapterCache(load_base(sampled), 1, host_bytes)
    once = [use(cache, directory) for directory in adapters]
    again = [use(cache, directory) for directory in adapters]
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)
    names = [directory.name for directory in adapters]
    assert reads == names * (1 if host_bytes else 2)


def test_host_memory_is_bounded_and_forgets_what_was_used_least_recently(
    sampled: Path, adapters: list[Path], reads: list[str]
) -> None:
    base = load_base(sampled)
    size = use(AdapterCache(base, 1), adapters[0]).nbytes
    reads.clear()
    cache = AdapterCache(load_base(sampled), 1, host_bytes=size)
    for directory in (adapters[0], adapters[1], adapters[2]):
        use(cache, directory)
    use(cache, adapters[1])
    use(cache, adapters[0])
    names = [adapters[i].name for i in (0, 1, 2, 0)]
    assert reads == names


def test_where_memory_is_short_those_that_nobody_uses_leave_first(
    sampled: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters are counted, and of a model with many experts one takes gigabytes."""
    cache = AdapterCache(load_base(sampled), 8)
    sizes = [use(cache, directory).nbytes for directory in adapters[:3]]

    def short(device: torch.device) -> int:
        held = sum(adapter.compute.nbytes for adapter in cache._bank._adapters.values())
        return sizes[0] + sizes[1] - held

    cache = AdapterCache(load_base(sampled), 8)
    monkeypatch.setattr(memory, "available", short)
    for directory in (adapters[0], adapters[1], adapters[0]):
        use(cache, directory)
    assert len(cache._bank._adapters) == 2
    in_use = [cache.take(directory) for directory in adapters[:2]]
    with pytest.raises(
        UserError, match=r"rank \d+ takes .* GB here, and .* GB are free: choose a smaller rank"
    ):
        cache.take(adapters[2])
    assert cache.take(adapters[0]) == in_use[0]
