"""Small operations in one pass each: the numbers of torch's own, NaN included, and only where they are of use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.datums import ask, make_datum
from tests.support.plain_peft import distance
from tests.support.training import SPEC, forward_backward, gradients, warmed
from tuft_jupyter.engine import fused
from tuft_jupyter.engine.llama import Norm, Rope, swiglu, swiglu_back
from tuft_jupyter.engine.trainer import PeftTrainer

N, HEADS, ALL_HEADS, SIZE = 37, 3, 5, 24
DTYPES = [torch.float32, torch.bfloat16]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))).to(dtype)


def operations(dtype: torch.dtype) -> dict[str, Callable[[Tensor], tuple[Tensor, ...]]]:
    """Each takes a row of heads [N, C, E]."""
    heads = Norm(drawn(HEADS, SIZE, dtype=dtype), 1e-6)
    whole = Norm(drawn(ALL_HEADS * SIZE, dtype=dtype), 1e-6)
    rope = Rope(drawn(1, N, SIZE).cos().to(dtype), drawn(1, N, SIZE).sin().to(dtype))

    def back(norm: Norm, x: Tensor) -> tuple[Tensor, ...]:
        y, unit, scale = norm(x)
        return (norm.pull(y * y, unit, scale),)

    return {
        "norm of heads": heads,
        "norm of rows": lambda x: whole(x.flatten(1)),
        "norm of heads, back": lambda x: back(heads, x),
        "norm of rows, back": lambda x: back(whole, x.flatten(1)),
        "rotation": lambda x: (rope(x, HEADS), rope.pull(x, HEADS)),
        "SwiGLU": lambda x: (swiglu(x.flatten(1)),),
        "SwiGLU, back": lambda x: (
            swiglu_back(x.flatten(1), x.flatten(1)[:, : ALL_HEADS * SIZE // 2].clone()),
        ),
    }


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.mark.parametrize("name", operations(torch.float32))
def test_one_pass_gives_the_numbers_of_torchs_operations(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held against fp64: within an epsilon of the dtype (relative L2), as torch's are."""
    x = drawn(N, ALL_HEADS, SIZE, dtype=dtype)
    assert fused.serves(x)
    ours = operations(dtype)[name](x)
    monkeypatch.setattr(fused, "serves", lambda t: False)
    theirs = operations(dtype)[name](x)
    for mine, plain in zip(ours, theirs, strict=True):
        assert mine.shape == plain.shape
        assert mine.dtype == plain.dtype
        gap = float((mine.double() - plain.double()).norm() / plain.double().norm())
        assert gap <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", operations(torch.float32))
def test_what_is_no_number_stays_none(name: str, dtype: torch.dtype) -> None:
    """A divergence is noticed by it; other rows keep their numbers."""
    x = drawn(N, ALL_HEADS, SIZE, dtype=dtype)
    clean = operations(dtype)[name](x)
    x[5] = torch.nan
    for mine, before in zip(operations(dtype)[name](x), clean, strict=True):
        assert mine[5].isnan().all()
        others = torch.arange(N) != 5
        assert torch.equal(mine[others], before[others])


@pytest.mark.parametrize("where", ["query", "key", "value", "past"])
def test_attention_of_a_sequence_that_diverged_is_no_number_and_others_keep_theirs(
    where: str, dtype: torch.dtype
) -> None:
    rows, groups, slots = 3, 2, 16
    q, k, v = (drawn(rows, heads, SIZE, dtype=dtype) for heads in (4, groups, groups))
    keys, values = (drawn(rows, groups, slots, SIZE, dtype=dtype) for _ in range(2))

    def attended() -> Tensor:
        o = torch.empty_like(q)
        order, lengths = torch.tensor([2, 0, 1]), torch.tensor([3, 7, 11])
        fused.attend(q, k, v, keys.clone(), values.clone(), order, lengths, 0.3, None, o)
        return o

    clean = attended()
    if where == "past":
        keys[1, :, 5] = torch.nan  # of the sequence in slot 1, whose token is in row 0
    else:
        {"query": q, "key": k, "value": v}[where][0] = torch.nan
    found = attended()
    assert found[0].isnan().all()
    assert torch.equal(found[1:], clean[1:])


def test_the_largest_and_smallest_numbers_are_those_of_torch(dtype: torch.dtype) -> None:
    gate = torch.tensor(
        [-3e38, -1e30, -200.0, -88.5, -87.0, -1e-30, 0.0, 1e-38, 87.0, 88.5, 1e30, 3e38], dtype=dtype
    )
    up = torch.ones_like(gate)
    torch.testing.assert_close(swiglu(torch.cat([gate, up])[None])[0], F.silu(gate), rtol=1e-2, atol=1e-35)


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even() -> None:
    """Bit for bit: the sums are so short that only the rounding of the result counts."""
    cos = drawn(1, 4096, 2).to(torch.bfloat16)
    x = drawn(4096, 1, 2).to(torch.bfloat16)
    turned = Rope(cos, torch.zeros_like(cos))(x, 1)
    assert torch.equal(turned, x * cos[0][:, None])


def test_with_more_threads_or_on_a_gpu_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    assert fused.serves(x)
    assert not fused.serves(x.double())
    assert not fused.serves(torch.zeros(1, device="meta"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not fused.serves(x)


def test_without_numba_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python that numba does not know yet loses speed, and nothing else."""
    monkeypatch.setattr(fused, "kernels", lambda: None)
    assert not fused.serves(torch.zeros(1))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_run_trains_alike_with_either(
    family: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = PeftTrainer(request.getfixturevalue(family))
    warmed(trainer, "run", SPEC)
    asked = ask([make_datum(n, seed=n) for n in (30, 7, 19)])
    found = []
    for serves in (fused.serves, lambda t: False):
        monkeypatch.setattr(fused, "serves", serves)
        adapter = trainer.bank["run"]
        assert adapter.grads is not None
        adapter.grads.zero_()
        found.append((forward_backward(trainer, "run", asked).loss_sum, gradients(trainer, "run")))
    (loss, ours), (plain_loss, theirs) = found
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert distance(ours, theirs) <= 1e-5
    assert distance(ours, theirs) > 0, "both ways are the same one"
