"""The torch sampler against transformers and PEFT, on tiny fp32 models."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.adapters import make_adapter, peft_model, plain_model
from tests.support.tiny_models import SPECIAL, make_model, make_tokenizer
from tuft_jupyter.core.errors import NotFound, TuftError, UserError
from tuft_jupyter.core.types import SampleRequest, SampleResult, SamplingParams, StopReason
from tuft_jupyter.engine.torch_sampler import TorchSampler

EOS = SPECIAL.index("<|im_end|>")
VOCAB = 320


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "qwen", max_length=96)


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(home / "a", model, seed=1),
        make_adapter(home / "b", model, seed=2, rank=2),
        make_adapter(home / "c", model, seed=3, modules=("q_proj", "v_proj")),
    ]


@pytest.fixture
def sampler(model: Path) -> TorchSampler:
    return TorchSampler(model)


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 259, length).astype(np.int32)


def ask(tokens: np.ndarray, n: int = 1, **params: Any) -> SampleRequest:
    fields = {
        name: params.pop(name) for name in ("prompt_logprobs", "topk_prompt_logprobs") if name in params
    }
    params = {"max_tokens": 12, "stop_tokens": (), **params}
    return SampleRequest(tokens, n, SamplingParams(**params), **fields)


def drain(sampler: TorchSampler) -> dict[str, SampleResult | TuftError]:
    answers: dict[str, SampleResult | TuftError] = {}
    while sampler.busy():
        answers.update(sampler.step())
    return answers


def run(sampler: TorchSampler, jobs: Iterable[tuple[Path | None, SampleRequest]]) -> list[Any]:
    """The answers to requests that are all there at once."""
    count = 0
    for adapter, request in jobs:
        sampler.submit(str(count), adapter, request)
        count += 1
    answers = drain(sampler)
    return [answers[str(i)] for i in range(count)]


def tokens_of(result: SampleResult) -> list[list[int]]:
    return [sequence.tokens.tolist() for sequence in result.sequences]


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


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_greedy_tokens_equal_those_of_generate(family: str, tmp_path: Path) -> None:
    """S2-51: the torch sampler samples the base model on a CPU, token for token as transformers does."""
    directory = make_model(tmp_path / "m", family, seed=4)
    prompts = [prompt(length, seed=length) for length in (1, 5, 23, 5)]
    oracle = plain_model(directory)
    oracle.generation_config.eos_token_id = None  # random weights may say so at once
    answers = run(TorchSampler(directory), [(None, ask(p, temperature=0.0, max_tokens=30)) for p in prompts])
    for tokens, answer in zip(prompts, answers, strict=True):
        assert tokens_of(answer) == [generate(oracle, tokens, 30)]


def test_greedy_tokens_of_adapters_equal_those_of_peft(
    sampler: TorchSampler, model: Path, adapters: list[Path]
) -> None:
    """S1-42: an adapter from a plain PEFT directory is sampled as PEFT would, in one batch with others."""
    jobs = [(adapter, prompt(6 + i, seed=i)) for i, adapter in enumerate([*adapters, None, adapters[0]])]
    answers = run(sampler, [(adapter, ask(p, temperature=0.0, max_tokens=20)) for adapter, p in jobs])
    for (adapter, tokens), answer in zip(jobs, answers, strict=True):
        oracle = plain_model(model) if adapter is None else peft_model(model, adapter)
        oracle.generation_config.eos_token_id = None
        assert tokens_of(answer) == [generate(oracle, tokens, 20)]


def test_an_adapter_on_the_unembedding_is_sampled_too(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "m", tied=False)
    adapter = make_adapter(tmp_path / "a", directory, seed=5, modules=("o_proj", "lm_head"))
    oracle = peft_model(directory, adapter)
    oracle.generation_config.eos_token_id = None
    tokens = prompt(9)
    (answer,) = run(TorchSampler(directory), [(adapter, ask(tokens, temperature=0.0))])
    assert tokens_of(answer) == [generate(oracle, tokens, 12)]


def test_a_mixed_batch_gives_each_request_what_it_gets_alone(model: Path, adapters: list[Path]) -> None:
    jobs = [
        (adapter, ask(prompt(4 + 3 * i, seed=i), 2, seed=i, temperature=0.8, max_tokens=10 + i))
        for i, adapter in enumerate([*adapters, None, *adapters])
    ]
    together = run(TorchSampler(model), jobs)
    alone = TorchSampler(model)
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
    sampler: TorchSampler, model: Path, adapters: list[Path], params: dict[str, Any]
) -> None:
    tokens = prompt(11)
    (answer,) = run(sampler, [(adapters[0], ask(tokens, 3, seed=1, **params))])
    oracle = peft_model(model, adapters[0])
    for sequence in answer.sequences:
        whole = np.concatenate([tokens, sequence.tokens])
        expected = logprobs_of(oracle, whole)[len(tokens) - 1 : -1]
        np.testing.assert_allclose(
            sequence.logprobs, expected[np.arange(len(expected)), sequence.tokens], atol=1e-5
        )


def test_prompt_logprobs_are_those_of_a_plain_forward(
    sampler: TorchSampler, model: Path, adapters: list[Path]
) -> None:
    tokens = prompt(17)
    request = ask(tokens, 2, max_tokens=1, prompt_logprobs=True, topk_prompt_logprobs=3)
    (answer,) = run(sampler, [(adapters[1], request)])
    expected = logprobs_of(peft_model(model, adapters[1]), tokens)[:-1]

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


def test_a_seed_gives_the_same_samples_in_any_company(model: Path, adapters: list[Path]) -> None:
    request = ask(prompt(8), 3, seed=2**64 - 1, max_tokens=20)
    (alone,) = run(TorchSampler(model), [(adapters[0], request)])
    crowd = [(adapter, ask(prompt(5 + i, seed=i), 2, max_tokens=7 + i)) for i, adapter in enumerate(adapters)]
    in_company = run(TorchSampler(model, max_live=5), [*crowd, (adapters[0], request), *crowd])[3]
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
    (answer,) = run(sampler, [(None, ask(prompt(90), max_tokens=50))])
    assert [len(s.tokens) for s in answer.sequences] == [6]
    assert answer.sequences[0].stop_reason is StopReason.LENGTH


# ---- many requests


def test_places_are_refilled_as_sequences_end(model: Path) -> None:
    jobs = [(None, ask(prompt(3 + i, seed=i), 1 + i % 3, seed=i, max_tokens=2 + 3 * i)) for i in range(7)]
    narrow = TorchSampler(model, max_live=3)
    for i, (adapter, request) in enumerate(jobs):
        narrow.submit(str(i), adapter, request)
    answers: dict[str, Any] = {}
    steps = 0
    while narrow.busy():
        answers.update(narrow.step())
        steps += 1
        assert len(narrow._live) <= 3
    wide = run(TorchSampler(model), jobs)
    assert [tokens_of(answers[str(i)]) for i in range(7)] == [tokens_of(answer) for answer in wide]
    drawn = sum(len(s.tokens) for answer in wide for s in answer.sequences)
    assert steps < 0.6 * drawn, "sequences are decoded together"


def test_a_small_request_does_not_wait_for_a_large_one_in_the_queue(model: Path) -> None:
    sampler = TorchSampler(model, max_live=4)
    sampler.submit("large", None, ask(prompt(4), 40, max_tokens=4))
    sampler.submit("small", None, ask(prompt(4), 1, max_tokens=4))
    order = []
    while sampler.busy():
        order += [key for key, _ in sampler.step()]
    assert order == ["small", "large"]


def test_a_prompt_is_run_once_for_all_its_samples(sampler: TorchSampler, adapters: list[Path]) -> None:
    rows: list[int] = []
    hook = sampler.base.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    request = ask(prompt(20), 6, max_tokens=3)
    answers = run(sampler, [(adapters[0], request), (adapters[0], request), (adapters[1], request)])
    hook.remove()
    assert rows == [40, 18, 18]
    assert all(len(answer.sequences) == 6 for answer in answers)


def test_prompts_are_run_in_portions(model: Path) -> None:
    sampler = TorchSampler(model, prefill_tokens=32)
    rows: list[int] = []
    sampler.base.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    answers = run(sampler, [(None, ask(prompt(20 + i, seed=i), max_tokens=2)) for i in range(3)])
    assert [len(answer.sequences) for answer in answers] == [1, 1, 1]
    assert rows == [20, 1, 21, 1, 22, 1]


def test_cancelling_frees_the_place(model: Path, adapters: list[Path]) -> None:
    sampler = TorchSampler(model, max_live=1, max_adapters=1)
    sampler.submit("long", adapters[0], ask(prompt(4), max_tokens=80))
    sampler.submit("queued", adapters[0], ask(prompt(4), max_tokens=80))
    sampler.submit("next", adapters[1], ask(prompt(4), seed=1, max_tokens=3))
    sampler.step()
    sampler.cancel("long")
    sampler.cancel("queued")
    sampler.cancel("never heard of")
    answers = drain(sampler)
    assert list(answers) == ["next"]
    (expected,) = run(TorchSampler(model), [(adapters[1], ask(prompt(4), seed=1, max_tokens=3))])
    assert tokens_of(answers["next"]) == tokens_of(expected)


def test_requests_may_be_submitted_while_others_decode(sampler: TorchSampler, adapters: list[Path]) -> None:
    def send(name: str) -> None:
        for i in range(10):
            sampler.submit(f"{name}{i}", adapters[i % 3], ask(prompt(4, seed=i), seed=i, max_tokens=5))

    threads = [threading.Thread(target=send, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    answers: dict[str, Any] = {}
    while sampler.busy() or any(thread.is_alive() for thread in threads):
        answers.update(sampler.step())
    assert len(answers) == 30
    for i in range(10):
        assert tokens_of(answers[f"a{i}"]) == tokens_of(answers[f"b{i}"]) == tokens_of(answers[f"c{i}"])


# ---- adapters


def test_more_adapters_than_are_held_are_served_in_turn(model: Path, adapters: list[Path]) -> None:
    few = TorchSampler(model, max_adapters=1)
    jobs = [(adapter, ask(prompt(5), seed=1)) for adapter in [*adapters, *adapters]]
    expected = run(TorchSampler(model), jobs)
    assert [tokens_of(a) for a in run(few, jobs)] == [tokens_of(a) for a in expected]


def test_an_adapter_is_loaded_once(
    model: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuft_jupyter.engine import checkpoint

    loads: list[Path] = []
    read = checkpoint.read

    def counted(source: Path, *args: Any, **kwargs: Any) -> Any:
        loads.append(source)
        return read(source, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "read", counted)
    sampler = TorchSampler(model, max_adapters=2)
    job = ask(prompt(4), max_tokens=2)
    a, b, c = adapters
    for adapter in (a, b, a, c, a, b):
        run(sampler, [(adapter, job), (adapter, job)])
    assert loads == [a, b, c, b]


def test_a_directory_saved_again_is_read_again(model: Path, adapters: list[Path], tmp_path: Path) -> None:
    sampler = TorchSampler(model)
    place = tmp_path / "latest"
    answers = []
    for source in adapters[:2]:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)
        answers += run(sampler, [(place, ask(prompt(5), temperature=0.0))])
    assert [tokens_of(a) for a in answers] == [
        tokens_of(a) for a in run(sampler, [(d, ask(prompt(5), temperature=0.0)) for d in adapters[:2]])
    ]


# ---- what cannot be served


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ask(np.array([], np.int32)), "prompt is empty"),
        (ask(np.array([3, VOCAB], np.int32)), "prompt token 320 at position 1"),
        (ask(np.array([-1], np.int32)), "prompt token -1 at position 0"),
        (ask(prompt(96)), "prompt has 96 tokens.*context of 96"),
        (ask(prompt(3), 0), "num_samples"),
        (ask(prompt(3), 100_000), "num_samples"),
        (ask(prompt(3), max_tokens=0), "max_tokens"),
        (ask(prompt(3), topk_prompt_logprobs=VOCAB + 1), "topk_prompt_logprobs"),
    ],
)
def test_a_bad_request_fails_in_its_own_place(
    sampler: TorchSampler, request_: SampleRequest, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        sampler.check(request_)
    bad, good = run(sampler, [(None, request_), (None, ask(prompt(3), max_tokens=2))])
    assert isinstance(bad, UserError)
    assert [len(s.tokens) for s in good.sequences] == [2]


def test_an_adapter_that_is_missing_or_does_not_fit_fails_in_its_own_place(
    sampler: TorchSampler, adapters: list[Path], tmp_path: Path
) -> None:
    wider = make_model(tmp_path / "wider", hidden=128)
    foreign = make_adapter(tmp_path / "foreign", wider, seed=0)
    torn = tmp_path / "torn"
    shutil.copytree(adapters[0], torn)
    file = torn / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    request = ask(prompt(5), temperature=0.0)
    places = [adapters[0], tmp_path / "gone", foreign, torn, adapters[0]]
    good, gone, misfit, cut, again = run(sampler, [(place, request) for place in places])
    assert isinstance(gone, NotFound)
    assert isinstance(misfit, UserError)
    assert isinstance(cut, UserError)
    assert tokens_of(good) == tokens_of(again)


def test_stop_strings_need_a_tokenizer(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "m")
    for file in directory.glob("token*"):
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer; give token ids"):
        TorchSampler(directory).check(ask(prompt(3), stop_tokens=None, stop_strings=("x",)))
