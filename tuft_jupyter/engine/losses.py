"""The loss functions of the Tinker protocol: what each one needs, and its value and slope in the
log-probabilities.

Every loss here is a function of the learner's log-probabilities p of the target tokens and of inputs that
came with the request, so one pass over the model serves them all: :func:`~tuft_jupyter.engine.head.run`
computes p, asks the loss for dL/dp and carries it back. Losses are sums over positions and datums, never
means.

With q the sampler's log-probabilities (``logprobs``), A the ``advantages``, w the ``weights`` (ones if missing, any
sign), r = exp(p - q), sg the stop-gradient, and s = exp(mean of p - q over a datum where ``sequence_ratio_mask`` is
not 0), whose slope at a position is taken in that position's p alone::

    cross_entropy        -sum w p
    importance_sampling  -sum r A
    ppo                  -sum min(r A, clip(r, low, high) A)
    cispo                -sum sg(clip(r, low, high)) p A
    dro                  -sum (p A - beta/2 (p - q)^2)
    gspo                 -sum min(s A, clip(s, low, high) A)

Positions whose advantage is 0 are exactly 0 in importance_sampling, ppo, cispo and gspo, whatever their
``logprobs``. Sources: Tinker documentation; PPO arXiv 1707.06347, CISPO 2506.13585, DRO 2405.19107, GSPO
2507.18071.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuft_jupyter.core.errors import DatumError, UserError
from tuft_jupyter.core.loss_names import CUSTOM, check_loss
from tuft_jupyter.engine.custom_loss import Program, program

Inputs = Mapping[str, Tensor]
Config = Mapping[str, float]
Formula = Callable[[Tensor, Inputs, Config], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Loss:
    """One loss function.

    ``formula(logprobs, inputs, config)`` gives the loss and its slope dL/dlogprobs at each position, both
    shaped as ``logprobs``: [M], or [M, K] if ``many_targets``. It may be called on any stretch of positions,
    unless ``whole_sequences``: then on exactly one datum. ``required`` and ``optional`` name its inputs
    beside ``target_tokens``; ``config`` holds the accepted keys with their defaults. ``weight`` is the input
    whose non-zero positions the loss is about; where ``sparse``, all others have loss 0 and slope 0.
    ``program`` is the graph of a loss that a user wrote: its inputs are as they came, [T], [T, K] or one number, and
    it may say further numbers of each datum.
    """

    name: str
    formula: Formula
    weight: str
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    config: Config = field(default_factory=dict)
    sparse: bool = True
    many_targets: bool = False
    whole_sequences: bool = False
    program: Program | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.required + self.optional

    def default(self, name: str, config: Config) -> float:
        """What a missing optional input stands for at every position."""
        return config.get(name, 1.0)

    def weight_sum(self, weight: NDArray[np.float32]) -> float:
        """What a sum of this loss is divided by for a loss per token, from the values of input ``weight``."""
        return float(
            np.abs(weight).sum(dtype=np.float64) if self.weight == "weights" else (weight != 0).sum()
        )


def _cross_entropy(p: Tensor, inputs: Inputs, config: Config) -> tuple[Tensor, Tensor]:
    slope = -inputs["weights"]
    return slope * p, slope


def _log_ratio(p: Tensor, inputs: Inputs) -> Tensor:
    """p - q where the advantage counts, else 0: a masked position may carry any ``logprobs``."""
    return torch.where(inputs["advantages"] != 0, p - inputs["logprobs"], 0.0)


def _clip_bounds(inputs: Inputs, config: Config) -> tuple[Tensor | float, Tensor | float]:
    """Per position if given as inputs, else from the config."""
    low, high = "clip_low_threshold", "clip_high_threshold"
    return inputs.get(low, config[low]), inputs.get(high, config[high])


def _clamp(ratio: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    low, high = (torch.as_tensor(bound, device=ratio.device) for bound in (low, high))
    return torch.clamp(ratio, low, high)


def _importance_sampling(p: Tensor, inputs: Inputs, config: Config) -> tuple[Tensor, Tensor]:
    loss = -_log_ratio(p, inputs).exp() * inputs["advantages"]
    return loss, loss


def _clipped(ratio: Tensor, inputs: Inputs, config: Config) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio) A); d ratio / dp = ratio."""
    low, high = _clip_bounds(inputs, config)
    free = ratio * inputs["advantages"]
    held = _clamp(ratio, low, high) * inputs["advantages"]
    return -torch.minimum(free, held), torch.where(free <= held, -free, 0.0)


def _ppo(p: Tensor, inputs: Inputs, config: Config) -> tuple[Tensor, Tensor]:
    return _clipped(_log_ratio(p, inputs).exp(), inputs, config)


def _cispo(p: Tensor, inputs: Inputs, config: Config) -> tuple[Tensor, Tensor]:
    low, high = _clip_bounds(inputs, config)
    ratio = _clamp(_log_ratio(p, inputs).exp(), low, high)
    slope = -ratio * inputs["advantages"]
    return slope * p, slope


def _dro(p: Tensor, inputs: Inputs, config: Config) -> tuple[Tensor, Tensor]:
    gap, advantages, beta = p - inputs["logprobs"], inputs["advantages"], config["beta"]
    return beta / 2 * gap.square() - p * advantages, beta * gap - advantages


def _gspo(p: Tensor, inputs: Inputs, config: Config) -> tuple[Tensor, Tensor]:
    counted = inputs["sequence_ratio_mask"] != 0
    gap = torch.where(counted, p - inputs["logprobs"], 0.0)
    mean = gap.sum() / counted.sum().clamp(min=1)
    return _clipped(mean.exp().expand_as(p), inputs, config)


_CLIP = ("clip_low_threshold", "clip_high_threshold")
_POLICY = ("logprobs", "advantages")
_PPO_CLIP = MappingProxyType({"clip_low_threshold": 0.8, "clip_high_threshold": 1.2})
# A whole sequence's ratio moves far less than one token's; these are the GSPO paper's bounds (section 5.1).
_GSPO_CLIP = MappingProxyType({"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4})

REGISTRY: Mapping[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", _cross_entropy, "weights", optional=("weights",), many_targets=True),
        Loss("importance_sampling", _importance_sampling, "advantages", _POLICY),
        Loss("ppo", _ppo, "advantages", _POLICY, _CLIP, _PPO_CLIP),
        Loss("cispo", _cispo, "advantages", _POLICY, _CLIP, _PPO_CLIP),
        Loss("dro", _dro, "advantages", _POLICY, config={"beta": 0.05}, sparse=False),
        Loss(
            "gspo",
            _gspo,
            "advantages",
            (*_POLICY, "sequence_ratio_mask"),
            _CLIP,
            _GSPO_CLIP,
            whole_sequences=True,
        ),
    )
}


def written(own: Program, datum: int = 0) -> Loss:
    """The loss that a user's graph computes; what goes wrong in it is datum ``datum``'s fault."""

    def formula(p: Tensor, inputs: Inputs, config: Config) -> tuple[Tensor, Tensor]:
        try:
            loss, slope = own.evaluate(p, inputs)
        except UserError as error:
            raise DatumError(datum, error.message) from None
        losses = torch.zeros_like(p)
        losses.view(-1)[0] = loss  # of the whole datum: positions have no share in it
        return losses, slope.to(p.device)

    return Loss(
        CUSTOM,
        formula,
        weight="target_tokens",
        required=tuple(own.ranks),
        sparse=False,
        many_targets=own.logprobs_rank == 2,
        whole_sequences=True,
        program=own,
    )


def resolve(name: str, config: Mapping[str, float | str]) -> tuple[Loss, Config]:
    """The loss called ``name`` and its full configuration.

    UserError names the key or the losses that exist.
    """
    if name == CUSTOM:
        return written(program(config.get("loss_id"))), {}
    check_loss(name, custom_loss=False)
    loss = REGISTRY[name]
    values = dict(loss.config)
    for key, value in config.items():
        if key not in values:
            accepted = f"it takes {', '.join(values)}" if values else "it takes none"
            raise UserError(f'loss_fn_config: "{name}" has no setting "{key}"; {accepted}')
        if isinstance(value, str) or not math.isfinite(value):
            raise UserError(f'loss_fn_config: "{key}" must be a finite number, not {value!r}')
        values[key] = float(value)
    if "clip_low_threshold" in values and values["clip_low_threshold"] > values["clip_high_threshold"]:
        raise UserError("loss_fn_config: clip_low_threshold must not be above clip_high_threshold")
    return loss, values
