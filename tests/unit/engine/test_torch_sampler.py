"""The torch sampler against transformers and PEFT, on tiny fp32 models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.adapters import make_adapter, peft_model, plain_model
from tests.support.sampling import ask, prompt, run, tokens_of
from tests.support.tiny_models import SCALED, SPECIAL, make_model, make_tokenizer
from tuft_jupyter.core.types import StopReason
from tuft_jupyter.engine.torch_sampler import TorchSampler

EOS = SPECIAL.index("<|im_end|>")


def generate(model: Any, tokens: np.ndarray, count: int) -> list[int]:
    """Greedy decoding by transformers."""
    ids = torch.from_numpy(tokens).long()[None]
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(tokens) :].tolist()


@torch.no_grad()
def logprobs_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities [T, V] of what follows each position, by a plain forward."""
    logits = model(input_ids=torch.from_numpy(tokens).long()[None]).logits[0]
    return torch.log_softmax(logits.float(), -1).numpy()


# ---- the right tokens


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt_oss", *SCALED])
def test_greedy_tokens_equal_those_of_generate(family: str, tmp_path: Path) -> None:
    """S2-51: the torch sampler samples the base model on a CPU, token for token as transformers does."""
    more: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "gpt_oss" else {}
    directory = make_model(tmp_path / "m", family, seed=4, **SCALED.get(family, more))
    prompts = [prompt(length, seed=length) for length in (1, 5, 23, 5)]
    oracle = plain_model(directory)
    oracle.generation_config.eos_token_id = None  # random weights may say so at once
    answers = run(TorchSampler(directory), [(None, ask(p, temperature=0.0, max_tokens=30)) for p in prompts])
    for tokens, answer in zip(prompts, answers, strict=True):
        assert tokens_of(answer) == [generate(oracle, tokens, 30)]
        (sequence,) = answer.sequences
        said = logprobs_of(oracle, np.concatenate([tokens, sequence.tokens]))[len(tokens) - 1 : -1]
        np.testing.assert_allclose(sequence.logprobs, said[np.arange(30), sequence.tokens], atol=1e-5)


def test_a_sliding_window_is_kept_to(tmp_path: Path) -> None:
    """A family that is run through its own modules, one layer of which sees eight tokens."""
    directory = make_model(tmp_path / "m", seed=4)
    file = directory / "config.json"
    config = json.loads(file.read_text()) | {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    file.write_text(json.dumps(config))
    prompts = [prompt(length, seed=length) for length in (3, 30)]
    oracle = plain_model(directory)
    oracle.generation_config.eos_token_id = None
    answers = run(TorchSampler(directory), [(None, ask(p, temperature=0.0, max_tokens=30)) for p in prompts])
    for tokens, answer in zip(prompts, answers, strict=True):
        assert tokens_of(answer) == [generate(oracle, tokens, 30)]


def test_greedy_tokens_of_adapters_equal_those_of_peft(
    sampler: TorchSampler, sampled: Path, adapters: list[Path]
) -> None:
    """S1-42: an adapter from a plain PEFT directory is sampled as PEFT would, in one batch with others."""
    jobs = [(adapter, prompt(6 + i, seed=i)) for i, adapter in enumerate([*adapters, None, adapters[0]])]
    answers = run(sampler, [(adapter, ask(p, temperature=0.0, max_tokens=20)) for adapter, p in jobs])
    for (adapter, tokens), answer in zip(jobs, answers, strict=True):
        oracle = plain_model(sampled) if adapter is None else peft_model(sampled, adapter)
        oracle.generation_config.eos_token_id = None
        assert tokens_of(answer) == [generate(oracle, tokens, 20)]


def test_an_adapter_on_the_unembedding_is_sampled_too(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "m", tied=False)
    adapter = make_adapter(tmp_path / "a", directory, seed=5, modules=("o_proj", "lm_head"))
    oracle = peft_model(directory, adapter)
    oracle.generation_config.eos_token_id = None
    tokens = prompt(9)
    request = ask(tokens, temperature=0.0, prompt_logprobs=True)
    (answer,) = run(TorchSampler(directory), [(adapter, request)])
    assert tokens_of(answer) == [generate(oracle, tokens, 12)]
    scored = logprobs_of(oracle, tokens)[np.arange(8), tokens[1:]]
    np.testing.assert_allclose(answer.prompt_logprobs[1:], scored, atol=1e-5)


def test_a_mixed_batch_gives_each_request_what_it_gets_alone(sampled: Path, adapters: list[Path]) -> None:
    jobs = [
        (adapter, ask(prompt(4 + 3 * i, seed=i), 2, seed=i, temperature=0.8, max_tokens=10 + i))
        for i, adapter in enumerate([*adapters, None, *adapters])
    ]
    together = run(TorchSampler(sampled), jobs)
    alone = TorchSampler(sampled)
    for job, answer in zip(jobs, together, strict=True):
        (expected,) = run(alone, [job])
        assert tokens_of(answer) == tokens_of(expected)
        for ours, theirs in zip(answer.sequences, expected.sequences, strict=True):
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)


def test_sampled_sequences_have_tokens_logprobs_and_a_stop_reason(sampler: TorchSampler) -> None:
    """S1-43, S1-44: at most max_tokens ids, one logprob each, and why it ended."""
    (answer,) = run(sampler, [(None, ask(prompt(4), temperature=0.5, max_tokens=5, stop_tokens=None))])
    (sequence,) = answer.sequences
    assert 1 <= len(sequence.tokens) <= 5
    assert sequence.tokens.dtype == np.int32
    assert all(isinstance(token, int) for token in sequence.tokens.tolist())
    assert sequence.logprobs.shape == sequence.tokens.shape
    assert sequence.stop_reason in (StopReason.STOP, StopReason.LENGTH)


# ---- the right logprobs


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"temperature": 0.6, "top_k": 7, "top_p": 0.9}])
def test_logprobs_are_those_of_a_plain_forward_at_temperature_one(
    sampler: TorchSampler, sampled: Path, adapters: list[Path], params: dict[str, Any]
) -> None:
    tokens = prompt(11)
    (answer,) = run(sampler, [(adapters[0], ask(tokens, 3, seed=1, **params))])
    oracle = peft_model(sampled, adapters[0])
    for sequence in answer.sequences:
        whole = np.concatenate([tokens, sequence.tokens])
        expected = logprobs_of(oracle, whole)[len(tokens) - 1 : -1]
        np.testing.assert_allclose(
            sequence.logprobs, expected[np.arange(len(expected)), sequence.tokens], atol=1e-5
        )


def test_prompt_logprobs_are_those_of_a_plain_forward(
    sampler: TorchSampler, sampled: Path, adapters: list[Path]
) -> None:
    tokens = prompt(17)
    request = ask(tokens, 2, max_tokens=1, prompt_logprobs=True, topk_prompt_logprobs=3)
    (answer,) = run(sampler, [(adapters[1], request)])
    expected = logprobs_of(peft_model(sampled, adapters[1]), tokens)[:-1]

    assert np.isnan(answer.prompt_logprobs[0])
    np.testing.assert_allclose(answer.prompt_logprobs[1:], expected[np.arange(16), tokens[1:]], atol=1e-5)
    assert answer.topk_prompt_ids.shape == answer.topk_prompt_logprobs.shape == (17, 3)
    assert answer.topk_prompt_ids[0].tolist() == [0, 0, 0]
    assert answer.topk_prompt_logprobs[0].tolist() == [-99999.0] * 3
    order = np.argsort(-expected, axis=1)[:, :3]
    np.testing.assert_array_equal(answer.topk_prompt_ids[1:], order)
    np.testing.assert_allclose(
        answer.topk_prompt_logprobs[1:], np.take_along_axis(expected, order, 1), atol=1e-5
    )


def test_prompt_logprobs_are_left_out_unless_asked_for(sampler: TorchSampler) -> None:
    (answer,) = run(sampler, [(None, ask(prompt(4)))])
    assert answer.prompt_logprobs is None
    assert answer.topk_prompt_ids is None
    assert answer.topk_prompt_logprobs is None


def test_a_long_prompt_is_scored_in_pieces_without_a_seam(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "m", max_length=2048)
    tokens = prompt(1100)
    (answer,) = run(TorchSampler(directory), [(None, ask(tokens, max_tokens=1, prompt_logprobs=True))])
    expected = logprobs_of(plain_model(directory), tokens)[np.arange(1099), tokens[1:]]
    np.testing.assert_allclose(answer.prompt_logprobs[1:], expected, atol=2e-5)


# ---- seeds


def test_a_seed_gives_the_same_samples_in_any_company(sampled: Path, adapters: list[Path]) -> None:
    request = ask(prompt(8), 3, seed=2**64 - 1, max_tokens=20)
    (alone,) = run(TorchSampler(sampled), [(adapters[0], request)])
    crowd = [(adapter, ask(prompt(5 + i, seed=i), 2, max_tokens=7 + i)) for i, adapter in enumerate(adapters)]
    in_company = run(TorchSampler(sampled, max_live=5), [*crowd, (adapters[0], request), *crowd])[3]
    assert tokens_of(in_company) == tokens_of(alone)


def test_samples_of_one_request_differ_and_do_not_depend_on_how_many_there_are(sampler: TorchSampler) -> None:
    five, two, other = run(sampler, [(None, ask(prompt(8), n, seed=s)) for n, s in ((5, 7), (2, 7), (2, 8))])
    assert len({tuple(tokens) for tokens in tokens_of(five)}) == 5
    assert tokens_of(five)[:2] == tokens_of(two)
    assert tokens_of(other) != tokens_of(two)


def test_without_a_seed_two_requests_differ(sampler: TorchSampler) -> None:
    first, second = run(sampler, [(None, ask(prompt(8))), (None, ask(prompt(8)))])
    assert tokens_of(first) != tokens_of(second)


# ---- where a sequence ends


def test_a_sequence_ends_with_its_stop_token(sampler: TorchSampler) -> None:
    (free,) = run(sampler, [(None, ask(prompt(6), temperature=0.0, max_tokens=20))])
    tokens = tokens_of(free)[0]
    stop = tokens[5]
    (stopped,) = run(sampler, [(None, ask(prompt(6), temperature=0.0, max_tokens=20, stop_tokens=(stop, 1)))])
    assert tokens_of(stopped) == [tokens[: tokens.index(stop) + 1]]
    assert stopped.sequences[0].stop_reason is StopReason.STOP
    assert free.sequences[0].stop_reason is StopReason.LENGTH


def test_the_models_own_end_of_sequence_stops_unless_told_never(sampler: TorchSampler) -> None:
    own, never = (
        ask(prompt(6), 64, seed=3, max_tokens=80, temperature=3.0, stop_tokens=s) for s in (None, ())
    )
    stopped, free = run(sampler, [(None, own), (None, never)])
    assert any(s.stop_reason is StopReason.STOP for s in stopped.sequences)
    for short, long in zip(stopped.sequences, free.sequences, strict=True):
        assert long.stop_reason is StopReason.LENGTH
        assert len(long.tokens) == 80
        expected = long.tokens.tolist()
        if EOS in expected:
            expected = expected[: expected.index(EOS) + 1]
        assert short.tokens.tolist() == expected


def test_a_stop_string_may_span_tokens_and_stays_in_the_result(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    sampler = TorchSampler(make_model(tmp_path / "m", vocab=len(tokenizer)))
    (free,) = run(sampler, [(None, ask(prompt(6), 8, seed=5, max_tokens=30))])
    texts = [[tokenizer.decode(token) for token in tokens] for tokens in tokens_of(free)]
    sample, at = next(
        (i, j) for i, text in enumerate(texts) for j in range(4, 29) if "".join(text[j : j + 2]).isalnum()
    )
    stop = "".join(texts[sample][at : at + 2])
    request = ask(prompt(6), 8, seed=5, max_tokens=30, stop_tokens=None, stop_strings=("absent", stop))
    stopped = run(sampler, [(None, request)])[0].sequences[sample]
    expected = tokens_of(free)[sample]
    while stop in tokenizer.decode(expected[:-1]):
        expected.pop()
    assert stopped.tokens.tolist() == expected
    assert stopped.stop_reason is StopReason.STOP


def test_sampling_ends_where_the_context_ends(sampler: TorchSampler) -> None:
    """S2-52: without max_tokens; with it, the last token that fits is the last that may be asked for."""
    for longest in (None, 6):
        (answer,) = run(sampler, [(None, ask(prompt(90), max_tokens=longest))])
        assert [len(s.tokens) for s in answer.sequences] == [6]
        assert answer.sequences[0].stop_reason is StopReason.LENGTH
