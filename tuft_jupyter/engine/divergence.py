"""How far the learner has moved from the policy that drew its data, measured on that data.

For data that brings the sampler's log-probabilities and advantages. It looks at a request and its answer, and knows
neither models nor how the loss is computed.
"""

from __future__ import annotations

import numpy as np

from tuft_jupyter.core.types import ForwardBackward, ForwardBackwardResult


def sampled_kl(request: ForwardBackward, answer: ForwardBackwardResult) -> dict[str, float]:
    """``kl_sum`` (nats) over the ``kl_tokens`` positions with an advantage; nothing if there are none.

    With r the learner's probability over the sampler's, a position counts as r - 1 - log r: the estimator k3 of
    KL(sampler || learner), unbiased and never negative (J. Schulman, "Approximating KL divergence", 2020).
    """
    total, count = 0.0, 0
    for datum, learner in zip(request.data, answer.logprobs, strict=True):
        sampler, advantages = (datum.inputs.get(name) for name in ("logprobs", "advantages"))
        if sampler is None or advantages is None or not sampler.shape == advantages.shape == learner.shape:
            continue  # of a loss that does not take them nobody checks the shapes
        counted = advantages != 0
        log_ratio = learner[counted].astype(np.float64) - sampler[counted]
        with np.errstate(over="ignore"):  # a ratio beyond all numbers: nothing is told
            total += float((np.expm1(log_ratio) - log_ratio).sum())
        count += int(counted.sum())
    return {"kl_sum": total, "kl_tokens": count} if count and np.isfinite(total) else {}
