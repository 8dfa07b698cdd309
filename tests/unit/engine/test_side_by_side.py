"""Adapters computed together give every row what its own adapter gives it alone."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tuft_jupyter.engine import linears as module
from tuft_jupyter.engine.linears import Linears
from tuft_jupyter.engine.lora import MultiLoraLinear
from tuft_jupyter.engine.low_rank import Slot
from tuft_jupyter.engine.packing import segments_of
from tuft_jupyter.engine.side_by_side import rows_of

INPUTS, OUTPUTS, RANK = 12, (8, 4, 4), 3
CPU = torch.device("cpu")


def layers(names: list[str], odd: str | None = None) -> tuple[nn.Module, Linears]:
    """Three linear layers with one input, their adapters' A side by side; ``odd`` has another rank."""
    torch.manual_seed(0)
    parent = nn.Module()
    for i, size in enumerate(OUTPUTS):
        setattr(parent, f"l{i}", nn.Linear(INPUTS, size))
    made = Linears(parent, "l0", "l1", "l2")
    for i in range(3):
        wrapped = MultiLoraLinear.__new__(MultiLoraLinear)
        nn.Module.__init__(wrapped)
        wrapped.slots = {}
        setattr(parent, f"l{i}", wrapped)
    for name in names:
        rank = RANK + 1 if name == odd else RANK
        a = torch.randn(3 * rank, INPUTS)
        for i, size in enumerate(OUTPUTS):
            part = a[i * rank : (i + 1) * rank]
            getattr(parent, f"l{i}").slots[name] = Slot(part, torch.randn(size, rank), 0.5, None, None)
    return parent, made


@given(st.lists(st.integers(1, 5), min_size=2, max_size=6), st.integers(0, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_together_is_what_each_is_alone(counts: list[int], bare: int, mixed: bool) -> None:
    names = [f"a{i}" for i in range(len(counts))]
    _, made = layers(names, odd=names[-1] if mixed else None)
    lengths = [bare] * bool(bare) + counts
    segments = segments_of(lengths, [None] * bool(bare) + names)
    x = torch.randn(sum(lengths), INPUTS)
    with torch.no_grad():
        rows = rows_of(segments, CPU)
        together = made.parts(segments, rows)
        expected, _ = made(x, made.parts(segments))
        found, _ = made(x, together)
    torch.testing.assert_close(found, expected)
    assert (len(together) == 1) == (rows is not None and not mixed)


def test_weights_are_copied_once_and_leave_with_their_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    real = module.SideBySide

    def counted(*args: object) -> object:
        made.append(args)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "SideBySide", counted)
    parent, linears = layers(["a", "b"])
    for counts in ([2, 2], [1, 2], [1, 1]):
        segments = segments_of(counts, ["a", "b"])
        linears.parts(segments, rows_of(segments, CPU))
    assert len(made) == 1
    made.clear()
    for i in range(3):
        getattr(parent, f"l{i}").slots.clear()
    gc.collect()
    assert not len(linears._together)


def test_few_rows_of_many_adapters_go_together_and_long_ones_do_not() -> None:
    assert rows_of(segments_of([1] * 8, [*"abcdefgh"]), CPU) is not None
    assert rows_of(segments_of([200, 200], [*"ab"]), CPU) is None
    assert rows_of(segments_of([60, 1, 1], [*"abc"]), CPU) is None, "most would be repeated rows"
    assert rows_of(segments_of([4, 4], [None, "a"]), CPU) is None
