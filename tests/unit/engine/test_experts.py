"""Experts whose matrices are one tensor: adapters of many tenants on them, in PEFT's files and with PEFT's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.support.adapters import make_adapter, peft_model, plain_model
from tests.support.datums import ask, make_datum
from tests.support.plain_peft import EXPERTS, adapter_parameters, target_logprobs
from tests.support.sampling import ask as draw
from tests.support.sampling import prompt, run, tokens_of
from tests.support.tiny_models import make_model
from tests.support.training import ok, step
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import LoraSpec
from tuft_jupyter.engine import checkpoint, experts, memory, packing
from tuft_jupyter.engine.torch_sampler import TorchSampler
from tuft_jupyter.engine.trainer import PeftTrainer

pytestmark = pytest.mark.slow

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Experts that are transposed and have biases are those of gpt-oss."""
SPEC = LoraSpec(rank=4, alpha=8, seed=1)
ONLY_EXPERTS = LoraSpec(rank=3, alpha=9, seed=2, train_attn=False, train_unembed=False)


@pytest.fixture(params=FAMILIES)
def moe(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_model(tmp_path / "m", request.param, seed=4, **FAMILIES[request.param])


def trained(trainer: PeftTrainer, name: str, steps: range) -> list[float]:
    losses = []
    for n in steps:
        losses.append(
            ok(trainer.forward_backward([(name, ask([make_datum(20, seed=n), make_datum(7)]))])[0]).loss_sum
        )
        step(trainer, name)
    return losses


def by_name(trainer: PeftTrainer, name: str) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in trainer.bank.state_dict(name).items()}


@pytest.mark.parametrize("spec", [SPEC, ONLY_EXPERTS])
def test_peft_loads_every_tensor_of_a_trained_adapter_and_says_the_same(
    spec: LoraSpec, moe: Path, tmp_path: Path
) -> None:
    """S1-40: a plain PEFT directory, with ``target_parameters``."""
    trainer = PeftTrainer(moe)
    trainer.create("run", spec)
    before = by_name(trainer, "run")
    trained(trainer, "run", range(3))
    moved = {key for key, tensor in by_name(trainer, "run").items() if not torch.equal(tensor, before[key])}
    assert moved == before.keys(), "every expert's tensors are trained"
    trainer.save("run", tmp_path / "saved", optimizer=False)
    plain = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32)
    peft = PeftModel.from_pretrained(plain, tmp_path / "saved")
    in_file = safetensors.torch.load_file(tmp_path / "saved" / checkpoint.WEIGHTS)
    loaded = adapter_parameters(peft)
    assert loaded.keys() == in_file.keys() == before.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in in_file.items())
    theirs = target_logprobs(peft, make_datum(20)).detach().numpy()
    ours = ok(trainer.forward_backward([("run", ask([make_datum(20)], backward=False))])[0]).logprobs[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_resumed_run_goes_on_bit_by_bit(moe: Path, tmp_path: Path) -> None:
    """F16, S1-39."""
    trainer = PeftTrainer(moe)
    trainer.create("run", SPEC)
    trained(trainer, "run", range(2))
    trainer.save("run", tmp_path / "saved", optimizer=True)
    again = PeftTrainer(moe)
    again.load("run", tmp_path / "saved", optimizer=True)
    assert trained(again, "run", range(2, 4)) == trained(trainer, "run", range(2, 4))
    for key, tensor in by_name(trainer, "run").items():
        assert torch.equal(tensor, again.bank.state_dict("run")[key])


def test_layers_that_are_computed_again_give_the_same_bits(
    moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [("a", ask([make_datum(n, seed=n) for n in (50, 1, 17)])), ("b", ask([make_datum(9)]))]
    found = []
    for tight in (False, True):
        monkeypatch.setattr(memory, "is_tight", lambda *_, tight=tight: tight)
        trainer = PeftTrainer(moe)
        for name, spec in (("a", SPEC), ("b", ONLY_EXPERTS)):
            trainer.create(name, spec)
        losses = [ok(result).loss_sum for result in trainer.forward_backward(batch)]
        found.append((losses, *(step(trainer, name)["grad_norm"] for name in ("a", "b"))))
    assert found[0] == found[1]


@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1], EXPERTS[1:]])
def test_adapters_that_peft_made_are_sampled_together_token_for_token(
    parameters: list[str], moe: Path, tmp_path: Path
) -> None:
    """Two adapters and none in one batch; also where one of the two tensors is adapted alone."""
    paths = [
        make_adapter(tmp_path / str(i), moe, seed=i, rank=2 + i, modules=("q_proj",), parameters=parameters)
        for i in range(2)
    ]
    jobs = [(at, prompt(6 + i, seed=i)) for i, at in enumerate([*paths, None])]
    answers = run(TorchSampler(moe), [(at, draw(p, temperature=0.0, max_tokens=12)) for at, p in jobs])
    said = []
    for (at, tokens), answer in zip(jobs, answers, strict=True):
        oracle: Any = plain_model(moe) if at is None else peft_model(moe, at)
        oracle.generation_config.eos_token_id = None
        ids = torch.from_numpy(tokens).long()[None]
        out = oracle.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
        said.append(out[0, len(tokens) :].tolist())
        assert tokens_of(answer) == [said[-1]]
    assert len({tuple(tokens) for tokens in said}) == 3, "adapters change what is said"


def test_an_adapter_for_tensors_that_are_not_there_is_refused(tmp_path: Path) -> None:
    moe = make_model(tmp_path / "m", "mixtral", **FAMILIES["mixtral"])
    adapter = make_adapter(tmp_path / "a", moe, seed=0, modules=("q_proj",), parameters=EXPERTS)
    config = (adapter / checkpoint.CONFIG).read_text().replace("experts.gate_up_proj", "experts.gate_proj")
    (adapter / checkpoint.CONFIG).write_text(config)
    with pytest.raises(
        UserError, match=r"target_parameters cannot be adapted: no experts have 'experts.gate_proj'"
    ):
        PeftTrainer(moe).load("run", adapter, optimizer=False)


def test_layers_that_peft_takes_for_parts_of_experts_are_refused_by_name(tmp_path: Path) -> None:
    """Shared experts beside those that are chosen: an adapter on them could not be read by PEFT."""
    moe = make_model(tmp_path, "qwen2_moe", **FAMILIES["qwen3_moe"], shared_expert_intermediate_size=32)
    trainer = PeftTrainer(moe)
    with pytest.raises(
        UserError, match=r"train_mlp.*down_proj, gate_proj, up_proj beside its experts.*train_mlp=False"
    ):
        trainer.create("run", SPEC)
    trainer.create("run", LoraSpec(2, 4, 0, train_mlp=False))
    assert trained(trainer, "run", range(1))[0] > 0


def test_experts_are_computed_over_packed_rows_only(tmp_path: Path) -> None:
    moe = PeftTrainer(make_model(tmp_path, "mixtral", **FAMILIES["mixtral"])).base
    (_, layer), *_ = experts.layers(moe.hf)
    row = torch.zeros(2, 64), torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=r"outside of Packed.active"):
        layer(*row)
    with packing.causal((2,), (None,), moe.device).active():
        assert layer(*row).shape == (2, 64)
