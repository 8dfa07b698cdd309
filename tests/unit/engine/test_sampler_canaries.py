"""Every tenant's answers come from that tenant's weights, whatever else is going on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.canaries import make_canaries
from tests.support.sampling import ask, prompt
from tuft_jupyter.core.errors import TuftError
from tuft_jupyter.engine.torch_sampler import TorchSampler

TOKENS = (40, 80, 120, 160, 200, 240)
INTERLEAVINGS = 1000


@pytest.mark.slow
def test_each_tenant_hears_its_own_weights_in_a_thousand_random_interleavings(
    qwen3: Path, tmp_path: Path
) -> None:
    """T8: requests come, are cancelled and end in random order while adapters are loaded and dropped."""
    canaries = dict(zip(TOKENS, make_canaries(tmp_path, qwen3, TOKENS), strict=True))
    sampler = TorchSampler(qwen3, max_adapters=4, max_live=8)
    rng = np.random.default_rng(0)
    asked: dict[str, int] = {}
    heard = wrong = 0
    for turn in range(INTERLEAVINGS):
        for _ in range(rng.integers(0, 4)):
            token, key = int(rng.choice(TOKENS)), f"{turn}.{len(asked)}"
            request = ask(
                prompt(int(rng.integers(1, 12)), seed=turn),
                int(rng.integers(1, 3)),
                max_tokens=int(rng.integers(1, 4)),
                temperature=0.0,
            )
            sampler.submit(key, canaries[token], request)
            asked[key] = token
        if asked and rng.random() < 0.1:
            gone = str(rng.choice(list(asked)))
            sampler.cancel(gone)
            asked.pop(gone)
        for key, result in sampler.step():
            if key in asked:
                assert not isinstance(result, TuftError), result
                token = asked.pop(key)
                heard += 1
                wrong += any((sequence.tokens != token).any() for sequence in result.sequences)
    assert heard > INTERLEAVINGS / 2
    assert wrong == 0
