"""The Llama-shaped decoder, written out by hand: forward over a packed row, and backward into the adapters.

Llama, Qwen2, Qwen3 and their like are the same few operations; run as modules under autograd, a short row spends
most of its time between them. Here a layer is some thirty tensor operations each way, nothing is recorded but what
the backward pass reads, and gradients stop at the first layer's inputs. Query, key and value projections share one
matmul, as do gate and up (:mod:`~tuft_jupyter.engine.linears`).

Knows no losses and no requests. :func:`fits` tells whether a model has this shape; that the numbers are the
model's own is checked when it is loaded (:mod:`~tuft_jupyter.engine.base`).

Shapes: N tokens, D hidden size, H query heads, G key/value heads, J = H + G, C = H + 2G, E head size, F MLP size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuft_jupyter.engine import frozen, fused
from tuft_jupyter.engine.attention import Back, CausalAttention, Scores
from tuft_jupyter.engine.grouped import Groups, groups_of
from tuft_jupyter.engine.linears import Linears, StackedPart, only_rows
from tuft_jupyter.engine.packing import Packed
from tuft_jupyter.engine.side_by_side import Rows, rows_of

Pull = Callable[[Tensor, Tensor | None], None]
"""Takes the gradient [N, D] in the hidden states and, if many of its rows are 0, the sorted indices of the others."""

_TOGETHER = "together"
_DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def fits(hf: PreTrainedModel) -> bool:
    """Whether every layer has the modules that :class:`LlamaDecoder` computes, and all attention is full.

    Attention that is told positions beside their rotation makes more of them, perhaps only far into a sequence
    (Ministral 3 scales its queries from the 16384th on).
    """
    config: Any = hf.config.get_text_config()
    decoder: Any = hf.base_model
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [
        "full_attention" if window is None else "sliding_attention"
    ]
    return (
        set(kinds) == {"full_attention"}
        and getattr(config, "hidden_act", None) in ("silu", "swish")
        and _children(decoder) == _DECODER
        and all(
            _children(layer) == _LAYER
            and _children(layer.self_attn) - {"q_norm", "k_norm"} == _ATTENTION
            and "position_ids" not in inspect.signature(layer.self_attn.forward).parameters
            and getattr(layer.self_attn, "use_rope", True)
            and _children(layer.mlp) == _MLP
            for layer in decoder.layers
        )
    )


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


class LlamaDecoder:
    """All before the unembedding; see :class:`~tuft_jupyter.engine.decoder.Decoder`. To be made before adapters are."""

    def __init__(self, hf: PreTrainedModel, *, copies: bool = False) -> None:
        decoder: Any = hf.base_model
        self._embed, self._rotary = decoder.embed_tokens, decoder.rotary_emb
        self._layers = [_Layer(layer, copies) for layer in decoder.layers]
        self._norm = Norm.of(decoder.norm)
        self._copies = copies
        self.grouped = hf.device.type == "cuda"
        """Whether adapters that are trained are computed together."""

    @torch.no_grad()
    def __call__(
        self, packed: Packed, ids_N: Tensor, positions_1N: Tensor, *, backward: bool, recompute: bool = False
    ) -> tuple[Tensor, Pull]:
        if _TOGETHER not in packed.memo:
            packed.memo[_TOGETHER] = self._together(packed, ids_N.device, backward)
        more = frozen.rounded(packed.tokens) - packed.tokens if self._copies else 0
        if more:  # rows of no sequence, so that there are few numbers of rows
            ids_N, positions_1N = F.pad(ids_N, (0, more)), F.pad(positions_1N, (0, more))
        x_ND = F.embedding(ids_N, self._embed.weight)
        rope = Rope(*self._rotary(x_ND, positions_1N))
        tape: list[_Kept | Tensor] = []  # of each layer what its backward pass reads, or only its input
        for layer in self._layers:
            again = x_ND
            x_ND, kept = layer(x_ND, packed, rope, backward and not recompute)
            if backward:
                tape.append(again if recompute else kept)
        h_ND, unit_ND, scale_N1 = self._norm(x_ND)

        @torch.no_grad()
        def pull(dh_ND: Tensor, rows_M: Tensor | None = None) -> None:
            if isinstance(packed.memo[_TOGETHER], Groups):
                rows_M = None  # the adapters' rows are told once for all layers
            of = (_longer(dh_ND, more), unit_ND, scale_N1)
            dx_ND = self._norm.pull(*(of if rows_M is None else (t[rows_M] for t in of)))
            for layer in reversed(self._layers):
                kept = tape.pop()
                if isinstance(kept, Tensor):
                    _, kept = layer(kept, packed, rope, True)
                dx_ND = layer.pull(dx_ND, kept, rope, first=not tape, rows_M=rows_M)
                rows_M = None

        return h_ND[: packed.tokens], pull

    def _together(self, packed: Packed, device: torch.device, backward: bool) -> Rows | Groups | None:
        """How the adapters of a row are computed together, if they are."""
        if backward and self.grouped:
            return groups_of(packed.segments, device)
        if packed.tokens == len(packed.cu) - 1 and not backward:  # decoding
            return rows_of(packed.segments, device)
        return None


@dataclass(slots=True)
class _Kept:
    """What a layer's backward pass reads: of each norm its ``unit`` and ``scale``, of each matmul its LoRA hidden.

    Rows from ``tokens`` on belong to no sequence.
    """

    tokens: int
    parts: list[list[StackedPart]]
    unit1: Tensor
    scale1: Tensor
    unit_heads: Tensor | None
    scale_heads: Tensor | None
    attend_back: Back | None
    attended: Tensor
    unit2: Tensor
    scale2: Tensor
    gate_up: Tensor
    hidden: list[list[Tensor]]

    def at(self, rows_M: Tensor) -> _Kept:
        """What is left of all behind attention if only these rows have a gradient there."""
        only = [only_rows(*of, rows_M) for of in zip(self.parts[1:], self.hidden[1:], strict=True)]
        return replace(
            self,
            parts=[self.parts[0], *(parts for parts, _ in only)],
            hidden=[self.hidden[0], *(hidden for _, hidden in only)],
            attended=self.attended[rows_M],
            unit2=self.unit2[rows_M],
            scale2=self.scale2[rows_M],
            gate_up=self.gate_up[rows_M],
        )


class _Layer:
    def __init__(self, module: Any, copies: bool) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.index: int = attention.layer_idx
        self.scaling: float = attention.scaling
        self.head_size: int = attention.head_dim
        self.queries: int = attention.q_proj.out_features // self.head_size
        self.keys: int = attention.k_proj.out_features // self.head_size
        self.norm1, self.norm2 = Norm.of(module.input_layernorm), Norm.of(module.post_attention_layernorm)
        self.head_norm: Norm | None = None
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm, attention.k_norm
            weight_JE = torch.cat(
                [q.weight.expand(self.queries, -1), k.weight.expand(self.keys, -1)]
            ).detach()
            self.head_norm = Norm(weight_JE, q.variance_epsilon)
        self.qkv = Linears(attention, "q_proj", "k_proj", "v_proj", copies=copies)
        self.out = Linears(attention, "o_proj", copies=copies)
        self.gate_up = Linears(mlp, "gate_proj", "up_proj", copies=copies)
        self.down = Linears(mlp, "down_proj", copies=copies)

    def __call__(self, x_ND: Tensor, packed: Packed, rope: Rope, keep: bool) -> tuple[Tensor, _Kept]:
        n, h, j = len(x_ND), self.queries, self.queries + self.keys
        parts = packed.memo.get(self)
        if parts is None:
            all_linears = (self.qkv, self.out, self.gate_up, self.down)
            together = packed.memo[_TOGETHER]
            parts = packed.memo[self] = [linears.parts(packed.segments, together) for linears in all_linears]
        n1_ND, unit1, scale1 = self.norm1(x_ND)
        qkv_NX, h_qkv = self.qkv(n1_ND, parts[0])
        qkv_NCE = qkv_NX.view(n, -1, self.head_size)
        qk_NJE, unit_heads, scale_heads = qkv_NCE, None, None
        if self.head_norm is not None:
            qk_NJE, unit_heads, scale_heads = self.head_norm(qkv_NCE)
        qk_NJE = rope(qk_NJE, j)
        at = slice(packed.tokens)
        qkv = (
            _heads_first(qk_NJE[at, :h]),
            _heads_first(qk_NJE[at, h:]),
            _heads_first(qkv_NCE[at, j:]),
        )
        attend_back: Back | None = None
        if keep:
            assert isinstance(packed.attention, CausalAttention)
            attended_1NHE, attend_back = packed.attention.taped(*qkv, self.scaling)
        else:
            attended_1NHE = packed.attention(self.index, *qkv, Scores(self.scaling))
        attended = _longer(attended_1NHE.flatten(2)[0], n - packed.tokens)
        x2_ND, h_out = self.out(attended, parts[1], x_ND)
        n2_ND, unit2, scale2 = self.norm2(x2_ND)
        gate_up, h_gate_up = self.gate_up(n2_ND, parts[2])
        y_ND, h_down = self.down(swiglu(gate_up), parts[3], x2_ND)
        hidden = [h_qkv, h_out, h_gate_up, h_down]
        return y_ND, _Kept(
            packed.tokens,
            parts,
            unit1,
            scale1,
            unit_heads,
            scale_heads,
            attend_back,
            attended,
            unit2,
            scale2,
            gate_up,
            hidden,
        )

    def pull(
        self, dy_ND: Tensor, kept: _Kept, rope: Rope, *, first: bool, rows_M: Tensor | None = None
    ) -> Tensor:
        """Gradients into the adapters, and the gradient in x (for the ``first`` layer: nothing anyone needs).

        With ``rows_M``, ``dy_ND`` are these rows, and the others 0: only attention brings a gradient to those.
        """
        n, h, j = len(kept.unit1), self.queries, self.queries + self.keys
        if rows_M is not None:
            kept = kept.at(rows_M)
        h_qkv, h_out, h_gate_up, h_down = kept.hidden
        dact_NF = self.down.pull(dy_ND, swiglu(kept.gate_up), kept.parts[3], h_down)
        dgate_up = swiglu_back(kept.gate_up, dact_NF)
        dn2_ND = self.gate_up.pull(dgate_up, kept.unit2 * self.norm2.weight, kept.parts[2], h_gate_up)
        dx2_ND = self.norm2.pull(dn2_ND, kept.unit2, kept.scale2).add_(dy_ND)
        dattended = self.out.pull(dx2_ND, kept.attended, kept.parts[1], h_out)
        if rows_M is not None:
            dx2_ND, dattended = (
                t.new_zeros(n, t.shape[1]).index_copy_(0, rows_M, t) for t in (dx2_ND, dattended)
            )
        assert kept.attend_back is not None
        grads = kept.attend_back(dattended[: kept.tokens].view(1, -1, h, self.head_size))
        dqkv_NCE = dx2_ND.new_empty(n, j + self.keys, self.head_size)
        dqkv_NCE[kept.tokens :] = 0
        for heads, grad in zip((slice(h), slice(h, j), slice(j, None)), grads, strict=True):
            dqkv_NCE[: kept.tokens, heads] = grad[0].transpose(0, 1)
        dqk_NJE = rope.pull(dqkv_NCE, j)
        if self.head_norm is not None:
            assert kept.unit_heads is not None
            assert kept.scale_heads is not None
            dqk_NJE = self.head_norm.pull(dqk_NJE, kept.unit_heads, kept.scale_heads)
        dqkv_NCE[:, :j] = dqk_NJE
        n1_ND = kept.unit1 * self.norm1.weight
        dn1_ND = self.qkv.pull(dqkv_NCE.view(n, -1), n1_ND, kept.parts[0], h_qkv, needs_dx=not first)
        return dx2_ND if first else self.norm1.pull(dn1_ND, kept.unit1, kept.scale1).add_(dx2_ND)


def swiglu(gate_up_NX: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer 2020, arXiv 2002.05202)."""
    if fused.serves(gate_up_NX):
        return fused.swiglu(gate_up_NX)
    gate_NF, up_NF = gate_up_NX.chunk(2, dim=-1)
    return F.silu(gate_NF).mul_(up_NF)


def swiglu_back(gate_up_NX: Tensor, dy_NF: Tensor) -> Tensor:
    """The gradient in ``gate_up``, new memory; ``dy`` is used up."""
    if fused.serves(gate_up_NX):
        return fused.swiglu_back(gate_up_NX, dy_NF)
    (gate_NF, up_NF), dgate_up_NX = gate_up_NX.chunk(2, dim=-1), torch.empty_like(gate_up_NX)
    dgate_NF, dup_NF = dgate_up_NX.chunk(2, dim=-1)
    torch.mul(dy_NF, F.silu(gate_NF), out=dup_NF)
    torch.ops.aten.silu_backward.grad_input(dy_NF.mul_(up_NF), gate_NF, grad_input=dgate_NF)
    return dgate_up_NX


def _longer(t_NX: Tensor, more: int) -> Tensor:
    """With ``more`` rows of zeros."""
    return F.pad(t_NX, (0, 0, 0, more)) if more else t_NX


def _heads_first(t_NHE: Tensor) -> Tensor:
    """[N, H, E] to [1, H, N, E], a view."""
    return t_NHE.transpose(0, 1)[None]


@dataclass(slots=True)
class Norm:
    """RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467), in fp32 as the models do it.

    With ``weight`` [J, E] of the first J heads of rows [N, C, E], else of rows [N, D].
    """

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        return cls(module.weight.detach(), module.variance_epsilon)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``weight * unit``, ``unit`` and ``scale``, where ``unit = x * scale`` has mean square 1."""
        if fused.serves(x):
            shape = len(x), *self.weight.shape
            y, unit, scale = fused.rms_norm(*self._in_heads(x), self.eps)
            return y.view(shape), unit.view(shape), scale.view(*shape[:-1], 1)
        if self.weight.dim() == 2:
            x = x[:, : len(self.weight)]
        x32 = x.float()
        scale = x32.square().sum(-1, keepdim=True).div_(x.shape[-1]).add_(self.eps).rsqrt_()
        unit = (x32 * scale).to(x.dtype)
        return unit * self.weight, unit, scale

    def pull(self, dy: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
        """The gradient in x, new memory."""
        if fused.serves(dy):
            dy_NJE, weight_JE = self._in_heads(dy)
            dx = fused.rms_norm_back(dy_NJE, weight_JE, unit.view(dy_NJE.shape), scale.view(len(dy), -1))
            return dx.view(dy.shape)
        g, unit = (dy * self.weight).float(), unit.float()
        total = (g * unit).sum(-1, keepdim=True)
        return g.addcmul_(unit, total, value=-1 / dy.shape[-1]).mul_(scale).to(dy.dtype)

    def _in_heads(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Rows, and the weight, as of heads; a row that is normalized whole is one."""
        return (t, self.weight) if self.weight.dim() == 2 else (t[:, None], self.weight[None])


class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) for the tokens of one row."""

    def __init__(self, cos_1NE: Tensor, sin_1NE: Tensor) -> None:
        self.half = cos_1NE.shape[-1] // 2
        self.cos_NE, self.sin_NE = cos_1NE[0], sin_1NE[0].clone()
        self.sin_NE[:, : self.half].neg_()  # so that a half turn of x is a roll
        self.back_NE = self.sin_NE.roll(self.half, -1)

    def __call__(self, x_NCE: Tensor, heads: int) -> Tensor:
        """Of the first ``heads`` of each row, [N, J, E]."""
        return self._rotated(x_NCE, heads, self.sin_NE)

    def pull(self, dy_NCE: Tensor, heads: int) -> Tensor:
        return self._rotated(dy_NCE, heads, self.back_NE)

    def _rotated(self, x_NCE: Tensor, heads: int, sin_NE: Tensor) -> Tensor:
        if fused.serves(x_NCE):
            return fused.rotate(x_NCE, heads, self.cos_NE, sin_NE)
        x_NJE = x_NCE[:, :heads]
        return (x_NJE * self.cos_NE[:, None]).addcmul_(x_NJE.roll(self.half, -1), sin_NE[:, None])
