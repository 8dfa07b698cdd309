"""Checkpoints on disk: plain PEFT directories with an optimizer and a manifest beside.

::

    adapter_config.json         PEFT's own, with the base model's name and the true target modules
    adapter_model.safetensors   PEFT's own names, fp32
    optimizer.safetensors       AdamW's moments, exp_avg.{tensor} and exp_avg_sq.{tensor} (if asked for)
    manifest.json               format, base fingerprint, geometry, seed, step, SHA-256 of each file

``PeftModel.from_pretrained`` reads such a directory. A PEFT directory made elsewhere, without a manifest, is
read as weights only. Promises: a directory appears whole or not at all; nothing that does not fit, or was
changed since it was written, is ever returned; nothing is unpickled.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.numpy
import safetensors.torch
import torch
from peft import LoraConfig
from safetensors import SafetensorError
from torch import Tensor

from tuft_jupyter._version import __version__
from tuft_jupyter.core.durable import make, sync, sync_all
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import LoraSpec
from tuft_jupyter.engine.base import BaseModel
from tuft_jupyter.engine.lora import Adapter

FORMAT = 1
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OPTIMIZER, MANIFEST = "optimizer.safetensors", "manifest.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")

# What may differ from PEFT's defaults in an adapter made elsewhere without changing what we would compute.
_FREE_FIELDS = {
    "r", "lora_alpha", "target_modules", "target_parameters", "lora_dropout", "init_lora_weights",
    "base_model_name_or_path", "inference_mode", "task_type", "revision", "peft_version", "auto_mapping",
    "runtime_config",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that was read and verified. ``moments`` are empty unless the optimizer was asked for."""

    spec: LoraSpec
    config: LoraConfig
    weights: Mapping[str, Tensor]
    steps: int
    moments: Sequence[Mapping[str, Tensor]]

    def check_fits(self, adapter: Adapter) -> None:
        """UserError unless these weights belong into an adapter of this geometry."""
        ours, live = self.config, adapter.config
        for what, mine, theirs in (("rank", ours.r, live.r), ("alpha", ours.lora_alpha, live.lora_alpha)):
            if mine != theirs:
                raise UserError(f"checkpoint: {what} is {mine}, the run has {theirs}; load it into a new run")
        expected = {name: shape for name, (_, shape) in adapter.layout.items()}
        for tensors in (self.weights, *self.moments):
            found = {name: tensor.shape for name, tensor in tensors.items()}
            for name in sorted(expected.keys() | found.keys()):
                if name not in found:
                    raise UserError(
                        f"checkpoint: target_modules do not fit the run: {name} is missing; load it into a new run"
                    )
                if name not in expected:
                    raise UserError(
                        f"checkpoint: target_modules do not fit the run: {name} has no place in it; "
                        "load it into a new run"
                    )
                if found[name] != expected[name]:
                    raise UserError(
                        f"checkpoint: {name} is {list(found[name])}, the run needs {list(expected[name])}; "
                        "load it into a new run"
                    )


def write(
    target: Path,
    base: BaseModel,
    spec: LoraSpec,
    config: LoraConfig,
    weights: Mapping[str, Tensor],
    *,
    steps: int,
    moments: Sequence[Mapping[str, Tensor]] | None,
    durable: bool = True,
) -> int:
    """Write a checkpoint directory and return its size in bytes; one that is already there is replaced.

    ``durable``: it is on the disk when the call returns. Without, a power failure may leave a directory that
    :func:`read` refuses.
    """
    if durable:
        make(target.parent)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename stays in one file system; dotted, so that no listing shows it.
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        described = copy.copy(config)
        if isinstance(described.target_modules, set | list | tuple):
            described.target_modules = sorted(described.target_modules)  # type: ignore[assignment]
        if described.target_parameters is not None:
            described.target_parameters = sorted(described.target_parameters)
        described.save_pretrained(str(temporary))
        digests = {CONFIG: _digest((temporary / CONFIG).read_bytes())}
        digests[WEIGHTS] = _save_tensors(temporary / WEIGHTS, weights)
        if moments is not None:
            named = {
                f"{kind}.{name}": tensor
                for kind, tensors in zip(_MOMENTS, moments, strict=True)
                for name, tensor in tensors.items()
            }
            digests[OPTIMIZER] = _save_tensors(temporary / OPTIMIZER, named)
        manifest = {
            "format": FORMAT,
            "tuft": __version__,
            "base": {"name": base.name, "fingerprint": base.fingerprint},
            "lora": asdict(spec),
            "target_modules": described.target_modules,
            "step": steps,
            "files": digests,
        }
        manifest["digest"] = _digest_of(manifest)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        size = sum(file.stat().st_size for file in temporary.iterdir())
        _publish(temporary, target, durable)
        return size
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read(source: Path, base: BaseModel, *, optimizer: bool) -> Saved:
    """Read and verify a checkpoint directory. UserError says what is missing, changed or does not fit."""
    if not source.is_dir():
        raise UserError(
            "checkpoint: its files are not on the server's disk any more; load another one, or have its operator put "
            "them back where checkpoint_dir says"
        )
    if not (source / CONFIG).is_file():
        raise UserError(f"checkpoint: {CONFIG} is missing; this is not a PEFT adapter directory")
    if not (source / MANIFEST).is_file():
        if optimizer:
            raise UserError(
                "checkpoint: it has no manifest and so no optimizer state; load the weights alone"
            )
        return _read_foreign(source, base)
    manifest = _manifest(source)
    if manifest["base"]["fingerprint"] != base.fingerprint:
        raise UserError(
            f"checkpoint: it was trained on another base model ({manifest['base']['name']}), "
            f"not on {base.name}"
        )
    if optimizer and OPTIMIZER not in manifest["files"]:
        raise UserError("checkpoint: it was saved without its optimizer; load the weights alone")
    wanted = [CONFIG, WEIGHTS, *([OPTIMIZER] if optimizer else [])]
    contents = {name: _verified(source / name, manifest["files"].get(name)) for name in wanted}
    spec = LoraSpec(**manifest["lora"])
    config = _peft_config(source)
    if config.r != spec.rank or config.lora_alpha != spec.alpha:
        raise UserError(
            f"checkpoint: {CONFIG} and {MANIFEST} disagree on rank or alpha; "
            "it was changed after it was saved, use another checkpoint"
        )
    moments: list[dict[str, Tensor]] = []
    if optimizer:
        named = _tensors(OPTIMIZER, contents[OPTIMIZER])
        moments = [
            {name.removeprefix(f"{kind}."): t for name, t in named.items() if name.startswith(f"{kind}.")}
            for kind in _MOMENTS
        ]
    return Saved(spec, config, _tensors(WEIGHTS, contents[WEIGHTS]), manifest["step"], moments)


def verify(source: Path, *, base_name: str, max_rank: int) -> None:
    """UserError unless a checkpoint directory is whole and made for a base model of this name.

    For whoever reads the files by other means afterwards, without the base model at hand.
    """
    if not (source / CONFIG).is_file() or not (source / WEIGHTS).is_file():
        raise UserError(f"checkpoint: {CONFIG} or {WEIGHTS} is missing; this is not a PEFT adapter directory")
    config = _peft_config(source)
    if (source / MANIFEST).is_file():
        manifest = _manifest(source)
        if manifest["base"]["name"] != base_name:
            raise UserError(
                f"checkpoint: it was trained on another base model ({manifest['base']['name']}), not on {base_name}"
            )
        content = [_verified(source / name, manifest["files"].get(name)) for name in (CONFIG, WEIGHTS)][1]
    else:
        content = (source / WEIGHTS).read_bytes()
    if config.r > max_rank:
        raise UserError(f"checkpoint: its rank is {config.r}; the limit here is {max_rank} (max_lora_rank)")
    _tensors(WEIGHTS, content)


def _read_foreign(source: Path, base: BaseModel) -> Saved:
    """A PEFT directory without our manifest."""
    config = _peft_config(source)
    plain = LoraConfig()
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in _FREE_FIELDS and (value or None) != (getattr(plain, field.name) or None):
            raise UserError(
                f"checkpoint: {CONFIG} sets {field.name} to {value!r}; only plain LoRA can be trained here"
            )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise UserError(
            f"checkpoint: init_lora_weights is {config.init_lora_weights!r}, which changes the base model; "
            "convert the adapter to plain LoRA first"
        )
    if not (source / WEIGHTS).is_file():
        raise UserError(f"checkpoint: {WEIGHTS} is missing; save the adapter with safe_serialization=True")
    weights = _tensors(WEIGHTS, (source / WEIGHTS).read_bytes())
    spec = LoraSpec(
        rank=config.r,
        alpha=float(config.lora_alpha),
        seed=0,
        train_attn=any("attn" in name for name in weights),
        train_mlp=any("mlp" in name for name in weights),
        train_unembed=any("lm_head" in name for name in weights),
    )
    ours = copy.copy(config)
    ours.lora_dropout = 0.0
    ours.base_model_name_or_path = base.name
    ours.inference_mode = True
    return Saved(spec, ours, weights, 0, [])


def _peft_config(source: Path) -> LoraConfig:
    try:
        config = LoraConfig.from_pretrained(str(source))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"checkpoint: {CONFIG} cannot be read: {error}") from error
    if not isinstance(config, LoraConfig):
        raise UserError(
            f"checkpoint: {CONFIG} describes {type(config).__name__}; only LoRA can be trained here"
        )
    return config


def _manifest(source: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((source / MANIFEST).read_bytes())
        digest = manifest.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"checkpoint: {MANIFEST} cannot be read: {error}") from error
    if digest != _digest_of(manifest):
        raise UserError(f"checkpoint: {MANIFEST} was changed after it was written; use another checkpoint")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"checkpoint: its format is {manifest['format']}, this server reads {FORMAT}; upgrade tuft-jupyter"
        )
    return manifest  # type: ignore[no-any-return]


def _verified(file: Path, digest: str | None) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"checkpoint: {file.name} is missing; use another checkpoint") from error
    if _digest(content) != digest:
        raise UserError(
            f"checkpoint: {file.name} was changed or damaged after it was written (digest differs); "
            "use another checkpoint"
        )
    return content


def _tensors(name: str, content: bytes) -> dict[str, Tensor]:
    try:
        tensors = {key: tensor.float() for key, tensor in safetensors.torch.load(content).items()}
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise UserError(f"checkpoint: {name} cannot be read: {error}") from error
    # A sum is finite only if every number is; all the sums are looked at together, which is eight times as fast.
    if tensors and not torch.isfinite(torch.stack([tensor.sum() for tensor in tensors.values()])).all():
        for key, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"checkpoint: {key} in {name} has numbers that are not finite; use an earlier checkpoint"
                )
    return tensors


def _save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file; returns the digest of what was written."""
    # By way of numpy, which does not mind that all are views of one vector.
    arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
    content = safetensors.numpy.save(arrays, metadata={"format": "pt"})
    file.write_bytes(content)
    return _digest(content)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return _digest(json.dumps(manifest, sort_keys=True).encode())


def _publish(temporary: Path, target: Path, durable: bool) -> None:
    """Make the finished directory durable, then give it its name."""
    if durable:
        sync_all(temporary)
    replaced = None
    if target.exists():
        replaced = temporary.with_name(f"{temporary.name}.old")
        target.rename(replaced)
    temporary.rename(target)
    if durable:
        sync(target.parent)
    if replaced is not None:
        shutil.rmtree(replaced)
