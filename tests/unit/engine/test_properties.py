"""Whatever tenants come together, each gets what PEFT and autograd give it alone. ``make properties`` draws many."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.datums import ask, make_datum, make_policy_datum
from tests.support.plain_peft import (
    LIMIT,
    adapter_parameters,
    assert_as_peft,
    in_double,
    nudge,
    plain_peft,
    target_logprobs,
)
from tests.support.tiny_models import make_model
from tuft_jupyter.core.errors import TuftError
from tuft_jupyter.core.types import Datum, ForwardBackward, LoraSpec
from tuft_jupyter.engine.losses import REGISTRY, resolve
from tuft_jupyter.engine.trainer import PeftTrainer

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("PROPERTY_CASES", "8"))
TARGETS = (
    (True, True, False),
    (True, False, False),
    (False, True, False),
    (True, False, True),
    (True, True, True),
)


@dataclass(frozen=True)
class Tenant:
    """What one tenant sends, and with which adapter."""

    rank: int
    scale: float
    targets: tuple[bool, bool, bool]
    loss: str
    lengths: tuple[int, ...]
    masked: bool

    @property
    def spec(self) -> LoraSpec:
        attn, mlp, unembed = self.targets
        return LoraSpec(
            rank=self.rank,
            alpha=self.rank * self.scale,
            seed=1,
            train_attn=attn,
            train_mlp=mlp,
            train_unembed=unembed,
        )

    def request(self, seed: int) -> ForwardBackward:
        return ask([self._datum(n, 31 * seed + i) for i, n in enumerate(self.lengths)], self.loss)

    def _datum(self, length: int, seed: int) -> Datum:
        if self.loss != "cross_entropy":
            return make_policy_datum(length, seed=seed, **self._mask(length))
        if not self.masked:
            return make_datum(length, seed=seed)
        return make_datum(length, seed=seed, weights=(np.arange(length) >= length // 2).astype(np.float32))

    def _mask(self, length: int) -> dict[str, np.ndarray]:
        return {"sequence_ratio_mask": np.ones(length, np.float32)} if self.loss == "gspo" else {}


tenants = st.builds(
    Tenant,
    rank=st.integers(1, 9),
    scale=st.sampled_from([0.5, 1.0, 2.0, 12.0]),
    targets=st.sampled_from(TARGETS),
    loss=st.sampled_from(sorted(REGISTRY)),
    lengths=st.lists(st.one_of(st.integers(1, 40), st.integers(120, 150)), min_size=1, max_size=4).map(tuple),
    masked=st.booleans(),
)


@pytest.fixture(scope="module", params=["qwen3", "mistral"], ids=["written out", "modules"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    extra = {"sliding_window": 8} if request.param == "mistral" else {}
    directory = tmp_path_factory.mktemp(request.param)
    return make_model(directory, request.param, layers=1, hidden=32, intermediate=48, spread=0.05, **extra)


@settings(
    max_examples=CASES,
    deadline=None,
    derandomize="PROPERTY_CASES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(drawn=st.lists(tenants, min_size=1, max_size=4), budget=st.sampled_from([16, 64, 200, 1024]))
def test_tenants_at_random_get_their_own_numbers(model: Path, drawn: list[Tenant], budget: int) -> None:
    trainer = PeftTrainer(model, micro_batch_tokens=budget)
    for i, tenant in enumerate(drawn):
        trainer.create(str(i), tenant.spec)
        trainer.bank[str(i)].weights.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
        trainer.bank[str(i)].refresh()
    requests = [tenant.request(i) for i, tenant in enumerate(drawn)]
    results = trainer.forward_backward([(str(i), request) for i, request in enumerate(requests)])
    for i, (tenant, request, result) in enumerate(zip(drawn, requests, results, strict=True)):
        assert not isinstance(result, TuftError), result
        adapter = trainer.bank[str(i)]
        assert adapter.grads is not None
        passed = [torch.from_numpy(each) for each in result.logprobs]
        weights = trainer.bank.state_dict(str(i))
        alike = partial(alone, model, tenant.spec, request=request, passed=passed)
        total, terms, logprobs, theirs = alike(weights)
        assert result.loss_sum == pytest.approx(total, rel=1e-5, abs=1e-6 * terms)
        for ours, expected in zip(passed, logprobs, strict=True):
            assert float((ours - expected).norm()) <= LIMIT * float(expected.norm())
        assert_as_peft(
            adapter.split(adapter.grads),
            theirs,
            lambda alike=alike, weights=weights: alike(weights, double=True)[-1],
            lambda seed, alike=alike, weights=weights: alike(nudge(weights, seed))[-1],
        )


def alone(
    model: Path,
    spec: LoraSpec,
    weights: dict[str, Tensor],
    request: ForwardBackward,
    passed: list[Tensor],
    *,
    double: bool = False,
) -> tuple[float, float, list[Tensor], dict[str, Tensor]]:
    """Loss sum, the sum of its terms' sizes, log-probabilities and gradients by PEFT, one datum at a time.

    Gradients are those of the loss at the log-probabilities that ``passed`` the check: the slope of a loss that takes
    differences of them (dro: ``p - q``) is much less exact than they are.
    """
    peft = plain_peft(model, spec, weights)
    if double:
        in_double(peft)
    loss, config = resolve(request.loss_fn, {})
    total = terms = 0.0
    logprobs = []
    for datum, at in zip(request.data, passed, strict=True):
        found = target_logprobs(peft, datum)
        given_ = {
            n: torch.from_numpy(v).to(found.dtype) for n, v in datum.inputs.items() if n != "target_tokens"
        }
        inputs = {
            name: given_.get(name, torch.ones_like(found)) for name in loss.inputs if name not in config
        }
        values, _ = loss.formula(found.detach(), inputs, config)
        _, slopes = loss.formula(at.to(found.dtype), inputs, config)
        total, terms = total + float(values.sum()), terms + float(values.abs().sum())
        found.backward(slopes)
        logprobs.append(found.detach())
    gradients = {n: p.grad for n, p in adapter_parameters(peft).items() if p.grad is not None}
    return total, terms, logprobs, gradients
