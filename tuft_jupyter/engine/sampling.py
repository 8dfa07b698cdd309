"""Drawing tokens from logits, row by row with each row's own temperature, filters and random numbers.

A token is drawn by inverting the cumulative distribution at one uniform number in [0, 1). That number comes
from the row's own generator and the distribution is laid out in the order of the vocabulary, so what a row
draws does not depend on who else is in the batch (up to the rounding of logits computed in a larger batch).

Log-probabilities are those of the model itself: temperature 1, no filters. Filters apply in the usual order:
temperature, then the ``top_k`` likeliest, then of these the fewest whose mass reaches ``top_p`` (nucleus
sampling, Holtzman et al. 2019, arXiv 1904.09751).

Shapes: N rows, M rows with filters, V vocabulary, K candidates or draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tuft_jupyter.core.types import SamplingParams

_FIRST_CANDIDATES = 256


Top = list[list[tuple[int, float]]]
"""For each row, (token, logprob) of its likeliest tokens."""


def generator(seed: int | None, index: int) -> np.random.Generator:
    """The random numbers of sample ``index`` of a request; None is a fresh seed from the system."""
    return np.random.default_rng(None if seed is None else (seed, index))


class Picker:
    """Draws one token per row; made anew when the rows change. ``k`` likeliest tokens are told with each."""

    def __init__(
        self, params: Sequence[SamplingParams], vocab_size: int, device: torch.device, k: int = 0
    ) -> None:
        self._device = device
        self._k = k
        greedy = [i for i, p in enumerate(params) if p.temperature == 0]
        filtered = [
            i for i, p in enumerate(params) if p.temperature and (0 < p.top_k < vocab_size or p.top_p < 1)
        ]
        self.all_greedy = len(greedy) == len(params)
        self._greedy = torch.tensor(greedy, device=device) if greedy else None
        self._filtered = torch.tensor(filtered, device=device) if filtered else None
        temperatures = [p.temperature or 1.0 for p in params]
        self._temperature_N1 = (
            None if set(temperatures) == {1.0} else torch.tensor(temperatures, device=device)[:, None]
        )
        ks = [params[i].top_k if params[i].top_k > 0 else vocab_size for i in filtered]
        self._k_M1 = torch.tensor(ks, device=device)[:, None]
        ps = [params[i].top_p if params[i].top_p < 1 else math.inf for i in filtered]
        self._p_M1 = torch.tensor(ps, device=device)[:, None]
        self._largest_k = max(ks, default=0)

    def __call__(self, logits_NV: Tensor, uniforms: Sequence[float]) -> tuple[Tensor, Tensor, Top]:
        """Tokens int64 [N], their log-probabilities fp32 [N], and the k likeliest of each row, best first.

        ``uniforms`` are in [0, 1), one per row.
        """
        logp_NV = torch.log_softmax(logits_NV, -1, dtype=torch.float32)
        tokens_N = logp_NV.argmax(-1) if self.all_greedy else self._draw(logp_NV, uniforms)
        return tokens_N, logp_NV.gather(1, tokens_N[:, None])[:, 0], self._likeliest(logp_NV)

    def _likeliest(self, logp_NV: Tensor) -> Top:
        if not self._k:
            return [[]] * len(logp_NV)
        top_NK, ids_NK = logp_NV.topk(self._k, dim=1)
        return [
            list(zip(ids, logps, strict=True))
            for ids, logps in zip(ids_NK.tolist(), top_NK.tolist(), strict=True)
        ]

    def _draw(self, logp_NV: Tensor, uniforms: Sequence[float]) -> Tensor:
        heat_N1 = self._temperature_N1
        probs_NV = logp_NV.exp() if heat_N1 is None else torch.softmax(logp_NV / heat_N1, -1)
        if self._filtered is not None:
            probs_NV[self._filtered] = self._truncated(probs_NV[self._filtered])
        uniforms_N1 = torch.tensor(uniforms, dtype=torch.float64, device=self._device)[:, None]
        tokens_N = invert(probs_NV, uniforms_N1)[:, 0]
        if self._greedy is not None:
            tokens_N[self._greedy] = logp_NV[self._greedy].argmax(-1)
        return tokens_N

    def _truncated(self, probs_MV: Tensor) -> Tensor:
        """The distributions with everything that the filters exclude set to 0."""
        top_MK, ids_MK = self._candidates(probs_MV)
        kept_MK = top_MK * (torch.arange(top_MK.shape[1], device=self._device) < self._k_M1)
        mass_M1 = torch.where(self._k_M1 < probs_MV.shape[1], kept_MK.sum(1, keepdim=True), 1.0)
        before_MK = kept_MK.cumsum(1) - kept_MK
        kept_MK *= before_MK < self._p_M1 * mass_M1
        return torch.zeros_like(probs_MV).scatter_(1, ids_MK, kept_MK)

    def _candidates(self, probs_MV: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest tokens, descending: as many as the filters can leave.

        Sorting a whole vocabulary is dear, and a nucleus is mostly small: look further only if it is not.
        """
        vocab = probs_MV.shape[1]
        count = min(self._largest_k if self._largest_k < vocab else _FIRST_CANDIDATES, vocab)
        while True:
            top_MK, ids_MK = probs_MV.topk(count, dim=1)
            enough = (self._k_M1 <= count) | (top_MK.sum(1, keepdim=True) >= self._p_M1)
            if count == vocab or bool(enough.all()):
                return top_MK, ids_MK
            count = min(count * 8, vocab)


def invert(probs_NV: Tensor, uniforms_NK: Tensor) -> Tensor:
    """The tokens [N, K] at which each row's cumulative probability passes its uniform numbers.

    Any token where probabilities are NaN; its log-probability shows it.
    """
    cdf_NV = probs_NV.cumsum(1, dtype=torch.float64)
    total_N1 = cdf_NV[:, -1:]
    below_N1 = torch.nextafter(total_N1, torch.zeros_like(total_N1))
    # Strictly below the total, so that the token found always has a probability above 0.
    targets_NK = torch.minimum(uniforms_NK * total_N1, below_N1)
    tokens_NK = torch.searchsorted(cdf_NV, targets_NK, right=True)
    return tokens_NK.clamp_(max=probs_NV.shape[1] - 1)  # NaN is found nowhere
