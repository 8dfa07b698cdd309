"""The reference that the trainer is held against: PEFT and autograd, one datum at a time, no padding, no tricks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from tuft_jupyter.core.types import Datum, LoraSpec

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def plain_peft(
    model: Path, spec: LoraSpec, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> PeftModel:
    """The base model with one fp32 PEFT adapter of this geometry holding ``weights`` (PEFT's file names)."""
    targets = [
        *(ATTENTION if spec.train_attn else []),
        *(MLP if spec.train_mlp else []),
        *(["lm_head"] if spec.train_unembed else []),
    ]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager")
    fused = spec.train_mlp and any(name.endswith("experts.down_proj") for name, _ in base.named_parameters())
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=[name for name in targets if not (fused and name in MLP)],
        target_parameters=EXPERTS if fused else None,
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(base, config)
    parameters = adapter_parameters(peft)
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    return peft


def in_double(peft: PeftModel) -> PeftModel:
    """The same model computing in fp64 throughout: what all fp32 gradients are roundings of."""
    peft.double()
    peft.base_model.model.set_attn_implementation("sdpa")  # eager attention takes its softmax in fp32
    for module in peft.modules():
        if type(module).__name__.endswith("RMSNorm"):  # so do these their mean
            module.forward = partial(_norm, module)
    return peft


def _norm(module: Any, x: Tensor) -> Tensor:
    scaled: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * scaled


def adapter_parameters(peft: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The trainable tensors under their names in a file."""
    return {n.replace(".default", ""): p for n, p in peft.named_parameters() if "lora_" in n}


LIMIT = 2e-6
"""Relative L2 in fp32, over all of a tenant's gradients."""
OWN_ERROR = 4.0
"""Where PEFT itself is further than that from the gradient in fp64 (attention is sharp, or terms of a large alpha over
a small rank cancel), ours may be this many times as far as PEFT; both are draws from the same roundings."""
DRAWS = 8
"""One draw says little where now and then one is ten times as far as most: so PEFT's farthest of some counts."""


def assert_as_peft(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    exact: Callable[[], Mapping[str, Tensor]],
    nudged: Callable[[int], Mapping[str, Tensor]] | None = None,
) -> None:
    """Gradients equal PEFT's; ``exact`` says those in fp64, where that has to be known.

    ``nudged``: PEFT's from weights that are rounded anew (:func:`nudge`), by seed.
    """
    if distance(ours, theirs) <= LIMIT:
        return
    truth = exact()
    bound = max(LIMIT, OWN_ERROR * distance(theirs, truth))
    if nudged is not None and distance(ours, truth) > bound:
        bound = OWN_ERROR * max(distance(nudged(seed), truth) for seed in range(DRAWS))
    assert distance(ours, truth) <= bound


def nudge(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Weights in fp32, each up to a unit in the last place more or less."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: weight * (1 + 2**-23 * (2 * torch.rand(weight.shape, generator=generator) - 1))
        for name, weight in weights.items()
    }


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Relative L2 between two gradients over all tensors of the other."""
    gap = torch.cat([(one[name].double() - gradient).flatten() for name, gradient in other.items()])
    size = torch.cat([gradient.double().flatten() for gradient in other.values()])
    return float(gap.norm() / size.norm()) if gap.any() else 0.0


def target_logprobs(peft: PeftModel, datum: Datum) -> Tensor:
    """Log-probabilities of the datum's target_tokens, shaped like them."""
    logits = peft(input_ids=torch.from_numpy(datum.tokens.astype(np.int64))[None], use_cache=False).logits[0]
    targets = torch.from_numpy(datum.inputs["target_tokens"].astype(np.int64))
    logprobs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    return logprobs.gather(1, targets.view(len(targets), -1)).view(targets.shape)


def cross_entropy(peft: PeftModel, data: Sequence[Datum]) -> tuple[float, list[Tensor], dict[str, Tensor]]:
    """Loss sum, log-probabilities of each datum, and the gradient of every adapter tensor."""
    peft.zero_grad()
    total, all_logprobs = 0.0, []
    for datum in data:
        logprobs = target_logprobs(peft, datum)
        weights = torch.from_numpy(datum.inputs.get("weights", np.ones(logprobs.shape, np.float32)))
        loss = -(logprobs * weights.to(logprobs.dtype)).sum()
        loss.backward()
        total += float(loss.detach())
        all_logprobs.append(logprobs.detach())
    gradients = {name: p.grad.clone() for name, p in adapter_parameters(peft).items() if p.grad is not None}
    return total, all_logprobs, gradients
