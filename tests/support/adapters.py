"""Adapters as other people make them: by PEFT, into plain PEFT directories."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def plain_model(directory: Path) -> PreTrainedModel:
    """The model as transformers loads it, with its own attention."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def make_adapter(
    target: Path,
    model: Path,
    *,
    seed: int,
    rank: int = 4,
    modules: tuple[str, ...] = ALL_LINEAR,
    parameters: list[str] | None = None,
) -> Path:
    """Write an adapter that changes what the model says; ``parameters`` are tensors of experts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft = get_peft_model(
            plain_model(model),
            LoraConfig(
                r=rank,
                lora_alpha=2 * rank,
                target_modules=list(modules),
                target_parameters=parameters,
                task_type="CAUSAL_LM",
            ),
        )
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    # Left to itself, PEFT puts the base model's own unembedding into the file if that is a target.
    peft.save_pretrained(target, save_embedding_layers=False)
    return target


def peft_model(model: Path, adapter: Path) -> PeftModel:
    """The model with an adapter, as PEFT loads it."""
    return PeftModel.from_pretrained(plain_model(model), adapter).eval()
