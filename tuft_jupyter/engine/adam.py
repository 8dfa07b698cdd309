"""AdamW for one adapter, held in flat vectors.

The numbers are those of ``torch.optim.AdamW`` (decoupled weight decay, Loshchilov & Hutter 2019), whose fused
kernel does the work in one pass over the vectors. One adapter's step never reads or writes another's memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import AdamParams


class Adam:
    """Moments and step count for ``weights`` and ``grads``, both fp32 [P]."""

    def __init__(self, weights: Tensor, grads: Tensor) -> None:
        self._weights, self._grads = weights, grads
        self._moments: tuple[Tensor, Tensor] | None = None
        self._step = torch.zeros((), device=weights.device)

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Running means of the gradient and of its square, fp32 [P]; 0 before the first step."""
        if self._moments is None:
            self._moments = torch.zeros_like(self._weights), torch.zeros_like(self._weights)
        return self._moments

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The moments if there are any yet."""
        return self._moments or ()

    @property
    def steps(self) -> int:
        return int(self._step)

    def reset(self, steps: int = 0) -> None:
        """Zero moments, and a step count that a restored optimizer starts from."""
        self._moments = None
        self._step.fill_(steps)

    @torch.no_grad()
    def step(self, params: AdamParams) -> dict[str, float]:
        """Change the weights by the accumulated gradient and clear it; without any gradient, by a gradient of
        0.

        UserError if the gradient is not finite: then it is dropped, and weights and moments stay as they
        were.
        """
        norm = torch.linalg.vector_norm(self._grads)
        grad_norm = clipped = float(norm)
        if not math.isfinite(grad_norm):
            self._grads.zero_()
            raise UserError(
                "optim_step: the accumulated gradient is not finite; it was dropped and the weights are "
                "unchanged. Use a lower learning rate, or check the weights or advantages of the last batch"
            )
        if params.grad_clip_norm > 0:
            # As torch.nn.utils.clip_grad_norm_ does it.
            self._grads.mul_(torch.clamp(params.grad_clip_norm / (norm + 1e-6), max=1.0))
            clipped = min(grad_norm, params.grad_clip_norm)
        mean, square = self.moments
        adamw(
            [self._weights],
            [self._grads],
            [mean],
            [square],
            [],
            [self._step],
            fused=True,
            amsgrad=False,
            beta1=params.beta1,
            beta2=params.beta2,
            lr=params.learning_rate,
            weight_decay=params.weight_decay,
            eps=params.eps,
            maximize=False,
        )
        self._grads.zero_()
        return {
            "grad_norm": grad_norm,
            "grad_norm_clipped": clipped,
            "learning_rate": params.learning_rate,
            "step": float(self.steps),
        }
