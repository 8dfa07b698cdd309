"""Rows packed without padding: no sequence sees another."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    MptConfig,
    PretrainedConfig,
)

from tests.support.tiny_models import make_model
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.engine import packing
from tuft_jupyter.engine.attention import CausalAttention, Scores
from tuft_jupyter.engine.base import BaseModel, load_base
from tuft_jupyter.engine.decoder import Decoder, ModuleDecoder
from tuft_jupyter.engine.llama import LlamaDecoder

CPU = torch.device("cpu")


def random_qkv(n: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(n)
    return tuple(
        torch.randn(1, n, heads, 8, generator=g).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)
    )


def masked_attention(
    lengths: list[int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: Scores
) -> torch.Tensor:
    """Attention over the whole row with an explicit mask."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(len(sequence))
    mask = (sequence[:, None] == sequence[None]) & (at[:, None] >= at[None])
    if how.window is not None:
        mask &= at[:, None] - at[None] < how.window
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
    if how.softcap is not None:
        scores = how.softcap * (scores / how.softcap).tanh()
    weights = scores.masked_fill(~mask, -torch.inf)
    if how.sinks is not None:  # one key more, which brings nothing
        weights = torch.cat([weights, how.sinks.view(1, -1, 1, 1).expand(-1, -1, len(at), -1)], -1)
    return (weights.softmax(-1)[..., : len(at)] @ v.repeat_interleave(2, 1)).transpose(1, 2)


SINKS = torch.tensor([-1.0, 0.0, 2.0, 5.0])


@pytest.mark.parametrize(
    "how",
    [
        Scores(),
        Scores(window=3),
        Scores(softcap=1.5),
        Scores(window=3, sinks=SINKS),
        Scores(None, 140, 0.5, SINKS),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "lengths",
    [[7], [5, 5, 5], [9, 9, 4, 4, 1], [1, 1, 3], [150], [192, 192], [130, 130, 130, 40], [600, 5]],
    ids=str,
)
def test_attention_over_a_row_is_that_of_each_sequence_alone(lengths: list[int], how: Scores) -> None:
    """Forward and backward, short sequences and those long enough to go by blocks."""
    qkv = random_qkv(sum(lengths))
    attention = CausalAttention(packing.boundaries(lengths), CPU)
    found = []
    for output in (attention(0, *qkv, how), masked_attention(lengths, *qkv, how)):
        slope = torch.linspace(-1, 1, output.numel()).view(output.shape)
        found.append((output.detach(), *torch.autograd.grad(output, qkv, slope)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_row_knows_its_boundaries_positions_and_segments() -> None:
    packed = packing.causal([3, 2, 2, 4], ["a", "a", None, "b"], CPU)
    assert packed.cu == (0, 3, 5, 7, 11)
    assert packed.tokens == 11
    assert packed.segments == ((0, 5, "a"), (5, 7, None), (7, 11, "b"))
    assert packing.positions(packed.cu, CPU).tolist() == [[0, 1, 2, 0, 1, 0, 1, 0, 1, 2, 3]]


def test_a_model_called_outside_of_a_row_fails(qwen3: Path) -> None:
    with pytest.raises(RuntimeError, match="outside"):
        load_base(qwen3).hf(input_ids=torch.tensor([[1, 2]]))


@pytest.mark.parametrize("decoder", [ModuleDecoder, LlamaDecoder])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_packed_sequences_get_the_hidden_states_they_get_alone(
    family: str, decoder: type[ModuleDecoder | LlamaDecoder], request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(family)
    assert_packed_equals_alone(directory, decoder(load_base(directory).hf))


def test_a_sliding_window_is_kept(tmp_path: Path) -> None:
    directory = make_model(tmp_path, "mistral", sliding_window=4)
    base = load_base(directory)
    assert isinstance(base.run, ModuleDecoder)
    assert_packed_equals_alone(directory, base.run)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(n_head=4), "family 'bloom' cannot be run over packed rows.*logits differ"),
        (
            FalconConfig(num_attention_heads=4),
            "attention does not go through transformers' attention interface",
        ),
        (MptConfig(n_heads=4), "family 'mpt' cannot be run"),
    ],
    ids=["a bias by position", "attention of its own", "modules that want a mask"],
)
def test_a_family_that_packing_would_change_is_refused(
    tmp_path: Path, config: PretrainedConfig, reason: str
) -> None:
    config.update({"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=reason):
        load_base(tmp_path)


def assert_packed_equals_alone(directory: Path, decoder: Decoder) -> None:
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    sequences = [torch.randint(320, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 4, 4, 17)]
    packed = packing.causal([len(s) for s in sequences], [None] * 4, CPU)
    ids, positions = torch.cat(sequences), packing.positions(packed.cu, CPU)
    with torch.no_grad():
        hidden, _ = decoder(packed, ids, positions, backward=False)
        alone = torch.cat([plain.model(s[None]).last_hidden_state[0] for s in sequences])
    torch.testing.assert_close(hidden, alone, rtol=1e-5, atol=1e-5)


def test_llama_shaped_models_get_the_written_out_decoder(qwen3: Path, qwen2: Path, llama: Path) -> None:
    for directory in (qwen3, qwen2, llama):
        assert isinstance(load_base(directory).run, LlamaDecoder)


def test_the_fingerprint_tells_weights_apart_and_not_dtypes(qwen3: Path, llama: Path, tmp_path: Path) -> None:
    def of(base: BaseModel) -> str:
        return base.fingerprint

    same = of(load_base(qwen3))
    assert of(load_base(qwen3, dtype=torch.bfloat16, name="another name")) == same
    others = {of(load_base(llama)), of(load_base(make_model(tmp_path / "m", seed=1)))}
    assert len(others) == 2
    assert same not in others


def test_micro_batches_hold_every_row_once_within_the_budget() -> None:
    rng = random.Random(4)
    lengths = [rng.randint(1, 40) for _ in range(200)]
    adapters = [rng.choice("abcdef") for _ in lengths]
    batches = packing.micro_batches(lengths, adapters, 64)
    assert sorted(i for rows in batches for i in rows) == list(range(200))
    assert all(sum(lengths[i] for i in rows) <= 64 for rows in batches)
    assert sum(lengths) / len(batches) > 48, "rows of several adapters should share micro-batches"
    for rows in batches:
        segments = packing.segments_of([lengths[i] for i in rows], [adapters[i] for i in rows])
        assert len(segments) == len({adapters[i] for i in rows}), "one segment per adapter"


def test_a_row_over_the_budget_stands_alone() -> None:
    assert packing.micro_batches([100, 10, 10], ["a", "a", "a"], 32) == [[0], [1, 2]]


def test_how_an_adapters_rows_are_grouped_does_not_depend_on_the_others() -> None:
    """Nor does the order in which its gradients add up: the sums are the same to the last bit."""
    mine = [30, 20, 20, 10, 5]
    alone = packing.micro_batches(mine, ["m"] * 5, 64)
    assert len(alone) == 2
    lengths, adapters = [*mine, 7, 50, 64, 3], ["m"] * 5 + ["x", "y", "z", "x"]
    together = packing.micro_batches(lengths, adapters, 64)
    parts = [[i for i in rows if i < 5] for rows in together]
    assert [part for part in parts if part] == alone
