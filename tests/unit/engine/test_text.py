"""Tokens to text and back: what a reader of a stream sees, and that nothing goes on when nobody reads."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.loops import on_a_loop
from tests.support.tiny_models import SPECIAL, make_model
from tuft_jupyter.core.engine import TextTask
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.engine.sampling_worker import SamplingWorker
from tuft_jupyter.engine.text import Reader, StopFinder, TextModel
from tuft_jupyter.engine.text_worker import TextWorker
from tuft_jupyter.engine.torch_sampler import TorchSampler


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_model(tmp_path_factory.mktemp("models") / "tiny", max_length=128)


@pytest.fixture(scope="module")
def model(directory: Path) -> TextModel:
    return TextModel(directory)


@asynccontextmanager
async def worker(directory: Path) -> AsyncIterator[TextWorker]:
    sampling = SamplingWorker(TorchSampler(directory))
    try:
        yield TextWorker(sampling, directory)
    finally:
        sampling.close()


async def answers(worker: TextWorker, chat: bool = False, **asked: Any) -> list[Any]:
    """The chunks of a stream, or the one whole answer; UserError for a refusal."""
    part = await worker.begin(TextTask("r", None, json.dumps({"model": "m", **asked}).encode(), chat))
    chunks = list(part.chunks)
    while not part.ended:
        part = await worker.more("r")
        chunks += part.chunks
    if part.category:
        raise UserError(part.error)
    return [json.loads(chunk) for chunk in chunks]


def test_a_character_is_told_only_when_it_is_whole(model: TextModel) -> None:
    tokens = model.prompt("naïve 🦋!").tolist()
    reader = Reader(model.text, [])
    pieces = [reader.push(token) for token in tokens]
    assert "".join(pieces) == "naïve 🦋!"
    assert "🦋" in pieces
    assert pieces.count("") == 4  # ï has two bytes, the butterfly four


def test_half_a_character_at_the_end_is_not_lost(model: TextModel) -> None:
    tokens = model.prompt("a🦋").tolist()[:-1]
    reader = Reader(model.text, [])
    assert "".join(reader.push(token) for token in tokens) + reader.rest() == model.text(tokens)


def test_text_that_may_begin_a_stop_string_waits() -> None:
    finder = StopFinder(["END", "NDx"])
    assert [finder.push(piece) for piece in ("aE", "N", "x", "END", "more")] == ["a", "", "ENx", "", ""]
    assert finder.found
    assert finder.rest() == ""


def test_what_was_held_back_in_vain_is_told_at_the_end() -> None:
    finder = StopFinder(["END"])
    assert finder.push("the EN") + finder.rest() == "the EN"


def test_a_chat_is_what_the_models_template_makes_of_it(model: TextModel) -> None:
    asked = model.chat([{"role": "user", "content": "hi"}]).tolist()
    assert model._tokenizer.decode(asked) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert SPECIAL.index("<|im_end|>") in model.ends


@on_a_loop
async def test_a_stream_says_what_the_whole_says_token_by_token(directory: Path) -> None:
    asked = {"prompt": "abc", "max_tokens": 24, "seed": 5, "n": 2, "logprobs": 2}
    async with worker(directory) as texts:
        (whole,) = await answers(texts, **asked)
        chunks = await answers(texts, **asked, stream=True, stream_options={"include_usage": True})
    assert chunks[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 48
    for choice in whole["choices"]:
        parts = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == choice["index"]]
        assert len(parts) >= 24
        assert "".join(part["text"] for part in parts) == choice["text"]
        for field in choice["logprobs"]:
            assert [one for part in parts for one in part["logprobs"][field]] == choice["logprobs"][field]
        assert parts[-1]["finish_reason"] == choice["finish_reason"] == "length"


@on_a_loop
async def test_a_stop_string_ends_an_answer_and_is_not_told(directory: Path) -> None:
    asked = {"prompt": "abc", "max_tokens": 30, "temperature": 0}
    async with worker(directory) as texts:
        (free,) = await answers(texts, **asked)
        text = free["choices"][0]["text"]
        (stopped,) = await answers(texts, **asked, stop=text[4:6])
        streamed = await answers(texts, **asked, stop=[text[4:6]], stream=True)
    assert stopped["choices"][0]["text"] == text[: text.index(text[4:6])]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert "".join(c["choices"][0]["text"] for c in streamed) == stopped["choices"][0]["text"]


@on_a_loop
async def test_an_echo_has_the_prompt_and_its_scores(directory: Path) -> None:
    async with worker(directory) as texts:
        (answer,) = await answers(texts, prompt="abc", echo=True, max_tokens=0, logprobs=1)
        (longer,) = await answers(texts, prompt="ab", echo=True, max_tokens=1, temperature=0, logprobs=1)
    (choice,) = answer["choices"]
    scores = choice["logprobs"]
    assert (choice["text"], scores["tokens"], scores["text_offset"]) == ("abc", ["a", "b", "c"], [0, 1, 2])
    assert scores["token_logprobs"][0] is None
    assert answer["usage"]["completion_tokens"] == 0
    # what comes after "ab" is scored the same whether it stands in the prompt or is drawn
    drawn = longer["choices"][0]["logprobs"]["top_logprobs"]
    assert drawn[2] == pytest.approx(scores["top_logprobs"][2], abs=1e-4)


@on_a_loop
async def test_a_cancelled_conversation_draws_no_more(directory: Path) -> None:
    async with worker(directory) as texts:
        body = json.dumps({"model": "m", "prompt": "abc", "max_tokens": 120, "stream": True, "n": 4}).encode()
        part = await texts.begin(TextTask("r", None, body, chat=False))
        assert part.chunks
        assert not part.ended
        texts.cancel("r")
        assert (await texts.more("r")).category == "user"
        async with asyncio.timeout(10):
            while texts._worker.sampler.busy():  # noqa: ASYNC110 - it works in a thread of its own
                await asyncio.sleep(0.001)


@on_a_loop
async def test_a_request_that_is_cancelled_while_it_is_tokenized_never_begins(directory: Path) -> None:
    async with worker(directory) as texts:
        asked = json.dumps({"model": "m", "prompt": "abc", "max_tokens": 120, "stream": True}).encode()
        begun = asyncio.ensure_future(texts.begin(TextTask("r", None, asked, chat=False)))
        await asyncio.sleep(0)  # it is in the tokenizer's thread now
        texts.cancel("r")
        assert (await begun).category == "user"
        assert not texts._open
        assert not texts._preparing
        assert not texts._worker.sampler.busy()


@on_a_loop
async def test_many_readers_get_larger_pieces_and_nothing_is_lost(directory: Path) -> None:
    async with worker(directory) as texts:
        asked = {"model": "m", "prompt": "abc", "max_tokens": 60, "stream": True, "temperature": 0}
        body = json.dumps(asked).encode()

        async def read(name: str) -> str:
            part = await texts.begin(TextTask(name, None, body, chat=False))
            chunks = list(part.chunks)
            while not part.ended:
                part = await texts.more(name)
                chunks += part.chunks
            return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)

        assert len(set(await asyncio.gather(*(read(f"r{i}") for i in range(20))))) == 1


@on_a_loop
async def test_a_refusal_names_the_field(directory: Path) -> None:
    async with worker(directory) as texts:
        for asked, words in [
            ({"prompt": ""}, "prompt is empty"),
            ({"prompt": [99999]}, "outside the vocabulary"),
            ({"prompt": [2**40]}, "int32"),
            ({"prompt": "a", "temperature": -1}, "temperature"),
            ({"prompt": "a" * 200}, "context"),
        ]:
            with pytest.raises(UserError, match=words):
                await answers(texts, **asked)


@on_a_loop
async def test_as_many_texts_are_tokenized_at_once_as_there_are_threads_and_the_loop_goes_on(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S2-59, S2-60: two workers of a processor application, each with a tokenizer of its own, off the event loop."""
    met, there, free = threading.Barrier(2, timeout=60), threading.Event(), threading.Event()
    models, prompt = [], TextModel.prompt

    def slow(model: TextModel, text: str) -> Any:
        models.append(model)
        met.wait()
        there.set()
        assert free.wait(60)
        return prompt(model, text)

    monkeypatch.setattr(TextModel, "prompt", slow)
    sampling = SamplingWorker(TorchSampler(directory))
    try:
        worker = TextWorker(sampling, directory, threads=2)
        body = json.dumps({"model": "m", "prompt": "x", "max_tokens": 1}).encode()
        begun = [asyncio.ensure_future(worker.begin(TextTask(f"r{n}", None, body, False))) for n in range(2)]
        assert await asyncio.to_thread(there.wait, 60)
        assert not any(task.done() for task in begun)
        free.set()
        assert [part.category for part in await asyncio.gather(*begun)] == ["", ""]
    finally:
        sampling.close()
    assert len({id(model) for model in models}) == 2


@pytest.mark.slow
@on_a_loop
async def test_an_answer_that_is_cut_says_that_it_was_stopped(directory: Path) -> None:
    """Bytes that are no text are read as U+FFFD, by the sampler in other pieces than by who reads the whole."""
    async with worker(directory) as texts:
        for seed in range(5):
            asked = {"prompt": "hello", "max_tokens": 40, "seed": seed}
            (whole,) = await answers(texts, **asked)
            text = whole["choices"][0]["text"]
            for stop in {text[n : n + 3] for n, character in enumerate(text) if character == "\ufffd"}:
                (cut,) = await answers(texts, stop=[stop], **asked)
                assert cut["choices"][0]["text"] == text[: text.index(stop)]
                assert cut["choices"][0]["finish_reason"] == "stop"
