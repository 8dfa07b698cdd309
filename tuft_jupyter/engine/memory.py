"""How much memory a pass will take, how much there is, and what running out of it looks like.

The estimate is of what a decoder keeps for its backward pass; it errs on the high side. Knows model shapes, not
requests. Where it does not fit, layers are computed again on the way back instead of kept (Chen et al. 2016,
arXiv 1604.06174).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from safetensors import safe_open

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from tuft_jupyter.engine.base import BaseModel

SHARE = 0.5
"""Of the free memory, what activations may take: other work grows while a pass runs."""

KV_SHARE = 0.25
"""Of the free memory, what a sampler's keys and values may take: a trainer may be beside it."""

_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
_V2 = ("memory.max", "memory.current", "inactive_file", "active_file")
_FEWEST = 4096  # positions, however little memory there is
_WIDTHS = {
    "F64": 8,
    "I64": 8,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def activations(base: BaseModel, tokens: int) -> int:
    """Bytes kept for the backward pass over a row of ``tokens``.

    Per layer and token: two norms, queries, keys and values (and their fp32 copies), attention's output, gate and up
    and their product, for each of a token's experts; on a CPU the probabilities of attention, which a GPU's kernel does
    not keep.
    """
    config = base.hf.config.get_text_config()
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    size_of_mlp = _largest(config, "intermediate_size") or 4 * hidden
    mlp = 3 * size_of_mlp
    experts = _largest(config, "num_experts_per_tok")
    if experts:  # each reads and writes rows of its own
        mlp = max(
            mlp, experts * (2 * hidden + 3 * (_largest(config, "moe_intermediate_size") or size_of_mlp))
        )
    kept = 3 * hidden + 6 * heads * size + mlp
    seen = 256 if base.device.type == "cpu" else 0  # keys of a token, on average, where they are kept
    probabilities = 4 * heads * seen  # fp32
    return int(config.num_hidden_layers * tokens * (kept * base.dtype.itemsize + probabilities))


def _largest(config: PretrainedConfig, name: str) -> int:
    """A size in a configuration, 0 without; some have one for each layer (Gemma 3n, Hunyuan's MoE)."""
    sizes: int | list[int] | None = getattr(config, name, None)
    return max(sizes) if isinstance(sizes, list) else sizes or 0


def available(device: torch.device) -> int:
    """Bytes that can still be had on the device."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    left = [limit - _used(group, names) for limit, group, names in _limits()]
    return max(0, min([psutil.virtual_memory().available, *left]))


def total() -> int:
    """Bytes of memory that this process may come to: the machine's, or what its control groups allow."""
    return min([psutil.virtual_memory().total, *(limit for limit, _, _ in _limits())])


@cache
def _limits() -> list[tuple[int, Path, Sequence[str]]]:
    """Limit, directory and names of files of the control groups around this process that have a limit.

    In a container (a JupyterHub's, say) the machine's memory is not ours; the top one there may be its own.
    """
    found: list[tuple[int, Path, Sequence[str]]] = []
    machine = psutil.virtual_memory().total
    for line in _OWN_GROUPS.read_text().splitlines() if _OWN_GROUPS.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (_GROUPS / "memory", _V1) if controllers else (_GROUPS, _V2)
        own = top / path.strip("/")
        for group in (own, *own.parents[: len(own.parts) - len(top.parts)]):
            with suppress(OSError, ValueError):  # it is not there, or says "max"
                limit = int((group / names[0]).read_text())
                if limit < machine:
                    found.append((limit, group, names))
    return found


def _used(group: Path, names: Sequence[str]) -> int:
    """Bytes that a control group holds and would not give back, as it does the pages of files."""
    try:
        used = int((group / names[1]).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return used - sum(int(stat.get(name, 0)) for name in names[2:])
    except OSError:  # we were moved to another
        return 0


def kv_positions(base: BaseModel) -> int:
    """Positions whose keys and values fit into the share of the free memory that a sampler takes."""
    config = base.hf.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    each = 2 * config.num_hidden_layers * groups * size * base.dtype.itemsize
    return max(_FEWEST, int(KV_SHARE * available(base.device)) // each)


def weights(directory: Path, dtype: torch.dtype | None) -> int:
    """Bytes of the weights in a model directory once they are loaded; ``dtype`` None keeps that of the files."""
    total = 0
    for path in directory.glob("model*.safetensors"):  # as transformers names them
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_slice(key)
                width = _WIDTHS.get(tensor.get_dtype(), 4) if dtype is None else dtype.itemsize
                total += math.prod(tensor.get_shape()) * width
    return total


def stored(directory: Path) -> set[str]:
    """The dtypes of the tensors in a model directory, by safetensors' names (``BF16``)."""
    found = set()
    for path in directory.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - not a mapping
    return found


def roomy(hf: PreTrainedModel) -> bool:
    """Whether two more copies of a model's weights would take no more than an eighth of the free memory."""
    return 2 * sum(parameter.nbytes for parameter in hf.parameters()) <= available(hf.device) // 8


def for_adapters(device: torch.device) -> tuple[int, int]:
    """Bytes for adapters in training: in the model, and in host memory for those that are idle."""
    share = total() // 8
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 4, share
    return share, 0


def micro_batch(base: BaseModel) -> int:
    """Tokens of one pass: more spill a CPU's caches, fewer leave a GPU idle.

    On a GPU half as many, or a quarter, where a large model's activations would have to be computed again.
    """
    if base.device.type != "cuda":
        return 1024
    room = SHARE * (available(base.device) - for_adapters(base.device)[0])
    return next((tokens for tokens in (16384, 8192) if activations(base, tokens) <= room), 4096)


def is_tight(base: BaseModel, tokens: int) -> bool:
    """Whether the activations of a row of ``tokens`` are better computed again than kept."""
    return activations(base, tokens) > SHARE * available(base.device)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory was asked for that is not there."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


def release(device: torch.device) -> None:
    """Give cached blocks back before something is tried again."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
