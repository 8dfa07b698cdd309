"""Attention over packed rows through a GPU's kernel: what it is given, by the version of torch that brings it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from tuft_jupyter.engine import attention
from tuft_jupyter.engine.attention import CausalAttention, Scores
from tuft_jupyter.engine.base import load_base

CU = (0, 5, 12, 13)


def reference(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, window: tuple[int, int], scale: float | None
) -> Tensor:
    """What the kernel computes, sequence by sequence; [N, H, D] with as many heads everywhere."""
    assert cu.dtype == torch.int32
    assert all(t.is_contiguous() for t in (q, k, v))
    assert q.shape[1] == k.shape[1] == v.shape[1]
    assert window[1] == 0
    outs = []
    for start, end in pairwise(cu.tolist()):
        behind = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (behind >= 0) & (behind <= (window[0] if window[0] >= 0 else end))
        q1, k1, v1 = (t[start:end].transpose(0, 1) for t in (q, k, v))
        outs.append(F.scaled_dot_product_attention(q1, k1, v1, attn_mask=seen, scale=scale).transpose(0, 1))
    return torch.cat(outs)


def newer(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    assert enable_gqa is (q.shape[1] != k.shape[1])
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return reference(q, k, v, cu_q, window_size, scale)


def older(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    return reference(q, k, v, cu_q, window_size, None)


def oldest(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    raise AssertionError("it cannot be told to be causal")


@pytest.fixture(params=[newer, older, oldest])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    monkeypatch.setattr(varlen, "varlen_attn", request.param)
    attention._varlen_kernel.cache_clear()
    yield request.param
    attention._varlen_kernel.cache_clear()


@pytest.mark.parametrize(("window", "scaling"), [(None, None), (3, 0.3)])
@pytest.mark.usefixtures("kernel")
def test_the_kernel_of_every_torch_gives_what_the_calls_one_by_one_give(
    window: int | None, scaling: float | None
) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, CU[-1], 16, generator=g).bfloat16() for heads in (4, 2, 2))
    plain = CausalAttention(CU, torch.device("cpu"))
    on_gpu = CausalAttention(CU, torch.device("cpu"))
    on_gpu._cu = torch.tensor(CU, dtype=torch.int32)  # as it is made on a GPU
    outputs, grads = [], []
    for way in (plain, on_gpu):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        out = way(0, inputs[0], inputs[1], inputs[2], Scores(scaling, window))
        outputs.append(out.detach().float())
        grads.append([t.float() for t in torch.autograd.grad(out.float().square().sum(), inputs)])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=2e-2, atol=2e-2)
    for mine, theirs in zip(grads[1], grads[0], strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 3e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(5, 7, 7, 1), (70, 130, 130), (600, 5)])
def test_the_way_back_is_the_one_that_autograd_finds(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Short, in blocks, and too long for them."""
    g = torch.Generator().manual_seed(0)
    cu = [0]
    for length in lengths:
        cu.append(cu[-1] + length)
    q, k, v = (torch.randn(1, heads, cu[-1], 8, generator=g).to(dtype) for heads in (4, 2, 2))
    do = torch.randn(1, cu[-1], 4, 8, generator=g).to(dtype)
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    out = CausalAttention(cu, torch.device("cpu"))(0, inputs[0], inputs[1], inputs[2], Scores(0.4))
    expected = torch.autograd.grad(out, inputs, do)
    taped, back = CausalAttention(cu, torch.device("cpu")).taped(q, k, v, 0.4)
    assert torch.equal(taped, out.detach())
    for mine, theirs in zip(back(do), expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_without_flash_attn_attention_is_torchs_and_the_log_says_so(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """S1-07"""
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it fails
    used = []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: used.append(1) or attend(*a, **k))
    with caplog.at_level("INFO", "tuft_jupyter"):
        load_base(qwen3)
    q, k, v = (torch.ones(1, heads, 600, 8) for heads in (4, 2, 2))
    CausalAttention((0, 600), torch.device("cpu"))(0, q, k, v, Scores())
    assert used
    assert "scaled_dot_product_attention" in caplog.text
    assert "flash-attn is not needed" in caplog.text
