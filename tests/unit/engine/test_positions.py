"""Positions: whatever a family makes of them, near and far, a sequence gets in any row what it gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.datums import ask, make_datum
from tests.support.tiny_models import make_model
from tuft_jupyter.core.errors import TuftError, UserError
from tuft_jupyter.core.types import LoraSpec
from tuft_jupyter.engine.base import load_base
from tuft_jupyter.engine.decoder import ModuleDecoder
from tuft_jupyter.engine.llama import LlamaDecoder
from tuft_jupyter.engine.trainer import PeftTrainer

ORIGINAL = 64
THETA = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL, **THETA}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {
    **YARN, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)],
}  # fmt: skip


def farthest(directory: Path, lengths: Sequence[int]) -> float:
    """How far any of two tenants' log-probabilities in one row is from transformers' own, sequence by sequence."""
    trainer = PeftTrainer(directory)
    data = [make_datum(length, seed=length) for length in lengths]
    for run in ("a", "b"):
        trainer.create(run, LoraSpec(2, 4, 0, train_mlp=False))
    whole = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    gaps = []
    results = trainer.forward_backward([("a", ask(data[:1])), ("b", ask(data[1:]))])
    for datums, result in zip((data[:1], data[1:]), results, strict=True):
        assert not isinstance(result, TuftError), result
        for datum, ours in zip(datums, result.logprobs, strict=True):
            with torch.no_grad():
                logp_TV = whole(torch.from_numpy(datum.tokens)[None].long()).logits[0].float().log_softmax(-1)
            theirs = logp_TV.gather(1, torch.from_numpy(datum.inputs["target_tokens"])[:, None])[:, 0]
            gaps.append(float((torch.from_numpy(ours) - theirs).norm() / theirs.norm()))
    return max(gaps)


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **THETA}}),
        ("llama", {"rope_parameters": YARN}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("ministral3", {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}, "sliding_window": None}),
        ("smollm3", {"layers": 4}),
        ("olmo", {}),
    ],
)
def test_every_position_is_where_the_model_has_it(family: str, extra: dict[str, Any], tmp_path: Path) -> None:
    assert farthest(make_model(tmp_path, family, **extra), (300, 40, 70)) <= 2e-6


def test_longrope_ends_where_one_long_sequence_would_turn_the_others(tmp_path: Path) -> None:
    """Beyond the original length it takes other frequencies, for the whole row."""
    directory = make_model(tmp_path, "llama", rope_parameters=LONGROPE)
    assert load_base(directory).max_length == ORIGINAL
    assert farthest(directory, (ORIGINAL, 40, 1)) <= 2e-6
    with pytest.raises(UserError, match=f"at most {ORIGINAL}"):
        PeftTrainer(directory).check(ask([make_datum(ORIGINAL + 1)]))


EXPERTS: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_intermediate_size": 32,
}
SLIDING: dict[str, Any] = {
    "use_sliding_window": True,
    "max_window_layers": 2,
    "shared_expert_intermediate_size": 32,
}


@pytest.mark.parametrize(
    ("family", "longest", "extra"),
    [
        ("qwen2_moe", 8, {**SLIDING, "sliding_window": 8}),
        ("qwen2_moe", 512, {**SLIDING, "sliding_window": 8, "use_sliding_window": False}),
        ("phimoe", 8, {"sliding_window": 8}),
        ("phimoe", 512, {}),
        ("mixtral", 512, {"sliding_window": 8}),
    ],
)
def test_a_sequence_ends_with_the_window_of_which_only_the_mask_is_told(
    family: str, longest: int, extra: dict[str, Any], tmp_path: Path
) -> None:
    """Transformers' own layers of these families leave the window to the mask; others tell it to attention too."""
    directory = make_model(tmp_path, family, **EXPERTS, **extra)
    assert load_base(directory).max_length == longest
    assert farthest(directory, (longest, 40 if longest > 40 else 5)) <= 2e-6


@pytest.mark.parametrize(
    ("family", "decoder"),
    [
        ("llama", LlamaDecoder),
        ("ernie4_5", ModuleDecoder),  # neighbouring numbers are turned together
        ("smollm3", ModuleDecoder),  # every fourth layer turns nothing
    ],
)
def test_rounding_hides_no_difference_between_a_model_and_the_decoder_it_gets(
    family: str, decoder: type, tmp_path: Path
) -> None:
    directory = make_model(tmp_path, family, layers=8, hidden=256, spread=0.02, dtype=torch.bfloat16)
    assert type(load_base(directory, dtype=torch.bfloat16).run) is decoder
