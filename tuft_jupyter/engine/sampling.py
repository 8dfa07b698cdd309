"""Drawing tokens from logits, row by row with each row's own temperature, filters and random numbers.

A token is drawn by inverting the cumulative distribution at one uniform number in [0, 1). That number comes
from the row's own generator and the distribution is laid out in the order of the vocabulary, so what a row
draws does not depend on who else is in the batch (up to the rounding of logits computed in a larger batch).

Log-probabilities are those of the model itself: temperature 1, no filters; or, ``processed``, those of what was drawn
from. Filters apply in the usual order:
temperature, then the ``top_k`` likeliest, then of these the fewest whose mass reaches ``top_p`` (nucleus
sampling, Holtzman et al. 2019, arXiv 1904.09751).

Shapes: N rows, M rows with filters, V vocabulary, K candidates or draws, S stretches of the vocabulary, W tokens each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tuft_jupyter.core.types import NO_TOKEN, SamplingParams

_FIRST_CANDIDATES = 256
_STRETCH = 128  # tokens
_LEAST = torch.finfo(torch.float32).tiny  # of a temperature or a nucleus: what is less would be 0 in fp32


Top = list[list[tuple[int, float]]]
"""For each row, (token, logprob) of its likeliest tokens."""


def generator(seed: int | None, index: int) -> np.random.Generator:
    """The random numbers of sample ``index`` of a request; None is a fresh seed from the system."""
    return np.random.default_rng(None if seed is None else (seed, index))


class Picker:
    """Draws one token per row; made anew when the rows change. ``k`` likeliest tokens are told with each."""

    def __init__(
        self,
        params: Sequence[SamplingParams],
        vocab_size: int,
        device: torch.device,
        k: int = 0,
        *,
        processed: bool = False,
    ) -> None:
        self._device = device
        self._k = k
        self._processed = processed
        greedy = [i for i, p in enumerate(params) if p.temperature == 0]
        filtered = [
            i for i, p in enumerate(params) if p.temperature and (0 < p.top_k < vocab_size or p.top_p < 1)
        ]
        self.all_greedy = len(greedy) == len(params)
        self._greedy = torch.tensor(greedy, device=device) if greedy else None
        self._filtered = torch.tensor(filtered, device=device) if filtered else None
        temperatures = [max(p.temperature, _LEAST) if p.temperature else 1.0 for p in params]
        self._temperature_N1 = (
            None if set(temperatures) == {1.0} else torch.tensor(temperatures, device=device)[:, None]
        )
        ks = [params[i].top_k if params[i].top_k > 0 else vocab_size for i in filtered]
        self._k_M1 = torch.tensor(ks, device=device)[:, None]
        ps = [max(params[i].top_p, _LEAST) if params[i].top_p < 1 else math.inf for i in filtered]
        self._p_M1 = torch.tensor(ps, device=device)[:, None]
        self._largest_k = max(ks, default=0)

    def __call__(self, logits_NV: Tensor, uniforms: Sequence[float]) -> tuple[Tensor, Tensor, Top]:
        """Tokens int64 [N], their log-probabilities fp32 [N], and the k likeliest of each row, best first.

        ``uniforms`` are in [0, 1), one per row.
        """
        z_NV = logits_NV.float()
        if self.all_greedy:
            tokens_N, norm_N1 = z_NV.argmax(-1), z_NV.logsumexp(-1, keepdim=True)
        else:
            tokens_N, norm_N1, masses_NV = self._draw(z_NV, uniforms)
            if self._processed:  # of a greedy row the masses are the model's own
                z_NV, norm_N1 = masses_NV.log(), masses_NV.sum(1, keepdim=True).log_()
        logprobs_N1 = z_NV.gather(1, tokens_N[:, None]) - norm_N1
        return tokens_N, logprobs_N1[:, 0], self._likeliest(z_NV, norm_N1)

    def _likeliest(self, z_NV: Tensor, norm_N1: Tensor) -> Top:
        if not self._k:
            return [[]] * len(z_NV)
        top_NK, ids_NK = z_NV.topk(self._k, dim=1)
        told_NK = (top_NK - norm_N1).clamp_(min=NO_TOKEN)
        return [
            list(zip(ids, logps, strict=True))
            for ids, logps in zip(ids_NK.tolist(), told_NK.tolist(), strict=True)
        ]

    def _draw(self, z_NV: Tensor, uniforms: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [N], the logarithm [N, 1] of what the exponentials of each row add up to, and the masses [N, V]
        that the tokens were drawn by.
        """
        peak_N1 = z_NV.amax(1, keepdim=True)
        heat_N1 = self._temperature_N1
        masses_NV = (z_NV - peak_N1).exp_()
        norm_N1 = masses_NV.sum(1, keepdim=True).log_().add_(peak_N1)
        if heat_N1 is not None:
            masses_NV = torch.sub(z_NV, peak_N1, out=masses_NV).div_(heat_N1).exp_()
        if self._filtered is not None:
            masses_NV[self._filtered] = self._truncated(masses_NV[self._filtered])
        uniforms_N1 = torch.tensor(uniforms, dtype=torch.float64, device=self._device)[:, None]
        tokens_N = invert(masses_NV, uniforms_N1)[:, 0]
        if self._greedy is not None:
            tokens_N[self._greedy] = z_NV[self._greedy].argmax(-1)
        return tokens_N, norm_N1, masses_NV

    def _truncated(self, masses_MV: Tensor) -> Tensor:
        """The distributions with everything that the filters exclude set to 0."""
        total_M1 = masses_MV.sum(1, keepdim=True)
        top_MK, ids_MK = self._candidates(masses_MV, total_M1)
        kept_MK = top_MK * (torch.arange(top_MK.shape[1], device=self._device) < self._k_M1)
        mass_M1 = torch.where(self._k_M1 < masses_MV.shape[1], kept_MK.sum(1, keepdim=True), total_M1)
        before_MK = kept_MK.cumsum(1) - kept_MK
        kept_MK *= before_MK < self._p_M1 * mass_M1
        return torch.zeros_like(masses_MV).scatter_(1, ids_MK, kept_MK)

    def _candidates(self, masses_MV: Tensor, total_M1: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest tokens, descending: as many as the filters can leave.

        Sorting a whole vocabulary is expensive, and a nucleus is mostly small: look further only if it is not.
        """
        vocab = masses_MV.shape[1]
        count = min(self._largest_k if self._largest_k < vocab else _FIRST_CANDIDATES, vocab)
        while True:
            top_MK, ids_MK = masses_MV.topk(count, dim=1)
            enough = (self._k_M1 <= count) | (top_MK.sum(1, keepdim=True) >= self._p_M1 * total_M1)
            if count == vocab or bool(enough.all()):
                return top_MK, ids_MK
            count = min(count * 8, vocab)


def invert(masses_NV: Tensor, uniforms_NK: Tensor) -> Tensor:
    """The tokens [N, K] at which each row's cumulative mass passes its uniform numbers' share of the whole.

    Masses need not add up to 1. First the stretch of the vocabulary is found, then the token in it: summing is
    several times cheaper than accumulating. Any token where masses are NaN; its log-probability shows it.
    """
    rows, vocab = masses_NV.shape
    padded_NV = F.pad(masses_NV, (0, -vocab % _STRETCH)) if vocab % _STRETCH else masses_NV
    stretches_NSW = padded_NV.unflatten(1, (-1, _STRETCH))
    cdf_NS = stretches_NSW.sum(2).cumsum(1, dtype=torch.float64)
    targets_NK = _below(uniforms_NK * cdf_NS[:, -1:], cdf_NS[:, -1:])
    found_NK = torch.searchsorted(cdf_NS, targets_NK, right=True).clamp_(max=cdf_NS.shape[1] - 1)
    left_NK = targets_NK - F.pad(cdf_NS, (1, 0)).gather(1, found_NK)
    inside_NKW = stretches_NSW[torch.arange(rows, device=masses_NV.device)[:, None], found_NK]
    inside_NKW = inside_NKW.cumsum(2, dtype=torch.float64)
    left_NK1 = _below(left_NK[:, :, None], inside_NKW[:, :, -1:])
    tokens_NK = found_NK * _STRETCH + torch.searchsorted(inside_NKW, left_NK1, right=True)[:, :, 0]
    return tokens_NK.clamp_(max=vocab - 1)  # NaN is found nowhere


def _below(targets: Tensor, totals: Tensor) -> Tensor:
    """Strictly below the total, so that the token found always has a mass above 0."""
    return torch.minimum(targets, torch.nextafter(totals, torch.zeros_like(totals)))
