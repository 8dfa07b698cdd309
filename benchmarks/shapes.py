"""Random models in true shapes for the benchmarks, and the batches they are trained with.

Speed does not depend on what weights say, so nothing has to be downloaded: a model is a configuration and a seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tuft_jupyter.core.types import Datum, ForwardBackward


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense Qwen3; ``heads`` are (query, key/value)."""

    name: str
    layers: int
    hidden: int
    mlp: int
    heads: tuple[int, int]
    vocab: int
    dtype: torch.dtype
    head_size: int = 64
    tied: bool = True

    def write(self, directory: Path, device: str = "cpu") -> Path:
        """Make the model in ``directory``/NAME, drawn on a device; what is there already is kept."""
        from transformers import Qwen3Config, Qwen3ForCausalLM
        from transformers.utils.logging import disable_progress_bar

        target = directory / self.name
        if (target / "config.json").exists():
            return target
        disable_progress_bar()
        config = Qwen3Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads[0],
            num_key_value_heads=self.heads[1],
            head_dim=self.head_size,
            max_position_embeddings=4096,
            tie_word_embeddings=self.tied,
            dtype=self.dtype,
        )
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype if device != "cpu" else before)  # a large one does not fit twice
        try:
            with torch.device(device):
                model = Qwen3ForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        model.to(self.dtype).save_pretrained(target)
        return target


TINY = Shape("tiny-fp32", 4, 256, 768, (4, 2), 4096, torch.float32)
SMALL = Shape("small-bf16", 12, 768, 2304, (12, 4), 32768, torch.bfloat16)
"""108 M parameters."""


def batches(shape: Shape, tenants: int, rows: int, lengths: tuple[int, int]) -> list[ForwardBackward]:
    """One cross-entropy request per tenant: random tokens, lengths uniform in ``lengths``, the first half a prompt."""
    rng = np.random.default_rng(7)
    return [
        ForwardBackward(
            tuple(
                _datum(rng.integers(0, shape.vocab, rng.integers(lengths[0], lengths[1] + 1) + 1))
                for _ in range(rows)
            ),
            "cross_entropy",
            {},
            True,
        )
        for _ in range(tenants)
    ]


def _datum(ids: np.ndarray) -> Datum:
    weights = np.ones(len(ids) - 1, np.float32)
    weights[: len(weights) // 2] = 0
    return Datum(ids[:-1].astype(np.int32), {"target_tokens": ids[1:].astype(np.int64), "weights": weights})


def tokens_in(requests: list[ForwardBackward]) -> int:
    """Tokens of the datums, without any padding."""
    return sum(len(datum.tokens) for request in requests for datum in request.data)
