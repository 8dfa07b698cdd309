"""What an adapter made elsewhere must be before it becomes a checkpoint: PEFT's two files, against the base model.

Only headers and numbers are looked at: the JSON of ``adapter_config.json``, the JSON that begins a safetensors file,
and whether its floats are finite. Nothing is unpickled, and nothing of the sender's configuration is kept but what was
understood: :func:`examine` writes the configuration anew. It promises that what passes has the shapes of the base model
layer by layer, and that a refusal names the file, the field or tensor, and the way out. The engine checks again when it
loads. Reference: safetensors format, version 0.5.
"""

from __future__ import annotations

import json
import math
import reprlib
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import ModelCard

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_BYTES = 2**20
HEADER_BYTES, FOREIGN_HEADER_BYTES = 2**24, 2**22
"""Of a base model's file, and of an adapter's: 40,000 tensors. Parsing one keeps Python to itself."""
CHUNK = 2**22
MAX_ALPHA = 1e9
DIMENSIONS = 8
"""More than any tensor of an adapter has. The product of a header's worth of numbers would take hours."""
PREFIX = "base_model.model."
PAIR = ("lora_A", "lora_B")

_DTYPES = {
    # name: (unsigned integer of that width, its exponent bits: all of them set in an infinity or a NaN)
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
_UNDERSTOOD = {
    "r", "lora_alpha", "target_modules", "peft_type", "lora_dropout", "base_model_name_or_path", "inference_mode",
    "task_type", "revision", "peft_version", "auto_mapping", "runtime_config", "megatron_core", "qalora_group_size",
    "init_lora_weights", "bias", "layers_to_transform", "layers_pattern", "exclude_modules",
}  # fmt: skip
"""Keys that are checked below or do not change what is computed; any other must be as good as unset."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of a safetensors header; ``begin`` and ``end`` are offsets in the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Foreign:
    """``lora`` as a run keeps it; ``config`` the text of an ``adapter_config.json`` that says what was understood."""

    lora: Mapping[str, Any]
    config: str


def examine(config: bytes, weights: Path, base: ModelCard, max_rank: int) -> Foreign:
    """What the adapter is. UserError if it cannot be trained on ``base`` as it is."""
    rank, alpha = _geometry(config, max_rank)
    modules = _modules(tensors(weights, FOREIGN_HEADER_BYTES), rank)
    _check_shapes(modules, _linear_layers(Path(base.path)), base.name)
    _check_finite(weights)
    names = sorted(modules)
    lora = {
        "rank": rank,
        "alpha": alpha,
        "seed": 0,
        "train_attn": any("attn" in name for name in names),
        "train_mlp": any("mlp" in name for name in names),
        "train_unembed": any(name.endswith("lm_head") for name in names),
    }
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _targets(names, Path(base.path)),
        "inference_mode": True,
    }
    return Foreign(lora, json.dumps(written, indent=2) + "\n")


def tensors(path: Path, longest: int = HEADER_BYTES) -> dict[str, Tensor]:
    """The header of a safetensors file. UserError unless its entries cover the file exactly, without overlap."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(longest, size - 8):
            raise _unreadable(f"its header claims {length} bytes, the file has {size}")
        try:
            listed = json.loads(file.read(length))
            found = {
                name: _entry(name, entry, 8 + length) for name, entry in listed.items() if name[:2] != "__"
            }
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _unreadable(f"its header is malformed ({type(error).__name__})") from None
    position = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            raise _unreadable(f"{name} begins at byte {tensor.begin}, not at {position}")
        position = tensor.end
    if position != size:
        raise _unreadable(f"its header describes {position} bytes, the file has {size}")
    return found


def _entry(name: str, entry: Mapping[str, Any], start: int) -> Tensor:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    numbers = (*shape, begin, end)
    if len(shape) > DIMENSIONS:
        raise _unreadable(f"{name[:200]} has {len(shape)} dimensions")
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
        raise _unreadable(f"{name} has a shape or offset that is no size")
    if dtype in _DTYPES and math.prod(shape) * np.dtype(_DTYPES[dtype][0]).itemsize != end - begin:
        raise _unreadable(f"{name} is {list(shape)} {dtype}, but {end - begin} bytes long")
    return Tensor(str(dtype), shape, start + begin, start + end)


def _geometry(config: bytes, max_rank: int) -> tuple[int, float]:
    """Rank and alpha."""
    try:
        given = json.loads(config)
    except (ValueError, RecursionError):
        raise UserError(
            f"{CONFIG}: it is not JSON; send the file that PEFT's save_pretrained wrote"
        ) from None
    if not isinstance(given, dict) or given.get("peft_type") != "LORA":
        raise UserError(f"{CONFIG}: peft_type must be 'LORA', only plain LoRA can be trained here")
    for key, value in given.items():
        if key not in _UNDERSTOOD and value:
            raise UserError(f"{CONFIG}: it sets {key[:200]}, only plain LoRA can be trained here")
    if given.get("bias", "none") != "none":
        raise UserError(f"{CONFIG}: bias is {_short(given['bias'])}, only 'none' can be trained here")
    if given.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise UserError(
            f"{CONFIG}: init_lora_weights is {_short(given['init_lora_weights'])}, which changes the base model; "
            "convert the adapter to plain LoRA first"
        )
    rank, alpha = given.get("r"), given.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= max_rank:
        raise UserError(
            f"{CONFIG}: r is {_short(rank)}, outside 1..{max_rank}, the limit here (max_lora_rank); use a smaller rank"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= MAX_ALPHA:
        raise UserError(
            f"{CONFIG}: lora_alpha is {_short(alpha)}, it must be above 0 and at most {MAX_ALPHA:g}"
        )
    return rank, float(alpha)


def _modules(found: Mapping[str, Tensor], rank: int) -> dict[str, tuple[int, int]]:
    """Each adapted layer's outputs and inputs, by its path in the base model."""
    halves: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in found.items():
        module, _, half = name.removesuffix(".weight").rpartition(".")
        if not (name.startswith(PREFIX) and name.endswith(".weight") and half in PAIR):
            raise UserError(
                f"{WEIGHTS}: {name} is no lora_A or lora_B weight; save with PEFT's save_pretrained("
                "save_embedding_layers=False), without modules_to_save"
            )
        if tensor.dtype not in _DTYPES or len(tensor.shape) != 2:
            raise UserError(
                f"{WEIGHTS}: {name} is {tensor.dtype} {list(tensor.shape)}; it must be a float32, "
                "float16 or bfloat16 matrix"
            )
        halves[module.removeprefix(PREFIX)][half] = tensor
    if not halves:
        raise UserError(f"{WEIGHTS}: it holds no tensors; save the adapter with PEFT's save_pretrained")
    modules = {}
    for module, pair in halves.items():
        if len(pair) != len(PAIR):
            raise UserError(f"{WEIGHTS}: {module} has {' and '.join(pair)} alone; both halves are needed")
        a, b = (pair[half].shape for half in PAIR)
        if a[0] != rank or b[1] != rank:
            raise UserError(
                f"{WEIGHTS}: {module} has rank {a[0]} and {b[1]}, {CONFIG} says r = {rank}; "
                "send two files of one adapter"
            )
        modules[module] = (b[0], a[1])
    return modules


def _check_shapes(
    modules: Mapping[str, tuple[int, int]], layers: Mapping[str, tuple[int, ...]], base: str
) -> None:
    for module, (outputs, inputs) in sorted(modules.items()):
        shape = layers.get(module)
        if shape is None:
            raise UserError(
                f"{WEIGHTS}: {module} is no linear layer of {base}; upload to the base model it was trained on"
            )
        if shape != (outputs, inputs):
            raise UserError(
                f"{WEIGHTS}: {module} adapts a layer of {outputs} x {inputs}, in {base} it is "
                f"{' x '.join(map(str, shape))}; upload to the base model it was trained on"
            )


def _linear_layers(base: Path) -> dict[str, tuple[int, ...]]:
    """Every matrix of the base model by its module; a tied unembedding has the shape of the embedding."""
    shapes: dict[str, tuple[int, ...]] = {
        name.removesuffix(".weight"): tensor.shape
        for file in sorted(base.glob("*.safetensors"))
        for name, tensor in tensors(file).items()
        if name.endswith(".weight") and len(tensor.shape) == 2
    }
    embedding = next((path for path in shapes if path.endswith("embed_tokens")), None)
    if embedding is not None:
        shapes.setdefault("lm_head", shapes[embedding])
        del shapes[embedding]  # no linear layer
    return shapes


def _targets(modules: list[str], base: Path) -> list[str]:
    """PEFT's ``target_modules``: a layer's own name where all layers of that name are adapted, else whole paths."""
    all_of: dict[str, set[str]] = defaultdict(set)
    for path in _linear_layers(base):
        all_of[path.rpartition(".")[2]].add(path)
    whole = {name for name, paths in all_of.items() if paths <= set(modules)}
    return sorted({path if (name := path.rpartition(".")[2]) not in whole else name for path in modules})


def _check_finite(weights: Path) -> None:
    with weights.open("rb") as file:
        for name, tensor in tensors(weights).items():
            kind, exponent = _DTYPES[tensor.dtype]
            for numbers in _numbers(file, tensor, kind):
                if bool(((numbers & exponent) == exponent).any()):
                    raise UserError(
                        f"{WEIGHTS}: {name} has numbers that are not finite; send an earlier state of the adapter"
                    )


def _numbers(file: Any, tensor: Tensor, kind: str) -> Iterator[Any]:
    file.seek(tensor.begin)
    left = tensor.end - tensor.begin
    while left:
        chunk = file.read(min(CHUNK, left))
        left -= len(chunk)
        yield np.frombuffer(chunk, kind)


def _short(value: Any) -> str:
    """A stranger's value as an answer may repeat it."""
    return reprlib.repr(value)


def _unreadable(why: str) -> UserError:
    return UserError(
        f"{WEIGHTS}: it is no safetensors file: {why}; save it again with PEFT's save_pretrained"
    )
