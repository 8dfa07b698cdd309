"""OpenAI's requests: what is read, what is read over, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.wire.openai import DEFAULT_COMPLETION_TOKENS, decode_head, decode_request

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> Any:
    return decode_request(json.dumps({"model": "m", "messages": HELLO, **fields}).encode(), chat=True)


def completion(**fields: Any) -> Any:
    return decode_request(json.dumps({"model": "m", "prompt": "p", **fields}).encode(), chat=False)


def test_defaults_are_openais() -> None:
    asked = chat()
    assert (asked.n, asked.temperature, asked.top_p, asked.max_tokens, asked.top) == (1, 1.0, 1.0, None, None)
    assert completion().max_tokens == DEFAULT_COMPLETION_TOKENS


def test_fields_without_influence_are_read_over() -> None:
    asked = chat(
        user="u", metadata={"a": "b"}, store=True, tools=[], tool_choice="auto", logit_bias={}, n=None
    )
    assert asked == chat()
    assert chat(response_format={"type": "text"}, frequency_penalty=0, presence_penalty=0.0) == chat()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"5": 1}),
        ("frequency_penalty", 1),
        ("presence_penalty", -0.5),
        ("best_of", 3),
        ("reasoning_effort", "low"),
        ("never_heard_of", True),
    ],
)
def test_what_would_change_an_answer_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{field}: not offered"):
        chat(**{field: value})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, r"messages\[0\].tool_calls"),
        ({"n": 0}, "`n`"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"stop": [""]}, "empty string"),
        ({"stop": ["a"] * 17}, "at most 16"),
        ({"model": None}, "model"),
    ],
)
def test_a_bad_chat_is_refused_with_its_field(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        chat(**fields)


@pytest.mark.parametrize("prompt", [[], [1, "a"], [[]], [True], {}, None, [[1.5]]])
def test_a_prompt_is_texts_or_token_ids(prompt: Any) -> None:
    with pytest.raises(UserError, match="prompt"):
        completion(prompt=prompt)


def test_prompts_come_in_four_forms() -> None:
    assert [list(completion(prompt=p).prompts) for p in ("a", ["a", "b"], [1, 2], [[1], [2, 3]])] == [
        ["a"], ["a", "b"], [[1, 2]], [[1], [2, 3]],
    ]  # fmt: skip


def test_parts_of_text_are_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": 1}', b'{"model": "\\ud800"}', b"\xff"])
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(UserError, match="request"):
        decode_head(body)
