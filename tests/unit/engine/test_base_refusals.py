"""Base models and adapters that cannot be trained are refused before anything is loaded, and nothing else suffers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.datums import ask, make_datum
from tests.support.tiny_models import make_model
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import ForwardBackwardResult, LoraSpec
from tuft_jupyter.engine import base as base_
from tuft_jupyter.engine import memory
from tuft_jupyter.engine.trainer import PeftTrainer


def rewrite(directory: Path, **values: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def unknown_architecture(directory: Path) -> None:
    rewrite(directory, model_type="quantum", architectures=["QuantumForCausalLM"])


def no_attention_interface(directory: Path) -> None:
    """Mamba keeps a state and attends to nothing."""
    from transformers import MambaConfig, MambaForCausalLM

    shutil.rmtree(directory)
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(directory)


def attention_twice_in_a_layer(directory: Path) -> None:
    """A sampler would have the second one's past for both."""
    from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

    shutil.rmtree(directory)
    config = DiffLlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    DiffLlamaForCausalLM(config).save_pretrained(directory)


def small_values(directory: Path) -> None:
    """DeepSeek's latent attention. Some of a GPU's kernels take that, no cache of ours does."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    shutil.rmtree(directory)
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, head_dim=4,
    )  # fmt: skip
    DeepseekV3ForCausalLM(config).save_pretrained(directory)


def no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def damaged_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header    ")


def quantized(directory: Path) -> None:
    rewrite(directory, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (unknown_architecture, "cannot be read.*quantum"),
        (no_attention_interface, "mamba|attention"),
        (attention_twice_in_a_layer, "attend more than once in a layer"),
        (small_values, "values have another size than its keys"),
        (no_weights, "cannot be loaded"),
        (damaged_weights, "weights cannot be read"),
        (quantized, "is quantized; use its unquantized weights"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_and_the_others_go_on(
    spoil: Callable[[Path], None], said: str, qwen3: Path, tmp_path: Path
) -> None:
    trainer = PeftTrainer(qwen3)
    trainer.create("run", LoraSpec(2, 4, 0))
    directory = make_model(tmp_path / "bad")
    spoil(directory)
    with pytest.raises(UserError, match=said):
        PeftTrainer(directory)
    assert isinstance(trainer.forward_backward([("run", ask([make_datum(4)]))])[0], ForwardBackwardResult)


def test_a_model_larger_than_the_memory_is_refused_before_it_is_loaded(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = memory.weights(qwen3, None)
    assert whole == sum(p.nbytes for p in base_.load_base(qwen3).hf.parameters())
    assert memory.weights(qwen3, torch.bfloat16) == whole // 2
    monkeypatch.setattr(memory, "available", lambda _: whole - 1)
    monkeypatch.setattr(base_.AutoModelForCausalLM, "from_pretrained", None)  # is not even called
    with pytest.raises(UserError, match=r"takes .* GB of memory on cpu, and .* GB are free"):
        PeftTrainer(qwen3)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (LoraSpec(65, 4, 0), "rank must be from 1 to 64 on this server, not 65"),
        (LoraSpec(2, 4, 0, train_attn=False, train_mlp=False, train_unembed=False), "at least one of"),
        (
            LoraSpec(2, 4, 0, train_attn=False, train_unembed=False),
            "train_mlp.*beside its experts.*train_mlp=False",
        ),
    ],
)
def test_a_geometry_that_the_model_does_not_have_is_refused_and_the_others_go_on(
    spec: LoraSpec, said: str, tmp_path: Path
) -> None:
    trainer = PeftTrainer(
        make_model(
            tmp_path,
            "qwen2_moe",
            num_experts=4,
            moe_intermediate_size=32,
            num_experts_per_tok=2,
            shared_expert_intermediate_size=32,
        )
    )
    trainer.create("run", LoraSpec(2, 4, 0, train_mlp=False))
    with pytest.raises(UserError, match=said):
        trainer.create("bad", spec)
    assert "bad" not in trainer.bank
    assert isinstance(trainer.forward_backward([("run", ask([make_datum(4)]))])[0], ForwardBackwardResult)


def test_an_adapter_that_takes_more_memory_than_there_is_is_refused_and_the_others_go_on(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = PeftTrainer(qwen3)
    trainer.create("run", LoraSpec(2, 4, 0))
    size = trainer.bank["run"].weights.nbytes
    with monkeypatch.context() as short:
        short.setattr(memory, "available", lambda _: 4 * 8 * size - 1)  # sixteen times the rank is more
        with pytest.raises(
            UserError, match=r"rank 32 takes .* GB here with its gradient and moments, and .* are free"
        ):
            trainer.create("large", LoraSpec(32, 4, 0))
    assert "large" not in trainer.bank
    trainer.create("large", LoraSpec(32, 4, 0))
    assert isinstance(trainer.forward_backward([("run", ask([make_datum(4)]))])[0], ForwardBackwardResult)
