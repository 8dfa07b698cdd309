"""Adapters made elsewhere: what fits the base model is understood, all else refused by file and tensor."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.archives import CONFIG, RANK, safetensors
from tuft_jupyter.core import adapters
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import ModelCard

SHAPES = {  # of the base model: outputs, inputs
    f"model.layers.{layer}.{name}": shape
    for layer in (0, 1)
    for name, shape in {"self_attn.q_proj": (16, 8), "mlp.up_proj": (24, 8)}.items()
}


def pairs(*modules: str, rank: int = RANK, dtype: type = np.float32) -> dict[str, np.ndarray]:
    shapes = {**SHAPES, "lm_head": (32, 8)}
    found = {}
    for module in modules:
        outputs, inputs = shapes[module]
        found[f"base_model.model.{module}.lora_A.weight"] = np.ones((rank, inputs), dtype)
        found[f"base_model.model.{module}.lora_B.weight"] = np.ones((outputs, rank), dtype)
    return found


@pytest.fixture
def base(tmp_path: Path) -> ModelCard:
    directory = tmp_path / "base"
    directory.mkdir()
    embedding = {"model.embed_tokens.weight": np.zeros((32, 8), np.float32)}
    norms = {"model.norm.weight": np.ones(8, np.float32)}
    layers = {f"{name}.weight": np.zeros(shape, np.float16) for name, shape in SHAPES.items()}
    half = len(layers) // 2
    for i, part in enumerate(
        (embedding | norms, dict([*layers.items()][:half]), dict([*layers.items()][half:]))
    ):
        (directory / f"model-{i}.safetensors").write_bytes(safetensors(part))
    return ModelCard("tiny", str(directory), 64, 32, "X")


def examine(base: ModelCard, content: bytes, config: Any = None) -> adapters.Foreign:
    weights = Path(base.path).parent / "adapter.safetensors"
    weights.write_bytes(content)
    said = config if isinstance(config, bytes) else json.dumps({**CONFIG, **(config or {})}).encode()
    return adapters.examine(said, weights, base, 16)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_an_adapter_that_fits_is_understood(base: ModelCard, dtype: type) -> None:
    every_q = [name for name in SHAPES if "q_proj" in name]
    found = examine(base, safetensors(pairs(*every_q, dtype=dtype)), {"lora_dropout": 0.1, "revision": "x"})
    assert found.lora == {
        "rank": 4, "alpha": 8.0, "seed": 0, "train_attn": True, "train_mlp": False, "train_unembed": False,
    }  # fmt: skip
    written = json.loads(found.config)
    assert written["target_modules"] == ["q_proj"]
    assert written["base_model_name_or_path"] == "tiny"
    assert written["lora_dropout"] == 0.0
    assert "revision" not in written


def test_an_adapter_of_some_layers_names_them_whole_and_a_tied_unembedding_is_a_layer(
    base: ModelCard,
) -> None:
    content = safetensors(pairs("model.layers.1.mlp.up_proj", "lm_head"))
    written = json.loads(examine(base, content).config)
    assert written["target_modules"] == ["lm_head", "model.layers.1.mlp.up_proj"]


Q0 = "model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[dict[str, np.ndarray], Any, str]] = {
    "another rank": (pairs(Q0, rank=8), {}, r"q_proj has rank 8 and 8, adapter_config.json says r = 4"),
    "a rank over the limit": (pairs(Q0, rank=32), {"r": 32}, r"r is 32, outside 1\.\.16"),
    "a rank that is none": (pairs(Q0), {"r": True}, "r is True"),
    "an alpha that is none": (pairs(Q0), {"lora_alpha": "8"}, "lora_alpha is '8'"),
    "an infinite alpha": (
        pairs(Q0),
        b'{"peft_type": "LORA", "r": 4, "lora_alpha": 1e999}',
        "lora_alpha is inf",
    ),
    "an alpha beyond all floats": (
        pairs(Q0),
        b'{"peft_type": "LORA", "r": 4, "lora_alpha": 1' + b"0" * 400 + b"}",
        "lora_alpha is 1000.*at most 1e",
    ),
    "a rank of a thousand digits": (
        pairs(Q0),
        b'{"peft_type": "LORA", "lora_alpha": 8, "r": 1' + b"0" * 1000 + b"}",
        r"r is 10+\.\.\.0+, outside",
    ),
    "dora": (pairs(Q0), {"use_dora": True}, "sets use_dora"),
    "rslora": (pairs(Q0), {"use_rslora": True}, "sets use_rslora"),
    "saved modules": (pairs(Q0), {"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
    "something new": (pairs(Q0), {"use_wonder": 1}, "sets use_wonder"),
    "a bias": (pairs(Q0), {"bias": "all"}, "bias is 'all'"),
    "pissa": (pairs(Q0), {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "another method": (pairs(Q0), {"peft_type": "IA3"}, "peft_type"),
    "no JSON": (pairs(Q0), b"\x80\x04", "not JSON"),
    "deep JSON": (pairs(Q0), b"[" * 100_000, "not JSON"),
    "half a pair": (dict([*pairs(Q0).items()][:1]), {}, "has lora_A alone"),
    "nothing": ({}, {}, "holds no tensors"),
    "the embedding": (
        pairs(Q0) | {"base_model.model.lm_head.weight": np.ones((32, 8), np.float32)},
        {},
        "lm_head.weight is no lora_A.*save_embedding_layers=False",
    ),
    "integers": (pairs(Q0, dtype=np.int64), {}, "is I64"),
    "a NaN": (
        pairs(Q0) | {f"base_model.model.{Q0}.lora_B.weight": np.full((16, 4), np.nan, np.float32)},
        {},
        "not finite",
    ),
    "an infinity in bfloat16": (
        pairs(Q0) | {f"base_model.model.{Q0}.lora_B.weight": np.full((16, 4), 0x7F80, np.uint16)},
        {},
        "not finite",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_trained_as_it_is_is_refused(base: ModelCard, name: str) -> None:
    """F12: rank, targets, kind and numbers, each with the reason."""
    tensors, config, said = REFUSED[name]
    with pytest.raises(UserError, match=said):
        examine(base, safetensors(tensors), config)


@pytest.mark.parametrize(
    ("module", "shape", "said"),
    [
        ("model.layers.7.self_attn.q_proj", (16, 8), "is no linear layer of tiny"),
        ("model.embed_tokens", (32, 8), "is no linear layer of tiny"),
        (Q0, (16, 12), "adapts a layer of 16 x 12, in tiny it is 16 x 8"),
    ],
)
def test_an_adapter_of_another_base_model_is_refused(
    base: ModelCard, module: str, shape: tuple[int, int], said: str
) -> None:
    """F12: layer by layer against the base model's own files."""
    tensors = {
        f"base_model.model.{module}.lora_A.weight": np.ones((RANK, shape[1]), np.float32),
        f"base_model.model.{module}.lora_B.weight": np.ones((shape[0], RANK), np.float32),
    }
    with pytest.raises(UserError, match=said):
        examine(base, safetensors(tensors))


A = f"base_model.model.{Q0}.lora_A.weight"
B = f"base_model.model.{Q0}.lora_B.weight"
LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "overlap": lambda header: header[B].update(data_offsets=[0, 256]),
    "gap": lambda header: header[B].update(data_offsets=[200, 456]),
    "beyond the end": lambda header: header[B].update(data_offsets=[128, 2**40]),
    "backwards": lambda header: header[A].update(data_offsets=[128, 0]),
    "negative": lambda header: header[A].update(data_offsets=[-128, 0]),
    "fractions": lambda header: header[A].update(shape=[4.0, 8]),
    "a shape of another size": lambda header: header[A].update(shape=[4, 9]),
    "a huge shape": lambda header: header[A].update(shape=[2**62, 2**62]),
    "ten thousand dimensions": lambda header: header[A].update(shape=[2**47] * 10_000),
    "no dtype": lambda header: header[A].pop("dtype"),
    "three offsets": lambda header: header[A].update(data_offsets=[0, 1, 2]),
    "a list": lambda header: header.update({A: [1, 2]}),
}


def test_no_arithmetic_is_done_on_a_header_before_its_size_is_known(base: ModelCard) -> None:
    """H4, H7: the product of a hundred thousand sizes would hold the whole process for half a minute."""

    def many(header: dict[str, Any]) -> None:
        header[A].update(shape=[2**47] * 200_000)

    content = safetensors(pairs(Q0), many)
    began = time.process_time()
    with pytest.raises(UserError, match="200000 dimensions"):
        examine(base, content)
    assert time.process_time() - began < 5.0


@pytest.mark.parametrize("name", list(LIES))
def test_a_safetensors_header_that_lies_is_refused(base: ModelCard, name: str) -> None:
    """H7: offsets, shapes and types are believed only if together they cover the file exactly."""
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: it is no safetensors file"):
        examine(base, safetensors(pairs(Q0), LIES[name]))


@pytest.mark.parametrize(
    "head", [b"", b"\x00" * 8, b"\xff" * 8, struct.pack("<Q", 2**40) + b"{}", b"PK\x03\x04" * 99]
)
def test_what_is_no_safetensors_file_is_refused(base: ModelCard, head: bytes) -> None:
    """H7."""
    with pytest.raises(UserError, match="no safetensors file"):
        examine(base, head)
