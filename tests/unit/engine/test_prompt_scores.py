"""What a sample can tell besides its tokens, from the SDK's request to the SDK's answer, against a plain forward."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tinker import types as sdk
from tinker.proto.response_conv import deserialize_sample_response
from tinker.types._pydantic_types.tensor_data import TensorData

from tests.support.adapters import make_adapter, peft_model, plain_model
from tests.support.loops import on_a_loop
from tests.support.sampling import prompt
from tests.support.tiny_models import make_model
from tuft_jupyter.engine import prompt_scores
from tuft_jupyter.engine.sampling import invert
from tuft_jupyter.engine.sampling_worker import SamplingWorker
from tuft_jupyter.engine.torch_sampler import TorchSampler

PROMPT = prompt(40, seed=7)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_model(tmp_path_factory.mktemp("models") / "tiny", max_length=128)


@pytest.fixture(scope="module")
def worker(directory: Path) -> Iterator[SamplingWorker]:
    worker = SamplingWorker(TorchSampler(directory))
    yield worker
    worker.close()


@torch.no_grad()
def expected(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities [P, V] of what follows each position."""
    logits = model(input_ids=torch.from_numpy(tokens).long()[None]).logits[0]
    return torch.log_softmax(logits.float(), -1).numpy()


def request(tokens: np.ndarray = PROMPT, **fields: Any) -> bytes:
    params = sdk.SamplingParams(max_tokens=fields.pop("max_tokens", 1), **fields.pop("params", {}))
    asked = sdk.SampleRequest(
        prompt=sdk.ModelInput.from_ints(tokens.tolist()), sampling_params=params, **fields
    )
    return asked.model_dump_json(exclude_none=True).encode()


async def sample(worker: SamplingWorker, adapter: Path | None = None, **fields: Any) -> sdk.SampleResponse:
    outcome = await worker.sample("r", None if adapter is None else str(adapter), request(**fields))
    assert not outcome.category, outcome.error
    return deserialize_sample_response(outcome.result)


@on_a_loop
async def test_every_drawn_token_comes_with_the_likeliest_in_its_place(
    worker: SamplingWorker, directory: Path
) -> None:
    answer = await sample(worker, num_samples=3, max_tokens=9, params={"seed": 1}, topk_sample_logprobs=4)
    model = plain_model(directory)
    for sequence in answer.sequences:
        tokens = np.array(sequence.tokens, np.int32)
        whole = np.concatenate([PROMPT, tokens])
        logp = expected(model, whole)[len(PROMPT) - 1 : -1]
        assert sequence.topk_logprobs_np is not None
        assert sequence.topk_logprobs_np.token_ids.tolist() == np.argsort(-logp, 1)[:, :4].tolist()
        np.testing.assert_allclose(sequence.topk_logprobs_np.logprobs, -np.sort(-logp, 1)[:, :4], atol=1e-4)
        np.testing.assert_allclose(sequence.logprobs, logp[np.arange(len(tokens)), tokens], atol=1e-4)


@on_a_loop
async def test_requests_in_one_batch_get_as_many_likeliest_tokens_as_each_asked_for(
    worker: SamplingWorker,
) -> None:
    for k in (0, 1, 7):
        (sequence,) = (await sample(worker, max_tokens=3, topk_sample_logprobs=k)).sequences
        width = 0 if sequence.topk_logprobs_np is None else sequence.topk_logprobs_np.token_ids.shape[1]
        assert width == k


@pytest.mark.parametrize("last", [1, 13, 39])
@on_a_loop
async def test_only_the_last_prompt_tokens_are_scored_where_that_is_asked(
    worker: SamplingWorker, directory: Path, last: int
) -> None:
    fields = {"prompt_logprobs": True, "topk_prompt_logprobs": 2, "prompt_logprobs_last_n": last}
    answer = await sample(worker, **fields)
    logp = expected(plain_model(directory), PROMPT)
    assert answer.prompt_logprobs is not None
    assert answer.topk_prompt_logprobs is not None
    assert answer.prompt_logprobs[:-last] == [None] * (40 - last)
    assert answer.topk_prompt_logprobs[:-last] == [None] * (40 - last)
    own = logp[np.arange(39), PROMPT[1:]]
    np.testing.assert_allclose(answer.prompt_logprobs[-last:], own[-last:], atol=1e-4)
    assert [row[0][0] for row in answer.topk_prompt_logprobs[-last:] if row] == logp[:-1].argmax(1)[
        -last:
    ].tolist()


@pytest.mark.parametrize("sparse", [False, True])
@on_a_loop
async def test_tokens_that_are_named_are_scored_in_the_layout_in_which_they_came(
    worker: SamplingWorker, directory: Path, tmp_path: Path, sparse: bool
) -> None:
    adapter = make_adapter(tmp_path / "a", directory, seed=1)
    ids = torch.full((39, 5), -1, dtype=torch.int64)
    for row, column, token in [(3, 0, 17), (3, 4, 18), (20, 2, 250), (38, 1, 0)]:
        ids[row, column] = token
    asked = TensorData.from_torch_sparse(ids, pad_value=-1) if sparse else TensorData.from_torch(ids)
    assert (asked.sparse_crow_indices is not None) == sparse
    answer = await sample(worker, adapter, target_prompt_logprobs=asked)
    found = answer.target_prompt_logprobs
    assert found is not None
    assert (found.sparse_crow_indices is not None) == sparse
    logp = expected(peft_model(directory, adapter), PROMPT)
    wanted = np.where(ids.numpy() < 0, 0, logp[np.arange(39)[:, None], ids.numpy().clip(0)])
    np.testing.assert_allclose(found.to_numpy(), wanted, atol=1e-4)


@on_a_loop
async def test_alternatives_follow_the_models_distribution_at_the_requests_temperature(
    worker: SamplingWorker, directory: Path
) -> None:
    """A chi-square of 200 draws in each of 39 places against the model's own probabilities, sixteen tokens to a bin."""
    fields = {"prompt_alt_tokens_k": 200, "params": {"temperature": 0.7, "seed": 11, "top_k": 1}}
    answer = await sample(worker, **fields)
    again = await sample(worker, **fields)
    assert answer.prompt_alt_tokens is not None
    assert again.prompt_alt_tokens is not None
    tokens = np.array(answer.prompt_alt_tokens.tokens.to_numpy())
    assert tokens.shape == (39, 200)
    assert (tokens == again.prompt_alt_tokens.tokens.to_numpy()).all()
    logp = expected(plain_model(directory), PROMPT)[:-1]
    np.testing.assert_allclose(
        answer.prompt_alt_tokens.logprobs.to_numpy(), np.take_along_axis(logp, tokens, 1), atol=1e-4
    )
    heated = np.exp(logp / 0.7)
    heated /= heated.sum(1, keepdims=True)
    bins = np.arange(heated.shape[1]) // 16
    mass = np.stack([heated[:, bins == b].sum(1) for b in range(bins.max() + 1)], 1)
    seen = np.stack([(bins[tokens] == b).sum(1) for b in range(bins.max() + 1)], 1)
    chi = float((((seen - 200 * mass) ** 2) / (200 * mass + 1e-9))[200 * mass > 5].sum())
    degrees = int((200 * mass > 5).sum())
    assert abs(chi - degrees) < 6 * np.sqrt(2 * degrees)


@on_a_loop
async def test_however_many_alternatives_are_asked_for_a_bounded_number_is_drawn_at_once(
    worker: SamplingWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand at each of 512 positions took more than a gigabyte; which are drawn does not depend on it."""
    drawn: list[int] = []

    def counted(masses_NV: torch.Tensor, uniforms_NK: torch.Tensor) -> torch.Tensor:
        drawn.append(uniforms_NK.numel())
        return invert(masses_NV, uniforms_NK)

    monkeypatch.setattr(prompt_scores, "invert", counted)
    fields: dict[str, Any] = {"prompt_alt_tokens_k": 1024, "params": {"temperature": 0.7, "seed": 11}}
    answers = [await sample(worker, **fields)]
    assert max(drawn) <= prompt_scores._DRAWN_AT_ONCE
    monkeypatch.setattr(prompt_scores, "_DRAWN_AT_ONCE", 1 << 30)
    answers.append(await sample(worker, **fields))
    tokens = [answer.prompt_alt_tokens.tokens.tolist() for answer in answers if answer.prompt_alt_tokens]
    assert tokens[0] == tokens[1]


@on_a_loop
async def test_greedy_alternatives_are_the_likeliest(worker: SamplingWorker, directory: Path) -> None:
    answer = await sample(worker, prompt_alt_tokens_k=2, params={"temperature": 0.0})
    assert answer.prompt_alt_tokens is not None
    best = expected(plain_model(directory), PROMPT)[:-1].argmax(1)
    assert answer.prompt_alt_tokens.tokens.tolist() == [[int(t), int(t)] for t in best]


def target(ids: Any, **more: Any) -> dict[str, Any]:
    array = np.array(ids, np.int64)
    fields = {"data": array.flatten().tolist(), "dtype": "int64", "shape": list(array.shape)}
    return {"target_prompt_logprobs": {**fields, **more}}


ROWS = [[1]] * 39


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt_logprobs_last_n": 3}, "set prompt_logprobs too"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 0}, "between 1 and 39"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 40}, "between 1 and 39"),
        ({"topk_sample_logprobs": -1}, "topk_sample_logprobs must be between"),
        ({"topk_sample_logprobs": 10**6}, "topk_sample_logprobs must be between"),
        ({"prompt_alt_tokens_k": -3}, "prompt_alt_tokens_k must be between"),
        (target([[1]]), "must have 39 rows"),
        (target([[-1]] * 39), "names no token id"),
        (target([[99999]] * 39), "outside the vocabulary"),
        (target([[-2]] * 39), "outside the vocabulary"),
        (target(ROWS, shape=[39]), r"shape \[prompt - 1, K\]"),
        (target(ROWS, shape=[39, 2]), "asks for 78 ids"),
        (target(ROWS, shape=[39, 0]), r"shape \[prompt - 1, K\]"),
        (target(ROWS, dtype="float32"), "int64 tensor"),
        (
            target([[1]], shape=[39, 1], sparse_crow_indices=[0, 1], sparse_col_indices=[0]),
            "crow_indices must be 40",
        ),
        (target([2**62], shape=[39, 2**31 + 5]), "asks for"),
    ],
)
@on_a_loop
async def test_what_does_not_fit_the_prompt_is_refused_by_name(
    worker: SamplingWorker, fields: dict[str, Any], words: str
) -> None:
    """H4: widths and shapes are checked before anything of their size is allocated."""
    asked = {**json.loads(request()), **fields}
    outcome = await worker.sample("r", None, json.dumps(asked).encode())
    assert outcome.category == "user"
    assert re.search(words, outcome.error), outcome.error
