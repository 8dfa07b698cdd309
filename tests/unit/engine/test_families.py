"""Model families through transformers' attention interface: each tenant's numbers in a mixed batch are PEFT's alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support.datums import ask, make_datum
from tests.support.plain_peft import cross_entropy, plain_peft
from tests.support.tiny_models import SCALED, make_model
from tuft_jupyter.core.errors import TuftError
from tuft_jupyter.core.types import LoraSpec
from tuft_jupyter.engine.trainer import PeftTrainer

ALL = LoraSpec(rank=4, alpha=8, seed=1, train_unembed=False)
ATTENTION = LoraSpec(rank=7, alpha=7, seed=2, train_mlp=False, train_unembed=False)
UNEMBEDDING = LoraSpec(rank=3, alpha=9, seed=3)
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[LoraSpec, dict[str, Any]]] = {
    "llama": (ALL, {}),
    "qwen2": (ALL, {}),
    "qwen3": (ALL, {}),
    "gemma": (ALL, {}),
    "mistral": (ALL, {"sliding_window": 6}),
    "mixtral": (ALL, {"num_local_experts": 4, **EXPERTS}),
    "qwen3_moe": (ALL, {"num_experts": 4, "moe_intermediate_size": 32, **EXPERTS}),
    "gpt_oss": (ALL, {"num_local_experts": 4, "sliding_window": 6, **EXPERTS}),
    **{family: (UNEMBEDDING, scaled) for family, scaled in SCALED.items()},
}
LIMIT = 2e-6  # relative L2, fp32


def randomized(trainer: PeftTrainer, run: str, spec: LoraSpec, seed: int) -> None:
    """An adapter that changes what the model says, B included."""
    trainer.create(run, spec)
    trainer.bank[run].weights.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    trainer.bank[run].refresh()


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_two_tenants_in_one_pass_get_what_peft_gives_each_alone(family: str, tmp_path: Path) -> None:
    spec, extra = FAMILIES[family]
    directory = make_model(tmp_path, family, spread=0.05, **extra)
    trainer = PeftTrainer(directory)
    requests = {}
    for seed, (run, mine) in enumerate({"a": spec, "b": ATTENTION}.items()):
        randomized(trainer, run, mine, seed)
        requests[run] = [make_datum(n, seed=seed) for n in (5, 19, 9)]
    results = trainer.forward_backward([(run, ask(data)) for run, data in requests.items()])
    for (run, data), mine, result in zip(requests.items(), (spec, ATTENTION), results, strict=True):
        assert not isinstance(result, TuftError), result
        loss, logprobs, gradients = cross_entropy(
            plain_peft(directory, mine, trainer.bank.state_dict(run)), data
        )
        assert result.loss_sum == pytest.approx(loss, rel=LIMIT)
        for ours, theirs in zip(result.logprobs, logprobs, strict=True):
            assert distance(torch.from_numpy(ours), theirs) <= LIMIT
        adapter = trainer.bank[run]
        assert adapter.grads is not None
        views = adapter.split(adapter.grads)
        ours, theirs = (torch.cat([g[name].flatten() for name in gradients]) for g in (views, gradients))
        assert distance(ours, theirs) <= LIMIT


def test_gemma_3n_has_numbered_layers_and_writes_into_what_they_give(tmp_path: Path) -> None:
    """Its MLPs have a size each, and its MLP adapters are PEFT's, which finds them by the names in the file."""
    own: dict[str, Any] = {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "sliding_window": 6,
        "laurel_rank": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 320,
        "activation_sparsity_pattern": [0.0] * 4,
    }
    directory = make_model(tmp_path / "m", "gemma3n", layers=4, spread=0.05, **own)
    trainer, data = PeftTrainer(directory), [make_datum(n) for n in (5, 19)]
    randomized(trainer, "a", ALL, 0)
    (result,) = trainer.forward_backward([("a", ask(data))])
    assert not isinstance(result, TuftError), result
    trainer.save("a", tmp_path / "a", optimizer=False)
    whole = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    loss, _, gradients = cross_entropy(
        PeftModel.from_pretrained(whole, tmp_path / "a", is_trainable=True).eval(), data
    )
    assert result.loss_sum == pytest.approx(loss, rel=LIMIT)
    adapter = trainer.bank["a"]
    assert adapter.grads is not None
    assert adapter.layout.keys() >= gradients.keys()
    views = adapter.split(adapter.grads)
    ours, theirs = (torch.cat([g[name].flatten() for name in gradients]) for g in (views, gradients))
    assert distance(ours, theirs) <= 1e-5


def test_half_precision_is_as_near_the_truth_as_peft(tmp_path: Path) -> None:
    """bf16: the error of our gradient against fp32 is at most 1.1 times that of PEFT's own bf16 gradient."""
    whole = make_model(tmp_path / "bf16", dtype=torch.bfloat16, spread=0.05, layers=4, hidden=128)
    trainer = PeftTrainer(whole)
    data = [make_datum(n, seed=n) for n in (150, 40, 90, 17)]
    for i, run in enumerate(("a", "b")):
        randomized(trainer, run, ALL, i)
    trainer.forward_backward([("a", ask(data)), ("b", ask(data[:2]))])
    adapter = trainer.bank["a"]
    assert adapter.grads is not None
    truth, theirs = (
        cross_entropy(plain_peft(whole, ALL, trainer.bank.state_dict("a"), dtype=dtype), data)[2]
        for dtype in (torch.float32, torch.bfloat16)
    )
    flat = [
        torch.cat([g[name].flatten().float() for name in truth])
        for g in (adapter.split(adapter.grads), theirs, truth)
    ]
    assert distance(flat[0], flat[2]) <= 1.1 * distance(flat[1], flat[2])
