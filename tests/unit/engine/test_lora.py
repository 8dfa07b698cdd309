"""Adapters on one base: geometry by PEFT, gradients by the fused layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from tests.support.plain_peft import adapter_parameters, assert_as_peft, in_double, plain_peft
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import LoraSpec
from tuft_jupyter.engine import packing
from tuft_jupyter.engine.base import BaseModel, load_base
from tuft_jupyter.engine.decoder import Decoder, ModuleDecoder
from tuft_jupyter.engine.lora import Adapter, AdapterBank, initialize, lora_config, target_modules

SPECS = {
    "a": LoraSpec(rank=4, alpha=8, seed=1, train_unembed=False),
    "b": LoraSpec(rank=2, alpha=16, seed=2, train_attn=False, train_unembed=False),
    "c": LoraSpec(rank=7, alpha=7, seed=3, train_mlp=False, train_unembed=False),
}


def fill(adapter: Adapter, seed: int) -> None:
    """Weights for which no gradient is 0."""
    adapter.weights.copy_(
        torch.randn(adapter.weights.shape, generator=torch.Generator().manual_seed(seed)) * 0.2
    )
    adapter.refresh()


def make_bank(base: BaseModel) -> AdapterBank:
    bank = AdapterBank(base)
    for name, spec in SPECS.items():
        fill(bank.add(name, lora_config(base, spec), trainable=True), spec.seed)
    return bank


def written_out(base: BaseModel) -> Decoder:
    return base.run


def modules(base: BaseModel) -> Decoder:
    return ModuleDecoder(base.hf)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("which", [written_out, modules])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_hidden_states_and_gradients_of_mixed_adapters_equal_peft_alone(
    family: str, which: Callable[[BaseModel], Decoder], sparse: bool, request: pytest.FixtureRequest
) -> None:
    """Different ranks, alphas and targets in one row, forward and backward; ``sparse``: with prompts, and one
    adapter that has no gradient at all."""
    directory: Path = request.getfixturevalue(family)
    base = load_base(directory)
    bank = make_bank(base)
    g = torch.Generator().manual_seed(0)
    names, lengths = ["a", "a", "b", "c"], [5, 5, 9, 3]
    ids = [torch.randint(320, (n,), generator=g) for n in lengths]
    slopes = [torch.randn(n, 64, generator=g) for n in lengths]
    packed = packing.causal(lengths, names, base.device)
    hidden, pull = which(base)(
        packed, torch.cat(ids), packing.positions(packed.cu, base.device), backward=True
    )
    if sparse:
        for slope in slopes[:3]:
            slope[: len(slope) // 2] = 0
        slopes[3].zero_()
    gradient = torch.cat(slopes)
    pull(gradient, gradient.any(1).nonzero()[:, 0] if sparse else None)
    for name, spec in SPECS.items():
        adapter = bank[name]
        own = [at for at, n in enumerate(names) if n == name]
        alone = partial(
            peft_alone,
            plain_peft(directory, spec, bank.state_dict(name)),
            [(ids[at], slopes[at]) for at in own],
        )
        states, theirs = alone()
        ours = torch.cat([hidden.split(lengths)[at] for at in own])
        assert float((ours - states).norm() / states.norm()) <= 1e-5
        assert adapter.grads is not None
        assert_as_peft(adapter.split(adapter.grads), theirs, lambda alone=alone: alone(double=True)[1])


def peft_alone(
    peft: PeftModel, rows: list[tuple[Tensor, Tensor]], *, double: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The hidden states of (tokens, slopes), and the gradients."""
    if double:
        in_double(peft)
    peft.zero_grad()
    states = [peft.base_model.model.model(ids[None]).last_hidden_state[0] for ids, _ in rows]
    for state, (_, slope) in zip(states, rows, strict=True):
        state.backward(slope.to(state.dtype))
    gradients = {name: p.grad for name, p in adapter_parameters(peft).items() if p.grad is not None}
    return torch.cat(states).detach(), gradients


def test_the_bank_gives_tensors_peft_names_and_takes_them_back(qwen3: Path) -> None:
    bank = make_bank(load_base(qwen3))
    saved = {name: t.clone() for name, t in bank.state_dict("a").items()}
    assert len(saved) == 2 * 7 * 2
    assert set(saved) == set(bank["a"].layout)
    before = bank["b"].weights.clone()
    bank["a"].weights.zero_()
    bank.load_state_dict("a", saved)
    for name, tensor in bank.state_dict("a").items():
        assert torch.equal(tensor, saved[name])
    assert torch.equal(bank["b"].weights, before)


def test_removing_an_adapter_leaves_the_others_and_its_place_can_be_taken_again(qwen3: Path) -> None:
    base = load_base(qwen3)
    bank = make_bank(base)
    kept = bank["b"].weights.clone()
    for name in ("a", "b", "c", "never there"):
        bank.remove(name)
    assert "a" not in bank
    fill(bank.add("b", lora_config(base, SPECS["b"]), trainable=True), SPECS["b"].seed)
    assert torch.equal(bank["b"].weights, kept)


def test_the_same_seed_starts_the_same_adapter_and_another_seed_another(qwen3: Path) -> None:
    base = load_base(qwen3)
    bank = AdapterBank(base)
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        initialize(bank.add(name, lora_config(base, SPECS["a"]), trainable=True), seed)
    assert torch.equal(bank["x"].weights, bank["y"].weights)
    assert not torch.equal(bank["x"].weights, bank["z"].weights)
    for name, tensor in bank["x"].split(bank["x"].weights).items():
        if ".lora_B." in name:
            assert not tensor.any()
        else:
            assert 0 < float(tensor.abs().max()) <= 1 / tensor.shape[1] ** 0.5


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}),
        ({"train_mlp": False, "train_unembed": False}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"train_attn": False, "train_unembed": False}, {"gate_proj", "up_proj", "down_proj"}),
        ({"train_attn": False, "train_mlp": False}, {"lm_head"}),
    ],
)
def test_the_flags_choose_the_layers_of_the_family(
    qwen3: Path, flags: dict[str, bool], expected: set[str]
) -> None:
    base = load_base(qwen3)
    spec = LoraSpec(rank=2, alpha=4, seed=0, **flags)
    assert set(target_modules(base, spec)) == expected
    AdapterBank(base).add("a", lora_config(base, LoraSpec(2, 4, 0)), trainable=False)
    assert set(target_modules(base, spec)) == expected, "also once layers are wrapped"


def test_an_adapter_without_any_target_is_refused(qwen3: Path) -> None:
    spec = LoraSpec(2, 4, 0, train_attn=False, train_mlp=False, train_unembed=False)
    with pytest.raises(UserError, match="train_attn"):
        target_modules(load_base(qwen3), spec)
