"""What a careful person writes with torch and PEFT for several tenants: one adapter each, one after the other."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from tuft_jupyter.core.types import Datum, ForwardBackward, Int32Array

PREFERRED = "as ours, which this CPU prefers"
"""Rows of a baseline in another precision than that of the model's files."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class SequentialPeft:
    """``set_adapter`` for each tenant in turn, then its batch and its optimizer step.

    ``padded``: a tenant's rows go through the model as one padded batch, as most code does; else one row at a time.
    ``dtype`` "auto" is that of the model's files.
    """

    def __init__(
        self,
        model: Path,
        tenants: int,
        *,
        rank: int,
        device: str = "cpu",
        dtype: torch.dtype | Literal["auto"] = "auto",
    ) -> None:
        disable_progress_bar()
        warnings.filterwarnings("ignore", module="peft")
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
        self._model = get_peft_model(base, config, adapter_name="tenant0")
        for i in range(1, tenants):
            self._model.add_adapter(f"tenant{i}", config)
        self._optimizers = []
        for i in range(tenants):
            self._model.set_adapter(f"tenant{i}")
            mine = [p for n, p in self._model.named_parameters() if f".tenant{i}." in n]
            self._optimizers.append(torch.optim.AdamW(mine, lr=1e-4, weight_decay=0.0, fused=True))

    def step(self, requests: Sequence[ForwardBackward], *, padded: bool = True) -> float:
        """forward, backward and AdamW for every tenant; the summed loss before."""
        total = 0.0
        for i, (request, optimizer) in enumerate(zip(requests, self._optimizers, strict=True)):
            self._model.set_adapter(f"tenant{i}")
            for rows in [request.data] if padded else [[datum] for datum in request.data]:
                loss = self._loss(rows)
                loss.backward()
                total += float(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        return total

    def _loss(self, rows: Sequence[Datum]) -> Tensor:
        device = self._model.device
        lengths = [len(row.tokens) for row in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
        targets, weights = torch.zeros_like(ids), torch.zeros(ids.shape)
        for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            ids[i, :n] = torch.from_numpy(row.tokens)
            targets[i, :n] = torch.from_numpy(row.inputs["target_tokens"])
            weights[i, :n] = torch.from_numpy(row.inputs["weights"])
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        logits = self._model(
            input_ids=ids.to(device),
            attention_mask=None if bool(mask.all()) else mask.long().to(device),
            use_cache=False,
        ).logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().to(device), reduction="none")
        return (losses * weights.flatten().to(device)).sum()


def write_adapters(home: Path, model: Path, count: int, rank: int) -> list[Path]:
    """PEFT directories of random adapters on all linear layers but the unembedding."""
    disable_progress_bar()
    warnings.filterwarnings("ignore", module="peft")
    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    paths = []
    for i in range(count):
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, init_lora_weights=False)
        torch.manual_seed(i)
        paths.append(home / f"adapter{i}")
        adapted = get_peft_model(base, config)
        adapted.save_pretrained(paths[-1])
        base = adapted.unload()  # the large ones are not read again for each
    return paths


class PeftGenerate:
    """transformers' ``generate`` over PEFT adapters; sequence i of n belongs to adapter ``i * k // n``."""

    def __init__(
        self,
        model: Path,
        adapters: Sequence[Path],
        new_tokens: int,
        dtype: torch.dtype | Literal["auto"] = "auto",
    ) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self._model = PeftModel.from_pretrained(base, adapters[0], adapter_name="0").eval()
        for i, path in enumerate(adapters[1:], 1):
            self._model.load_adapter(path, adapter_name=str(i))
        self._adapters = len(adapters)
        self._new = new_tokens
        self._model.generation_config.eos_token_id = None

    def mixed(self, prompts: Sequence[Int32Array]) -> int:
        """All in one padded batch, each row with its adapter."""
        names = [str(i * self._adapters // len(prompts)) for i in range(len(prompts))]
        return self._generate(prompts, adapter_names=names)

    def per_tenant(self, prompts: Sequence[Int32Array]) -> int:
        """One padded batch per adapter."""
        share = len(prompts) // self._adapters
        drawn = 0
        for i in range(self._adapters):
            self._model.set_adapter(str(i))
            drawn += self._generate(prompts[i * share : (i + 1) * share])
        return drawn

    def alone(self, prompts: Sequence[Int32Array]) -> int:
        """One sequence after the other."""
        self._model.set_adapter("0")
        return sum(self._generate([prompt]) for prompt in prompts)

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[Int32Array], **more: Any) -> int:
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded on the left, as generate wants it
            ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
            mask[row, longest - len(prompt) :] = 1
        out = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=self._new,
            pad_token_id=0,
            **more,
        )
        return int((out.shape[1] - longest) * len(prompts))
