"""A frozen base model, loaded so that it can be run over packed rows.

Knows Hugging Face directories and nothing of adapters or losses. Promises that a model it returns gives the
same log-probabilities packed as alone: a family for which that does not hold (state that crosses sequences,
positions by a bias on the scores) is refused when loading, not found out in training.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.engine import experts, frozen, llama, memory, packing, precision
from tuft_jupyter.engine.attention import CausalAttention, Scores
from tuft_jupyter.engine.decoder import Decoder, ModuleDecoder
from tuft_jupyter.engine.head import PLAIN, Readout
from tuft_jupyter.engine.llama import LlamaDecoder
from tuft_jupyter.engine.pretrained import reading, refusal

log = logging.getLogger(__name__)

_UNFIT = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a family raises that cannot be called as we call it."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """``hf`` is the whole causal LM; ``name`` is what users call it; ``run`` is the way over a packed row, ``readout``
    what is made of the unembedding's products then.

    ``fingerprint`` tells it from other weights, whatever their path or dtype.
    """

    name: str
    path: str
    hf: PreTrainedModel
    run: Decoder
    readout: Readout
    vocab_size: int
    max_length: int
    fingerprint: str

    @property
    def lm_head(self) -> nn.Module:
        """The unembedding as it is now (PEFT may have wrapped it)."""
        return self.hf.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype


def load_base(
    path: str | Path,
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> BaseModel:
    """Load a local model directory, frozen, for packed use.

    ``name`` None calls it by its path; ``dtype`` None is the :mod:`~tuft_jupyter.engine.precision` that suits the
    device; ``device`` None takes CUDA if there is one. UserError says why a directory or a model family cannot be
    served.
    """
    path = str(path)
    disable_progress_bar()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        config = AutoConfig.from_pretrained(path, **reading())
    except (OSError, ValueError) as error:
        raise refusal(path, "read", error) from error
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"base model {path!r} is quantized; use its unquantized weights")
    dtype = _checked(path, dtype, device)
    try:
        hf: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype or "auto",
            attn_implementation=packing.ATTENTION,
            **reading(),
        )
    except (OSError, ValueError) as error:
        raise refusal(path, "loaded", error) from error
    except KeyError as error:
        if error.args != (packing.ATTENTION,):
            raise
        raise UserError(
            f"base model {path!r}: this family's attention does not go through transformers' attention interface"
        ) from error
    hf.requires_grad_(False)
    hf.eval()
    hf.to(device)
    run, readout = _decoder(hf)
    log.info(
        "%s: %s in %s on %s; attention by torch (scaled_dot_product_attention, or matmuls); flash-attn is not needed",
        name or path, type(run).__name__, hf.dtype, hf.device,
    )  # fmt: skip
    return BaseModel(
        name=name or path,
        path=path,
        hf=hf,
        run=run,
        readout=readout,
        vocab_size=min(hf.get_input_embeddings().num_embeddings, hf.get_output_embeddings().out_features),
        max_length=min([_longest(hf.config.get_text_config()), *_windows(hf, run)]),
        fingerprint=_fingerprint(hf),
    )


def _longest(config: Any) -> int:
    """Tokens of one sequence at most.

    With LongRoPE, a single one beyond the original length changes the rotation of all in its row: there it ends.
    """
    rope = config.rope_parameters if getattr(config, "rope_parameters", None) else {}
    kinds = rope.values() if all(isinstance(kind, dict) for kind in rope.values()) else [rope]
    long = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return int(min([config.max_position_embeddings, *long]))


@torch.no_grad()
def _windows(hf: Any, run: Decoder) -> set[int]:
    """Windows of which a family tells the mask alone (Qwen 2 MoE, Phi-3.5 MoE): here nobody reads masks, so that
    its sequences end where a window would begin to matter.

    UserError if it attends twice in one layer (DiffLlama): a sampler keeps one past for each.
    """
    kinds = getattr(hf.config.get_text_config(), "layer_types", None)
    if isinstance(run, LlamaDecoder):
        return set()
    layers: list[int] = []
    told: set[int | None] = set()
    whole = CausalAttention((0, 1), hf.device)

    def attend(layer: int, q_1HND: Tensor, k_1GND: Tensor, v_1GND: Tensor, scores: Scores) -> Tensor:
        layers.append(layer)
        told.add(scores.window)
        return whole(layer, q_1HND, k_1GND, v_1GND, scores)

    packed = packing.Packed((0, 1), ((0, 1, None),), attend)
    nought = torch.zeros(1, dtype=torch.int64, device=hf.device)
    run(packed, nought, nought[None], backward=False)
    if len(set(layers)) < len(layers):
        raise UserError(
            f"models of the family {hf.config.model_type!r} cannot be run: they attend more than once in a layer"
        )
    asked: set[int] = packed.memo.get(packing.LOCAL, set())
    return set() if kinds and set(kinds) == {"full_attention"} else asked - told


def _checked(path: str, dtype: torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The dtype to load. UserError if the weights alone exceed the free memory: the whole machine would swap."""
    try:
        dtype = dtype or precision.chosen(Path(path), device.type)
        need, free = memory.weights(Path(path), dtype), memory.available(device)
    except (OSError, SafetensorError) as error:
        raise UserError(f"base model {path!r}: its weights cannot be read: {error}") from error
    if need > free:
        raise UserError(
            f"base model {path!r} takes {need / 1e9:.1f} GB of memory on {device.type}, and {free / 1e9:.1f} GB are "
            "free: end other work, or serve a smaller model"
        )
    return dtype


def _fingerprint(hf: PreTrainedModel) -> str:
    """SHA-256 over the geometry and a sample of the weights, in bfloat16 so that the dtype does not count."""
    digest = hashlib.sha256()
    shapes: dict[str, Any] = {name: list(tensor.shape) for name, tensor in hf.state_dict().items()}
    digest.update(json.dumps([hf.config.model_type, shapes], sort_keys=True).encode())
    for name, tensor in sorted(hf.state_dict().items()):
        flat = tensor.flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16)
        digest.update(name.encode())
        digest.update(sample.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def _readout(config: Any) -> Readout:
    """What a configuration says of its logits, by the names that families have for it."""
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return Readout(scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def _decoder(hf: Any) -> tuple[Decoder, Readout]:
    """The fastest decoder with which two packed sequences get the logits that each gets alone, and how they are read.

    In half precision rounding may hide that it computes something else: it must be as near as the model's modules are.
    """
    lengths = (7, 5)
    size = hf.get_input_embeddings().num_embeddings
    ids = [torch.arange(1, 1 + n, device=hf.device) * 31 % size for n in lengths]
    hf.set_attn_implementation("eager")
    try:
        alone = torch.cat([hf(input_ids=i[None], use_cache=False).logits[0].float() for i in ids])
    except _UNFIT as unfit:
        if memory.ran_out(unfit):
            raise
        raise UserError(f"models of the family {hf.config.model_type!r} cannot be run: {unfit}") from unfit
    finally:
        hf.set_attn_implementation(packing.ATTENTION)
        experts.take_over(hf)
    packed = packing.causal(lengths, (None, None), hf.device)
    positions = packing.positions(packed.cu, hf.device)
    tolerance = 1e-4 if hf.dtype == torch.float32 else 0.05
    reason = ""
    copies = memory.roomy(hf)
    frozen.of(hf.get_output_embeddings(), copies=copies)
    llama_ = partial(LlamaDecoder, copies=copies)
    found: tuple[Decoder, Readout] | None = None
    for kind in (ModuleDecoder, llama_) if llama.fits(hf) else (ModuleDecoder,):
        try:
            decoder: Decoder = kind(hf)
            hidden, _ = decoder(packed, torch.cat(ids), positions, backward=False)
        except _UNFIT as unfit:
            if memory.ran_out(unfit):
                raise
            reason = str(unfit)
            continue
        products = hf.get_output_embeddings()(hidden)
        for readout in dict.fromkeys((PLAIN, _readout(hf.config.get_text_config()))):
            difference = float((readout(products.clone()).float() - alone).norm() / alone.norm())
            if difference <= tolerance:
                found, tolerance = (decoder, readout), min(tolerance, max(1e-4, 2 * difference))
            else:
                reason = f"logits differ from those of single sequences (relative error {difference:.1e})"
    if found is not None:
        return found
    raise UserError(f"models of the family {hf.config.model_type!r} cannot be run over packed rows: {reason}")
