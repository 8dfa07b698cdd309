"""Frozen weights in the order of a CPU's kernels: the same numbers, whoever else is in the row."""

from __future__ import annotations

import pytest
import torch

from tuft_jupyter.engine.frozen import Frozen, has_kernel, of, rounded

ROWS = [1, 2, 7, 8, 9, 40, 64, 65, 129, 300]


def matrix(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_both_ways_are_the_matmuls_of_the_weight(rows: int, copies: bool) -> None:
    weight, bias, x, dy, rest = (
        matrix(96, 32),
        matrix(96),
        matrix(rows, 32),
        matrix(rows, 96),
        matrix(rows, 96),
    )
    frozen = Frozen(weight, bias, copies=copies)
    y = x.double() @ weight.double().t() + bias.double()
    for ours, exact in (
        (frozen(x), y),
        (frozen.plus(x, rest), y + rest.double()),
        (frozen.pull(dy), dy.double() @ weight.double()),
    ):
        assert ours.shape == exact.shape
        assert float((ours - exact).norm()) <= 1e-6 * float(exact.norm())


@pytest.mark.skipif(not has_kernel(), reason="plain matmuls promise nothing of this")
def test_a_row_gets_the_same_bits_however_many_there_are() -> None:
    """F15, P7."""
    frozen = Frozen(matrix(96, 32), copies=True)
    x, dy = matrix(300, 32), matrix(300, 96)
    y, dx = frozen(x), frozen.pull(dy)
    for rows in ROWS[3:]:
        assert torch.equal(frozen(x[:rows]), y[:rows])
        assert torch.equal(frozen.pull(dy[300 - rows :]), dx[300 - rows :])


def test_few_numbers_of_rows_are_computed() -> None:
    sizes = {rounded(rows) for rows in range(1, 1025)}
    assert len(sizes) < 64
    assert all(0 <= rounded(rows) - rows <= max(7, rows // 4) for rows in range(1, 1025))


def test_an_unembedding_is_laid_out_once() -> None:
    linear = torch.nn.Linear(8, 16, bias=False)
    assert of(linear) is of(linear)
