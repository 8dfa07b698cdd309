"""The Llama-shaped decoder, written out by hand: forward over a packed row, and backward into the adapters.

Llama, Qwen2, Qwen3 and their like are the same few operations; run as modules under autograd, a short row
spends most of its time between them. Here a layer is some thirty tensor operations each way, nothing is
recorded but what the backward pass reads, and gradients stop at the first layer's inputs. Query, key and
value projections share one matmul, as do gate and up: their weights are laid side by side once, and the
model's own parameters become views of that. Only attention is differentiated by autograd, so that any
:class:`~tuft_jupyter.engine.packing.Attention` fits.

Knows no losses and no requests. :func:`fits` tells whether a model has this shape; that the numbers are the
model's own is checked when it is loaded (:mod:`~tuft_jupyter.engine.base`).

Shapes: N tokens, D hidden size, H query heads, G key/value heads, E head size, F MLP size, J = H + G, C = H +
2G.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuft_jupyter.engine.lora import MultiLoraLinear, Part
from tuft_jupyter.engine.packing import Packed

Pull = Callable[[Tensor], None]


def fits(hf: PreTrainedModel) -> bool:
    """Whether every layer has the modules that :class:`LlamaDecoder` computes, and all attention is full."""
    config, decoder = hf.config.get_text_config(), hf.base_model
    windows = getattr(config, "layer_types", None) or [
        "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    ]
    if set(windows) != {"full_attention"} or config.hidden_act not in ("silu", "swish"):
        return False
    if {name for name, _ in decoder.named_children()} != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        return False
    return all(_layer_fits(layer) for layer in decoder.layers)


def _layer_fits(layer: nn.Module) -> bool:
    children = {name for name, _ in layer.named_children()}
    if children != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    attention = {name for name, _ in layer.self_attn.named_children()}
    mlp = {name for name, m in layer.mlp.named_children() if isinstance(m, nn.Linear)}
    return attention - {"q_norm", "k_norm"} == {"q_proj", "k_proj", "v_proj", "o_proj"} and mlp == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }


@dataclass(slots=True)
class _Norm:
    """RMSNorm (Zhang & Sennrich 2019), in fp32 as the models do it."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.Module) -> _Norm:
        return cls(module.weight, module.variance_epsilon)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(weight * unit, unit, scale)`` where ``unit = x * scale`` has mean square 1."""
        x32 = x.float()
        scale = x32.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        unit = (x32 * scale).to(x.dtype)
        return unit * self.weight, unit, scale

    def pull(self, dy: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
        """The gradient in x."""
        g, unit = (dy * self.weight).float(), unit.float()
        mean = (g * unit).mean(-1, keepdim=True)
        return g.addcmul_(unit, mean, value=-1.0).mul_(scale).to(dy.dtype)


class _Linears:
    """Linear layers that share their input.

    One matmul for all, and each one's adapters on its own columns.
    """

    def __init__(self, parent: nn.Module, *names: str) -> None:
        self.parent, self.names = parent, names
        modules = [getattr(parent, name) for name in names]
        self.weight = modules[0].weight.detach()
        self.bias = None if modules[0].bias is None else modules[0].bias.detach()
        edges = [0]
        for module in modules:
            edges.append(edges[-1] + module.out_features)
        self.columns = [slice(a, b) for a, b in pairwise(edges)]
        if len(names) > 1:
            self.weight = torch.cat([module.weight.detach() for module in modules])
            if self.bias is not None:
                self.bias = torch.cat([module.bias.detach() for module in modules])
            for module, columns in zip(modules, self.columns, strict=True):
                module.weight = nn.Parameter(self.weight[columns], requires_grad=False)

    def parts(self, packed: Packed) -> list[tuple[slice, Part]]:
        found = []
        for name, columns in zip(self.names, self.columns, strict=True):
            module = getattr(self.parent, name)
            if isinstance(module, MultiLoraLinear):
                found += [(columns, part) for part in module.parts(packed.segments)]
        return found

    def __call__(
        self, x: Tensor, parts: list[tuple[slice, Part]], residual: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """``residual + x W^T + b`` with every part's update, and each part's ``x A^T``."""
        if residual is None:
            y = F.linear(x, self.weight, self.bias)
        else:
            y = torch.addmm(residual, x, self.weight.t())
            if self.bias is not None:
                y += self.bias
        hidden = []
        for columns, (start, end, slot) in parts:
            h = torch.mm(x[start:end], slot.a.t())
            y[start:end, columns].addmm_(h, slot.b.t(), alpha=slot.scale)
            hidden.append(h)
        return y, hidden

    def pull(
        self,
        dy: Tensor,
        x: Tensor,
        parts: list[tuple[slice, Part]],
        hidden: list[Tensor],
        needs_dx: bool = True,
    ) -> Tensor | None:
        """Add the adapters' gradients to their slots; the gradient in x."""
        dx = torch.mm(dy, self.weight) if needs_dx else None
        for (columns, (start, end, slot)), h in zip(parts, hidden, strict=True):
            dh = slot.add_gradients(x[start:end], h, dy[start:end, columns])
            if dx is not None:
                dx[start:end].addmm_(dh, slot.a, alpha=slot.scale)
        return dx


class _Layer:
    def __init__(self, module: nn.Module) -> None:
        attention = module.self_attn
        self.index: int = attention.layer_idx
        self.scaling: float = attention.scaling
        self.head = attention.head_dim
        self.queries = attention.q_proj.out_features // self.head
        self.keys = attention.k_proj.out_features // self.head
        self.norm1, self.norm2 = _Norm.of(module.input_layernorm), _Norm.of(module.post_attention_layernorm)
        self.head_norm: _Norm | None = None
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm, attention.k_norm
            weight_JE = torch.cat(
                [q.weight.expand(self.queries, -1), k.weight.expand(self.keys, -1)]
            ).detach()
            self.head_norm = _Norm(weight_JE, q.variance_epsilon)
        self.qkv = _Linears(attention, "q_proj", "k_proj", "v_proj")
        self.out = _Linears(attention, "o_proj")
        self.gate_up = _Linears(module.mlp, "gate_proj", "up_proj")
        self.down = _Linears(module.mlp, "down_proj")

    def __call__(self, x_ND: Tensor, packed: Packed, rope: _Rope, keep: bool) -> tuple[Tensor, Any]:
        n, h, j = len(x_ND), self.queries, self.queries + self.keys
        parts = [linears.parts(packed) for linears in (self.qkv, self.out, self.gate_up, self.down)]
        n1_ND, unit1, scale1 = self.norm1(x_ND)
        qkv, h_qkv = self.qkv(n1_ND, parts[0], None)
        qkv_NCE = qkv.view(n, -1, self.head)
        qk_NJE, unit_qk, scale_qk = qkv_NCE[:, :j], None, None
        if self.head_norm is not None:
            qk_NJE, unit_qk, scale_qk = self.head_norm(qk_NJE)
        qk_NJE = rope(qk_NJE)
        q, k, v = (t.transpose(0, 1)[None] for t in (qk_NJE[:, :h], qk_NJE[:, h:], qkv_NCE[:, j:]))
        if keep:
            q, k, v = (t.requires_grad_() for t in (q, k, v))
        with torch.set_grad_enabled(keep):
            o_1NHE = packed.attention(self.index, q, k, v, self.scaling, None)
        o_ND = o_1NHE.detach().reshape(n, -1)
        x2_ND, h_out = self.out(o_ND, parts[1], x_ND)
        n2_ND, unit2, scale2 = self.norm2(x2_ND)
        gu, h_gu = self.gate_up(n2_ND, parts[2], None)
        gate_NF, up_NF = gu.chunk(2, dim=-1)
        y_ND, h_down = self.down(F.silu(gate_NF).mul_(up_NF), parts[3], x2_ND)
        if not keep:
            return y_ND, None
        kept = (
            parts,
            unit1,
            scale1,
            h_qkv,
            unit_qk,
            scale_qk,
            (q, k, v),
            o_1NHE,
            o_ND,
            h_out,
            unit2,
            scale2,
            gu,
            h_gu,
            h_down,
        )
        return y_ND, kept

    def pull(self, dy_ND: Tensor, kept: Any, rope: _Rope, needs_dx: bool) -> Tensor | None:
        (
            parts,
            unit1,
            scale1,
            h_qkv,
            unit_qk,
            scale_qk,
            qkv,
            o_1NHE,
            o_ND,
            h_out,
            unit2,
            scale2,
            gu,
            h_gu,
            h_down,
        ) = kept
        n, h, j = len(dy_ND), self.queries, self.queries + self.keys
        gate_NF, up_NF = gu.chunk(2, dim=-1)
        silu = F.silu(gate_NF)
        dact = self.down.pull(dy_ND, silu * up_NF, parts[3], h_down)
        dgu = torch.empty_like(gu)
        dgate, dup = dgu.chunk(2, dim=-1)
        torch.mul(dact, silu, out=dup)
        torch.ops.aten.silu_backward.grad_input(dact.mul_(up_NF), gate_NF, grad_input=dgate)
        dn2 = self.gate_up.pull(dgu, unit2 * self.norm2.weight, parts[2], h_gu)
        dx2_ND = self.norm2.pull(dn2, unit2, scale2).add_(dy_ND)
        do = self.out.pull(dx2_ND, o_ND, parts[1], h_out)
        grads = torch.autograd.grad(o_1NHE, qkv, do.view(o_1NHE.shape))
        dqkv_NCE = torch.empty(n, j + self.keys, self.head, dtype=dy_ND.dtype, device=dy_ND.device)
        for to, grad in zip((slice(h), slice(h, j), slice(j, None)), grads, strict=True):
            dqkv_NCE[:, to] = grad[0].transpose(0, 1)
        dqk = rope.pull(dqkv_NCE[:, :j])
        if self.head_norm is not None:
            dqk = self.head_norm.pull(dqk, unit_qk, scale_qk)
        dqkv_NCE[:, :j] = dqk
        dn1 = self.qkv.pull(dqkv_NCE.view(n, -1), unit1 * self.norm1.weight, parts[0], h_qkv, needs_dx)
        return None if dn1 is None else self.norm1.pull(dn1, unit1, scale1).add_(dx2_ND)


class _Rope:
    """Rotary position embedding (Su et al. 2021) for the tokens of one row."""

    def __init__(self, cos_1NE: Tensor, sin_1NE: Tensor) -> None:
        self.half = cos_1NE.shape[-1] // 2
        self.cos_N1E = cos_1NE[0][:, None]
        self.sin_N1E = sin_1NE[0][:, None].clone()
        self.sin_N1E[..., : self.half].neg_()

    def __call__(self, x_NJE: Tensor) -> Tensor:
        return (x_NJE * self.cos_N1E).addcmul_(x_NJE.roll(self.half, -1), self.sin_N1E)

    def pull(self, dy_NJE: Tensor) -> Tensor:
        return (dy_NJE * self.cos_N1E).add_((dy_NJE * self.sin_N1E).roll(self.half, -1))


class LlamaDecoder:
    def __init__(self, hf: PreTrainedModel) -> None:
        self._decoder = hf.base_model
        self._layers = [_Layer(layer) for layer in self._decoder.layers]
        self._norm = _Norm.of(self._decoder.norm)

    @torch.no_grad()
    def __call__(
        self, packed: Packed, ids_N: Tensor, positions_1N: Tensor, *, backward: bool
    ) -> tuple[Tensor, Pull]:
        x_ND = F.embedding(ids_N, self._decoder.embed_tokens.weight)
        rope = _Rope(*self._decoder.rotary_emb(x_ND, positions_1N))
        tape = []
        for layer in self._layers:
            x_ND, kept = layer(x_ND, packed, rope, backward)
            tape.append(kept)
        h_ND, unit, scale = self._norm(x_ND)

        def pull(dh_ND: Tensor) -> None:
            with torch.no_grad():
                dx_ND = self._norm.pull(dh_ND, unit, scale)
                for i in reversed(range(len(tape))):
                    dx_ND = self._layers[i].pull(dx_ND, tape.pop(), rope, i > 0)

        return h_ND, pull
