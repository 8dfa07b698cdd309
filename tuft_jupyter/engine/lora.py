"""LoRA adapters of many tenants on one frozen base model.

PEFT injects the layers, resolves target modules, names the tensors and defines the files; the layer class is
ours (:class:`MultiLoraLinear`, registered as PEFT's custom module for ``nn.Linear``). Over a packed row it
does one base matmul for all tokens and two thin ones per segment, and in the backward pass adds the gradients
of A and B straight into the adapter's own fp32 accumulator: an adapter that has no tokens in the row costs
nothing. Experts that are one tensor are adapted by :mod:`~tuft_jupyter.engine.experts`, in PEFT's names too.

Each adapter lives in one flat fp32 vector (weights) and, if trainable, a second one (gradients); its A and B are views
of that, so a step, a norm or a copy is one operation. Knows nothing of losses, optimizers, files or requests.

Shapes: N tokens of the row, I input and O output features, R rank, P elements of one adapter.
Reference: Hu et al. 2021, LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby, product
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import LoraSpec
from tuft_jupyter.engine import experts, memory, packing
from tuft_jupyter.engine.low_rank import Part, Slot, add_updates, pull_updates

if TYPE_CHECKING:
    from tuft_jupyter.engine.base import BaseModel

_ALIGN = 16  # elements: A and B start on cache lines
_PAIR = ("lora_A", "lora_B")
_IDLE_GEOMETRIES = 8
_EXPERTS_ONCE = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Names of layers that experts had before they were one tensor: PEFT still means those, in a model that has experts."""
_NO_GEOMETRY = {"base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}


class _FusedLora(torch.autograd.Function):
    """``y = x W^T + b`` plus each part's low-rank update.

    A and B are not inputs: their gradients go to the slots.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, anchor: Tensor, weight_OI: Tensor, bias_O: Tensor | None, parts: list[Part]
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        y_NO = F.linear(x_NI, weight_OI, bias_O)
        hidden = add_updates(x_NI, parts, y_NO)
        ctx.save_for_backward(x_NI, *hidden)
        ctx.weight_OI, ctx.parts, ctx.shape = weight_OI, parts, x.shape
        return torch.ops.aten._unsafe_view(y_NO, (*x.shape[:-1], y_NO.shape[1]))  # models may write into it

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None, None]:  # type: ignore[override]
        x_NI, *hidden = ctx.saved_tensors
        dy_NO = dy.reshape(-1, dy.shape[-1])
        dx_NI = torch.mm(dy_NO, ctx.weight_OI) if ctx.needs_input_grad[0] else None
        pull_updates(dy_NO, x_NI, ctx.parts, hidden, dx_NI)
        return (None if dx_NI is None else dx_NI.view(ctx.shape)), None, None, None, None


class MultiLoraLinear(PeftLinear):
    """A linear layer with any number of adapters, of any ranks; over a packed row each segment gets its own.

    Outside of a packed row it fails, as attention does: PEFT's own copies of A and B are never filled.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slots: dict[str, Slot] = {}
        self._anchor = torch.zeros((), requires_grad=True)  # makes autograd call us where x needs no gradient

    def put(
        self, name: str, a: Tensor, b: Tensor, scale: float, grad_a: Tensor | None, grad_b: Tensor | None
    ) -> None:
        """Give an adapter its place in this layer: views of its vectors."""
        self.slots[name] = Slot(a, b, scale, grad_a, grad_b)

    def parts(self, segments: tuple[packing.Segment, ...]) -> list[Part]:
        """The segments whose adapter has weights in this layer."""
        return [(start, end, self.slots[name]) for start, end, name in segments if name in self.slots]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        packed = packing.current()
        if packed is None:
            raise RuntimeError("a packed model was called outside of Packed.active()")
        if x.shape[:-1].numel() != packed.tokens:
            raise RuntimeError(f"{x.shape[:-1].numel()} tokens in a packed row of {packed.tokens}")
        base: Any = self.base_layer
        # Without gradients, apply is a plain call.
        y: Tensor = _FusedLora.apply(x, self._anchor, base.weight, base.bias, self.parts(packed.segments))
        return y


_Layer = MultiLoraLinear | experts.ExpertWeights


class NoRoom(UserError):
    """There is not as much memory as an adapter takes."""


@dataclass(slots=True)
class Adapter:
    """One adapter: ``weights`` fp32 [P], ``grads`` fp32 [P] or None if it is only read.

    ``layout`` says where each tensor lies in such a vector, by PEFT's file names; ``compute`` holds the copy
    of the weights in the model's dtype (the same memory if that is fp32).
    """

    name: str
    config: LoraConfig
    layout: Mapping[str, tuple[int, torch.Size]]
    weights: Tensor
    grads: Tensor | None
    compute: Tensor

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a vector [P] (weights, gradients, moments) by tensor name."""
        return {name: _view(vector, *place) for name, place in self.layout.items()}

    def drop_masters(self) -> None:
        """Of an adapter that is only read, keep no more than the layers compute with."""
        self.weights = self.compute

    def refresh(self) -> None:
        """Carry changed weights over to the copy that the layers compute with."""
        if self.compute is not self.weights:
            self.compute.copy_(self.weights)


@dataclass(frozen=True, slots=True)
class _Geometry:
    """What PEFT made of one configuration: the layers it names, where each A and B lies in a flat vector [P]."""

    peft_name: str | None  # None: nothing that PEFT would wrap
    layers: tuple[tuple[_Layer, tuple[str, str], float], ...]  # layer, file names of A and B, scale
    layout: Mapping[str, tuple[int, torch.Size]]
    size: int


class AdapterBank:
    """All adapters over one base model, by name.

    PEFT resolves each configuration once (it takes time in proportion to all that it holds); adapters of the same
    geometry are then only vectors and slots, added and removed in a millisecond however many there are. Adding or
    removing one leaves the others' memory where it is; segments of a packed row name adapters of the bank.
    """

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self._peft: PeftModel | None = None
        self._adapters: dict[str, Adapter] = {}
        self._geometries: OrderedDict[str, _Geometry] = OrderedDict()  # least recently used first
        self._serial = 0

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def __getitem__(self, name: str) -> Adapter:
        return self._adapters[name]

    def add(self, name: str, config: LoraConfig, *, trainable: bool) -> Adapter:
        """A new adapter with A = B = 0.

        UserError if its target modules are not in the base model or are of a kind that cannot be adapted, NoRoom
        if there is no memory for it.
        """
        if name in self._adapters:
            raise UserError(f"adapter {name!r} exists already")
        geometry = self._geometry(config)
        device, dtype = self.base.device, self.base.dtype
        need = geometry.size * ((16 if trainable else 4) + (0 if dtype == torch.float32 else dtype.itemsize))
        free = memory.available(device)
        if need > free:
            raise NoRoom(
                f"rank {config.r} takes {need / 1e9:.1f} GB here{' with its gradient and moments' * trainable}, and "
                f"{free / 1e9:.1f} GB are free: choose a smaller rank, or fewer layers"
            )
        weights = torch.zeros(geometry.size, device=device)
        adapter = Adapter(
            name=name,
            config=config,
            layout=geometry.layout,
            weights=weights,
            grads=torch.zeros_like(weights) if trainable else None,
            compute=weights if dtype == torch.float32 else torch.zeros_like(weights, dtype=dtype),
        )
        for layer, pair, scale in geometry.layers:
            places = [geometry.layout[key] for key in pair]
            a, b = (_view(adapter.compute, *place) for place in places)
            grad_a, grad_b = (
                None if adapter.grads is None else _view(adapter.grads, *place) for place in places
            )
            layer.put(name, a, b, scale, grad_a, grad_b)
        self._adapters[name] = adapter
        return adapter

    def remove(self, name: str) -> None:
        """Forget an adapter; unknown names are ignored."""
        adapter = self._adapters.pop(name, None)
        if adapter is not None:
            for layer, _, _ in self._geometry(adapter.config).layers:
                del layer.slots[name]

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """The adapter's tensors under the names PEFT gives them in a file (views, fp32)."""
        adapter = self._adapters[name]
        return adapter.split(adapter.weights)

    def load_state_dict(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors of exactly the names and shapes of :meth:`state_dict` into the adapter."""
        adapter = self._adapters[name]
        for key, view in adapter.split(adapter.weights).items():
            view.copy_(tensors[key])
        adapter.refresh()

    def _geometry(self, config: LoraConfig) -> _Geometry:
        """The geometry of a configuration, injected by PEFT if it is not known."""
        shape = {key: value for key, value in config.to_dict().items() if key not in _NO_GEOMETRY}
        key = json.dumps(shape, sort_keys=True, default=lambda value: sorted(map(str, value)))
        if key not in self._geometries:
            self._geometries[key] = self._inject(config)
            self._forget_geometries()
        self._geometries.move_to_end(key)
        return self._geometries[key]

    def _forget_geometries(self) -> None:
        """Of those that no adapter has, only a few are kept."""
        used = {id(adapter.layout) for adapter in self._adapters.values()}
        *others, _ = self._geometries.items()
        idle = [(key, geometry) for key, geometry in others if id(geometry.layout) not in used]
        for key, geometry in idle[: max(0, len(idle) - _IDLE_GEOMETRIES)]:
            del self._geometries[key]
            if geometry.peft_name is None:
                continue
            assert self._peft is not None
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*was active which is now deleted.*")
                self._peft.delete_adapter(geometry.peft_name)

    def _inject(self, config: LoraConfig) -> _Geometry:
        """PEFT is asked for linear layers only: of ``target_parameters`` it allows for one set in a model."""
        try:
            fused = experts.targeted(self.base.hf, set(config.target_parameters or ()))
        except KeyError as error:
            raise UserError(f"target_parameters cannot be adapted: no experts have {error}") from error
        linear = config
        if fused:
            linear = copy.copy(config)
            linear.target_parameters = None
        name = None if fused and not linear.target_modules else self._wrap(linear)
        adapted = {
            path: module
            for path, module in self.base.hf.named_modules()
            if name is not None and isinstance(module, MultiLoraLinear) and name in module.lora_A
        }
        layout: dict[str, tuple[int, torch.Size]] = {}
        total = 0

        def place(path: str, which: str, shape: torch.Size) -> None:
            nonlocal total
            layout[_file_name(path, which)] = (total, shape)
            total += -(-shape.numel() // _ALIGN) * _ALIGN

        for _, block in groupby(adapted, key=lambda path: path.rpartition(".")[0]):
            # All A of a block before all B: layers that share their input find their A side by side.
            for which, path in product(_PAIR, list(block)):
                place(path, which, getattr(adapted[path], which)[name].weight.shape)
        for path, weights in fused.items():
            for which, shape in zip(_PAIR, weights.shapes(config.r), strict=True):
                place(path, which, shape)
        scales: dict[str, float] = {path: layer.scaling[name] for path, layer in adapted.items()}
        scales |= dict.fromkeys(fused, config.lora_alpha / config.r)
        layers: dict[str, _Layer] = {**adapted, **fused}
        named = tuple(
            (layer, (_file_name(path, _PAIR[0]), _file_name(path, _PAIR[1])), scales[path])
            for path, layer in layers.items()
        )
        return _Geometry(name, named, layout, total)

    def _wrap(self, config: LoraConfig) -> str:
        """Have PEFT wrap the linear layers that a configuration names; the name that it knows it by."""
        self._serial += 1
        name = f"tuft{self._serial}"
        config._register_custom_module({nn.Linear: MultiLoraLinear})
        with warnings.catch_warnings():
            # PEFT warns that an adapter on a tied unembedding cannot be merged; ours never are.
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            try:
                # On the meta device, so that what PEFT would initialize takes neither time nor memory.
                if self._peft is None:
                    self._peft = PeftModel(self.base.hf, config, adapter_name=name, low_cpu_mem_usage=True)
                else:
                    self._peft.add_adapter(name, config, low_cpu_mem_usage=True)
            except ValueError as error:
                raise UserError(f"target_modules cannot be adapted: {error}") from error
        return name


def _view(vector: Tensor, offset: int, shape: torch.Size) -> Tensor:
    return vector[offset : offset + shape.numel()].view(shape)


def _file_name(path: str, which: str) -> str:
    return f"base_model.model.{path}.{which}.weight"


@torch.no_grad()
def initialize(adapter: Adapter, seed: int) -> None:
    """PEFT's default start: A uniform in ±1/sqrt(I) (Kaiming, a = sqrt 5), B zero; the same for the same seed.

    Drawn on the CPU, so that a seed means the same adapter on every device.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    for name, view in adapter.split(adapter.weights).items():
        if ".lora_A." in name:
            bound = 1 / math.sqrt(view.shape[1])
            view.copy_(torch.empty(view.shape).uniform_(-bound, bound, generator=generator))
        else:
            view.zero_()
    adapter.refresh()


def lora_config(base: BaseModel, spec: LoraSpec) -> LoraConfig:
    """PEFT's description of an adapter of this geometry.

    ``target_modules`` lists the layer names of this family.
    """
    return LoraConfig(
        r=spec.rank,
        lora_alpha=int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,  # type: ignore[arg-type]
        target_modules=target_modules(base, spec),
        target_parameters=(experts.targets(base.hf) if spec.train_mlp else None) or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.name,
        inference_mode=True,
    )


def target_modules(base: BaseModel, spec: LoraSpec) -> list[str]:
    """The names of the linear layers that the flags of ``spec`` stand for in this model family.

    Inside the decoder, linear layers under a module whose name speaks of attention are attention projections,
    all others belong to the MLP; the output embedding is the unembedding. Experts that are one tensor are no linear
    layers: :func:`experts.targets`. UserError if a flag stands for nothing, or for weights that have no adapters.
    """
    flags = {"train_attn": spec.train_attn, "train_mlp": spec.train_mlp, "train_unembed": spec.train_unembed}
    if not any(flags.values()):
        raise UserError("an adapter needs at least one of train_attn, train_mlp and train_unembed")
    ours = {id(tensor) for _, module in experts.layers(base.hf) for tensor in module.parameters()}
    fused = [p for n, p in base.hf.named_parameters() if "experts" in n and p.dim() == 3]
    if spec.train_mlp and any(id(tensor) not in ours for tensor in fused):
        raise UserError(
            "train_mlp: the experts of this family do not go through transformers' experts interface; "
            "set train_mlp=False"
        )
    found: dict[str, set[tuple[str, str]]] = {flag: set() for flag in flags}
    head = base.lm_head
    for path, module in base.hf.named_modules():
        inner = module.base_layer if isinstance(module, MultiLoraLinear) else module
        if not isinstance(inner, nn.Linear) or type(inner).forward is not nn.Linear.forward:
            continue  # a router, say, that is one but answers more
        if path.endswith(".base_layer") or ".lora_" in path:
            continue
        parents, _, name = path.rpartition(".")
        attention = "attn" in parents or "attention" in parents
        flag = "train_unembed" if module is head else "train_attn" if attention else "train_mlp"
        found[flag].add((parents.rpartition(".")[2], name))
    chosen: set[str] = set()
    for flag in (flag for flag, on in flags.items() if on):
        if flag == "train_mlp" and fused:
            if misread := sorted({name for _, name in found[flag]} & _EXPERTS_ONCE):
                raise UserError(
                    f"train_mlp: this model has {', '.join(misread)} beside its experts, which PEFT takes for parts of "
                    "experts; set train_mlp=False"
                )
        elif not found[flag]:
            raise UserError(f"{flag}: this model has no such linear layers; set {flag}=False")
        # Numbers are names of layers too.
        shared = {n for other, pairs in found.items() for _, n in pairs if other != flag or n.isdigit()}
        chosen |= {f"{parent}.{name}" if name in shared else name for parent, name in found[flag]}
    return sorted(chosen)
