"""Adapters as bytes that somebody sends: safetensors written by hand, and tar archives of them."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.support import peft_trip

RANK = 4
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}


def safetensors(
    tensors: Mapping[str, np.ndarray], change: Callable[[dict[str, Any]], None] | None = None
) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, values in tensors.items():
        end = len(body) + values.nbytes
        kind = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int64": "I64"}[str(values.dtype)]
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [len(body), end]}
        body += values.tobytes()
    if change is not None:
        change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def adapter(module: str = "model.layers.0.self_attn.q_proj", rank: int = 4, **config: Any) -> bytes:
    """An archive of an adapter on one layer of the demo model."""
    demo = json.loads((peft_trip.BASE / "config.json").read_text())
    width, heads = demo["hidden_size"], demo["num_attention_heads"]
    outputs = heads * demo.get("head_dim", width // heads)
    weights = safetensors(
        {
            f"base_model.model.{module}.lora_A.weight": np.ones((rank, width), np.float32),
            f"base_model.model.{module}.lora_B.weight": np.ones((outputs, rank), np.float32),
        }
    )
    said = json.dumps({**CONFIG, **config}).encode()
    return packed({"adapter_config.json": said, "adapter_model.safetensors": weights})


def packed(files: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return archive.getvalue()
