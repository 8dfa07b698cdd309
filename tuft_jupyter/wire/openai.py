"""OpenAI's completions and chat completions on the wire: JSON requests in, JSON answers and stream chunks out.

Fields that we do not act on are read over where they cannot change an answer, and refused by name where they would.
It knows no tokenizer: what a prompt is in tokens, and a token in text, is the engine's to say.

Source: the OpenAI API reference, "Completions" and "Chat Completions".
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import msgspec

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.wire.messages import Message

MAX_CHOICES = 1024
MAX_TOP = 20
MAX_STOPS = 16
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for completions; a chat goes on as far as the context does."""

_Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]

_IGNORED = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "parallel_tool_calls stream_options".split()
)
"""Fields without influence on what is drawn."""

_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "best_of": (1,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}
"""Values that ask for what is done anyway; for any other field these are null, false, 0 and what is empty."""


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Request(Message, kw_only=True):
    model: str
    n: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHOICES)] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class Completion(_Request, kw_only=True):
    prompt: str | list[Any]
    max_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOP)] | None = None
    echo: bool | None = None


class ChatCompletion(_Request, kw_only=True):
    messages: list[dict[str, Any]]
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOP)] | None = None


class Head(msgspec.Struct):
    """What is needed to find the weights, without a look at the rest."""

    model: str
    stream: bool | None = None


@dataclass(frozen=True, slots=True)
class TextRequest:
    """A request of either kind: ``prompts`` are texts or token ids, a chat has ``messages`` in their place.

    ``max_tokens`` None is as far as the context goes; ``top`` is how many alternatives come with each token,
    None without logprobs.
    """

    model: str
    prompts: Sequence[str | Sequence[int]] = ()
    messages: Sequence[Mapping[str, str]] = ()
    chat: bool = False
    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top: int | None = None
    echo: bool = False
    stream: bool = False
    include_usage: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token as text, with its log-probability (None: nothing predicts it) and the likeliest in its place."""

    text: str
    logprob: float | None
    top: Sequence[tuple[str, float]] = ()


@dataclass(slots=True)
class Choice:
    """One answer as it grows."""

    index: int
    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


def decode_head(body: bytes) -> Head:
    """Which model is asked, and whether for a stream; UserError if that much cannot be read."""
    try:
        return msgspec.json.decode(body, type=Head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(_plain(error)) from None


def decode_request(body: bytes, *, chat: bool) -> TextRequest:
    """Read a request; UserError names the field that is missing, wrong, or not offered."""
    try:
        given = msgspec.json.decode(body, type=dict[str, Any])
        kind: type[ChatCompletion | Completion] = ChatCompletion if chat else Completion
        asked = msgspec.convert(given, kind)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(_plain(error)) from None
    _refuse_what_is_not_offered(given, asked.__struct_fields__)
    shared = TextRequest(
        model=asked.model,
        n=asked.n or 1,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_k=asked.top_k or -1,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=None if asked.seed is None else asked.seed % 2**64,
        stop=_stops(asked.stop),
        stream=bool(asked.stream),
        include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
    )
    if isinstance(asked, ChatCompletion):
        return replace(
            shared,
            chat=True,
            messages=_messages(asked.messages),
            max_tokens=asked.max_completion_tokens or asked.max_tokens,
            top=(asked.top_logprobs or 0) if asked.logprobs else None,
        )
    return _completion(asked, shared)


def _completion(asked: Completion, shared: TextRequest) -> TextRequest:
    prompts = _prompts(asked.prompt)
    if len(prompts) * shared.n > MAX_CHOICES:
        raise UserError(
            f"prompt: {len(prompts)} prompts with n={shared.n} are over {MAX_CHOICES} choices; ask for fewer at once"
        )
    if asked.max_tokens == 0 and not asked.echo:
        raise UserError("max_tokens: 0 asks for nothing, unless echo is true; set one of them")
    if asked.echo and asked.logprobs is not None and shared.stream:
        raise UserError(
            "echo: the log-probabilities of a prompt are not streamed; leave out stream or logprobs"
        )
    return replace(
        shared,
        prompts=prompts,
        max_tokens=DEFAULT_COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens,
        top=asked.logprobs,
        echo=bool(asked.echo),
    )


def _refuse_what_is_not_offered(given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name, value in given.items():
        if name in known or name in _IGNORED:
            continue
        off = value is None or value is False or value in _NEUTRAL.get(name, (0, "", [], {}))
        if not off or value is True:
            offered = ", ".join(sorted(known))
            raise UserError(f"{name}: not offered by this server; leave it out (it reads {offered})")


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise UserError("stop: an empty string would stop at once; leave it out")
    if len(stops) > MAX_STOPS:
        raise UserError(f"stop: {len(stops)} strings, at most {MAX_STOPS} are looked for; leave some out")
    return stops


def _prompts(prompt: str | list[Any]) -> list[str | Sequence[int]]:
    """One text, some texts, one list of token ids, or some of those."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(type(item) is int for item in prompt):
        return [prompt]
    for item in prompt:
        ids = isinstance(item, list) and item and all(type(token) is int for token in item)
        if not (isinstance(item, str) or ids):
            raise UserError("prompt: give a text, a list of texts, a list of token ids, or a list of those")
    if not prompt:
        raise UserError("prompt: the list is empty; give at least one prompt")
    return prompt


def _messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    if not messages:
        raise UserError("messages: the list is empty; give at least one message")
    read = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message.get("role"), str):
            raise UserError(f"{where}.role: a text such as 'user' is missing")
        for name, value in message.items():
            if value and name != "content" and not isinstance(value, str):
                raise UserError(f"{where}.{name}: not offered by this server; only text is read")
        extras = {name: value for name, value in message.items() if isinstance(value, str)}
        read.append({**extras, "content": _content(message.get("content"), where)})
    return read


def _content(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(f"{where}.content: a part of type {kind!r}; this server's models read text only")
    return "".join(part["text"] for part in parts)


def _plain(error: Exception) -> str:
    if not isinstance(error, msgspec.ValidationError):
        return f"the request body is not JSON: {error}"
    return f"the request: {error}".replace("`$.", "`").replace("`$`", "the whole body")


class Answer:
    """Writes the chunks, or the whole answer, of one request."""

    def __init__(self, request: TextRequest, request_id: str) -> None:
        self._request = request
        kind = ("chatcmpl", "chat.completion") if request.chat else ("cmpl", "text_completion")
        if request.chat and request.stream:
            kind = (kind[0], "chat.completion.chunk")
        self._head = {
            "id": f"{kind[0]}-{request_id}",
            "object": kind[1],
            "created": int(time.time()),
            "model": request.model,
        }
        if request.stream and request.include_usage:
            self._head["usage"] = None
        self._opened: set[int] = set()
        self._offsets: dict[int, int] = {}

    def chunk(self, news: Choice) -> bytes:
        """What came to a choice since its last chunk."""
        shown: dict[str, Any] = {"index": news.index, "finish_reason": news.finish_reason}
        if self._request.chat:
            role = {} if news.index in self._opened else {"role": "assistant"}
            shown["delta"] = {**role, "content": news.text}
        else:
            shown["text"] = news.text
        shown["logprobs"] = self._logprobs(news)
        self._opened.add(news.index)
        return msgspec.json.encode({**self._head, "choices": [shown]})

    def last(self, usage: Mapping[str, int]) -> list[bytes]:
        """What ends a stream."""
        if not self._request.include_usage:
            return []
        return [msgspec.json.encode({**self._head, "choices": [], "usage": usage})]

    def whole(self, choices: Sequence[Choice], usage: Mapping[str, int]) -> bytes:
        shown = []
        for choice in choices:
            one: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason}
            if self._request.chat:
                one["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            else:
                one["text"] = choice.text
            shown.append({**one, "logprobs": self._logprobs(choice)})
        return msgspec.json.encode({**self._head, "choices": shown, "usage": usage})

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if self._request.top is None:
            return None
        if self._request.chat:
            return {
                "content": [
                    _entry(token.text, token.logprob, top_logprobs=[_entry(*one) for one in token.top])
                    for token in choice.tokens
                ],
                "refusal": None,
            }
        offsets = []
        for token in choice.tokens:
            offsets.append(self._offsets.get(choice.index, 0))
            self._offsets[choice.index] = offsets[-1] + len(token.text)
        top = [dict(token.top) if token.logprob is not None else None for token in choice.tokens]
        return {
            "tokens": [token.text for token in choice.tokens],
            "token_logprobs": [token.logprob for token in choice.tokens],
            "top_logprobs": top if self._request.top else None,
            "text_offset": offsets,
        }


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _entry(text: str, logprob: float | None, **more: Any) -> dict[str, Any]:
    """A part of a character (shown as U+FFFD) has no bytes of its own to tell."""
    return {
        "token": text,
        "logprob": logprob,
        "bytes": None if "\ufffd" in text else [*text.encode()],
        **more,
    }
