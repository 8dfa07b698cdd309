"""What a careful person writes with torch and PEFT for several tenants: one adapter each, one after the other."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from tuft_jupyter.core.types import Datum, ForwardBackward

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class SequentialPeft:
    """``set_adapter`` for each tenant in turn, then its batch and its optimizer step.

    ``padded``: a tenant's rows go through the model as one padded batch, as most code does; else one row at a time.
    """

    def __init__(self, model: Path, tenants: int, *, rank: int, device: str = "cpu") -> None:
        disable_progress_bar()
        warnings.filterwarnings("ignore", module="peft")
        base = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device)
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
