"""Sampling on a vLLM server elsewhere (``vllm serve``), over its OpenAI-compatible API.

Prompts go as token ids, and answers become what ``engine/vllm_values`` makes of vLLM's own. Adapters go by name: every
saved version is loaded under one that nothing else ever has, from the directory where it lies, which the server must
see under the same path; ``max_loras`` are held at once, and what leaves is unloaded. A server that was started anew,
and so knows none of them, is told them again.

Promises: nothing of a request is drawn twice; a request that is cancelled draws no more (its connection is closed, and
vLLM gives it up).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuft_jupyter.config.backends import BackendsConfig
from tuft_jupyter.core.engine import EngineDied, Outcome, Part, TextTask
from tuft_jupyter.core.errors import ServerError, TuftError, UserError
from tuft_jupyter.core.quotas import check_input
from tuft_jupyter.core.types import SAMPLED, ModelCard, SampleRequest, SampleResult
from tuft_jupyter.engine import vllm_values
from tuft_jupyter.engine.remote import vllm_answers
from tuft_jupyter.engine.remote.http import Kind, Reply, Server, Unreachable, lines
from tuft_jupyter.engine.sample_job import DIVERGED, Limits
from tuft_jupyter.engine.vllm_adapters import NO_ADAPTERS, Named, NamedAdapters
from tuft_jupyter.wire.openai import TextRequest, decode_request
from tuft_jupyter.wire.sample_codec import decode_sample_request, encode_sample_response

KIND = Kind(
    "vLLM server",
    ("/health", "/health/"),
    "If not, start it, with VLLM_ALLOW_RUNTIME_LORA_UPDATING=true: vllm serve your-model --enable-lora . If it runs "
    "elsewhere, set VLLM_BASE_URL",
)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MOST_SAMPLES = 1024
BUSY = (408, 429)
"""What a gateway before it answers, too: nothing is wrong with the request."""
NOT_TAKEN = (
    "log-probabilities of named tokens, and alternatives, in a prompt's places are not known to a vLLM server; set "
    "backends.sampling to torch"
)
NO_SCORES = (
    "log-probabilities of a prompt: vLLM computes them wrongly while adapters on the unembedding are loaded "
    "(vllm#51594); train with train_unembed=False, or set backends.sampling to torch"
)


class VllmServer:
    """Implements ``core.engine.SamplingEngine``. ``instance`` tells our adapters there from those of others."""

    def __init__(self, card: ModelCard, server: Server, backends: BackendsConfig, instance: str) -> None:
        self.card = card
        self.on_progress: Callable[[str], None] = lambda _: None
        self._server, self._backends, self._instance = server, backends, instance
        self._model = ""
        self._limits = Limits(card.vocab_size, card.max_context_length, MOST_SAMPLES)
        self._adapters: NamedAdapters | None = None
        self._on_unembedding: set[str] = set()
        self._leaving: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Find the server and the model on it. UserError says why that cannot be."""
        self.on_progress(f"asking the vLLM server at {self._server.url}")
        if not await self._server.found():
            raise UserError(self._server.detail)
        models = await self._models()
        self._model, length = self._served(models)
        context = min(self.card.max_context_length, length or self.card.max_context_length)
        self._limits = replace(self._limits, context=context)
        for left in models:
            if left["id"].startswith(
                f"tuft-{self._instance}-"
            ):  # from before, and nobody asks for it any more
                await self._ask("/v1/unload_lora_adapter", {"lora_name": left["id"]})
        self._adapters = self._none_loaded()

    async def sample(self, request_id: str, adapter: str | None, body: bytes, *, tenant: str = "") -> Outcome:
        """Sample from the base model or from the adapter in a directory. EngineDied if the server went away."""
        began = time.perf_counter()
        try:
            decoded = await self._server.work(self._decoded, body)
            request = replace(decoded, salt=tenant)
            result = await self._sampled(adapter, request)
            encoded = await self._server.work(encode_sample_response, result)
        except TuftError as error:
            return Outcome(request_id, category=error.category, error=error.message)
        facts = {
            "engine_ms": round((time.perf_counter() - began) * 1e3, 3),
            "prompt_tokens": len(request.prompt),
            "tokens": sum(len(sequence.tokens) for sequence in result.sequences),
        }
        return Outcome(request_id, result=encoded, content_type=SAMPLED, facts=facts)

    async def complete(self, task: TextTask) -> AsyncGenerator[Part, None]:
        """The answer in parts, as vLLM draws them. Closing the iterator stops the drawing."""
        try:
            asked = await self._server.work(lambda: decode_request(task.body, chat=task.chat))
            path = CHAT if task.chat else COMPLETIONS
            await self._check_length(task, asked)
            async with self._named(task.adapter) as model:
                body = vllm_answers.text_request(task.body, asked, model, _salt(task.tenant))
                if not asked.stream:
                    reply = await self._answer(path, body)
                    whole, facts = vllm_answers.text_answer(reply.body, asked)
                    yield Part([whole], ended=True, facts=facts)
                    return
                async for part in self._streamed(path, body, asked):
                    yield part
        except TuftError as error:
            yield Part(ended=True, category=error.category, error=error.message)

    async def cancel(self, request_id: str) -> None:
        """Nothing to do: whoever asked is cancelled too, and with it the connection."""

    async def waits_for(self, request_id: str) -> str:
        return ""  # vLLM does not say

    async def stop(self) -> None:
        if self._adapters is not None:
            for named in self._adapters.held():
                self._unload(named)
        await asyncio.gather(*self._leaving, return_exceptions=True)

    def release(self, directories: Collection[Path]) -> None:
        """The run whose weights lie there is over: unload what of them is held and not in use."""
        if self._adapters is not None:
            self._adapters.release(directories)

    # ---- one request

    def _decoded(self, body: bytes) -> SampleRequest:
        request = decode_sample_request(body)
        self._limits.check(request)
        if request.targets is not None or request.prompt_alt_tokens_k:
            raise UserError(NOT_TAKEN)
        return request

    async def _sampled(self, adapter: str | None, request: SampleRequest) -> SampleResult:
        async with self._named(adapter) as model:
            if (request.prompt_logprobs or request.topk_prompt_logprobs) and self._on_unembedding:
                raise UserError(NO_SCORES)
            asked = vllm_values.asked(request, self._limits.longest(request))
            body = vllm_answers.request_body(model, asked, request, _salt(request.salt))
            reply = await self._answer(COMPLETIONS, body)
            return await self._server.work(vllm_answers.result, reply.body, request)

    async def _streamed(self, path: str, body: Any, asked: TextRequest) -> AsyncGenerator[Part, None]:
        facts: dict[str, int] = {}
        try:
            async with self._server.stream(path, body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise self._refused(Reply(response))
                async for line in lines(response):
                    chunk, counted = vllm_answers.event(line, asked)
                    facts |= counted
                    if chunk is not None:
                        yield Part([chunk])
        except Unreachable as error:
            raise EngineDied(str(error)) from None
        yield Part(ended=True, facts=facts)

    async def _check_length(self, task: TextTask, asked: TextRequest) -> None:
        """Only the server has the tokenizer: where the number of tokens is limited, it counts them first."""
        if not task.input_tokens:
            return
        ids = [prompt for prompt in asked.prompts if not isinstance(prompt, str)]
        texts: list[dict[str, Any]] = [{"prompt": p} for p in asked.prompts if isinstance(p, str)]
        if task.chat:
            texts = [{"messages": list(asked.messages)}]
        count = sum(len(prompt) for prompt in ids)
        for text in texts:
            reply = await self._answer("/tokenize", {"model": self._model, **text})
            count += reply.json()["count"]
        check_input(count, task.input_tokens)

    async def _answer(self, path: str, body: Any) -> Reply:
        reply = await self._ask(path, body)
        if not reply.ok:
            raise self._refused(reply)
        return reply

    async def _ask(self, path: str, body: Any) -> Reply:
        try:
            return await self._server.ask("POST", path, body)
        except Unreachable as error:
            raise EngineDied(str(error)) from None

    def _refused(self, reply: Reply) -> Exception:
        """What a refusal is to whoever asked."""
        text = reply.error()
        if reply.status == 404 and "does not exist" in text:  # its adapters are gone: it was started anew
            return EngineDied(f"the vLLM server at {self._server.url} does not know its adapters any more")
        if reply.status in (502, 503, 504) or "EngineDead" in text:
            return EngineDied(self._server.unreachable(f"HTTP {reply.status}: {text}"))
        if "JSON compliant" in text:  # numbers that JSON cannot say
            return UserError(DIVERGED)
        return self._key_refused(reply) or (
            UserError(f"the vLLM server refuses the request: {text}")
            if 400 <= reply.status < 500 and reply.status not in BUSY
            else ServerError(f"sampling failed on the vLLM server at {self._server.url}: {text}")
        )

    def _key_refused(self, reply: Reply) -> UserError | None:
        if reply.status not in (401, 403):
            return None
        return UserError(
            f"the vLLM server at {self._server.url} refuses our key: set VLLM_API_KEY as its --api-key says"
        )

    # ---- models and adapters

    async def _models(self) -> list[dict[str, Any]]:
        try:
            reply = await self._server.ask("GET", "/v1/models", seconds=10.0)
        except Unreachable as error:
            raise UserError(str(error)) from None
        if reply.status == 404:
            raise UserError(
                f"the server at {self._server.url} is well and has no /v1/models: it is not vLLM's OpenAI server. "
                "trl's takes no adapters; start: vllm serve your-model --enable-lora"
            )
        listed = reply.json()
        if not reply.ok or not isinstance(listed, dict):
            raise self._key_refused(reply) or ServerError(
                f"the vLLM server at {self._server.url} does not list its models: {reply.error()}"
            )
        return [each for each in listed.get("data", []) if isinstance(each.get("id"), str)]

    def _served(self, models: list[dict[str, Any]]) -> tuple[str, int]:
        """(what the server calls our base model, its context length or 0)."""
        bases = [each for each in models if not each.get("parent")]
        ours = {self.card.name, self.card.path}
        for each in bases:
            if {each["id"], each.get("root")} & ours:
                return each["id"], int(each.get("max_model_len") or 0)
        raise UserError(
            f"the vLLM server at {self._server.url} serves {', '.join(each['id'] for each in bases) or 'nothing'}, not "
            f"{self.card.name}: start it with --served-model-name {self.card.name}"
        )

    @asynccontextmanager
    async def _named(self, adapter: str | None) -> AsyncIterator[str]:
        """What the server knows the base model, or the adapter in a directory, by; it stays loaded in the block."""
        if self._adapters is None:
            raise EngineDied(f"the vLLM server at {self._server.url} was not asked yet")
        if adapter is None:
            yield self._model
            return
        if not self._backends.enable_lora:
            raise UserError(NO_ADAPTERS)
        async with self._adapters.using(Path(adapter)) as named:
            yield self._name(named)

    def _none_loaded(self) -> NamedAdapters:
        self._generation = secrets.token_hex(4)
        self._on_unembedding.clear()
        return NamedAdapters(self._backends.max_loras, self._load, self._unload)

    def _name(self, named: Named) -> str:
        return f"tuft-{self._instance}-{self._generation}-{named.number}"

    async def _load(self, named: Named) -> None:
        path = str(named.directory.absolute())
        reply = await self._ask("/v1/load_lora_adapter", {"lora_name": self._name(named), "lora_path": path})
        if reply.ok:
            if await self._server.work(_is_on_unembedding, named.directory):
                self._on_unembedding.add(self._name(named))
            return
        text = reply.error()
        if reply.status in (404, 405) and text in ("Not Found", "Method Not Allowed"):
            raise UserError(
                f"the vLLM server at {self._server.url} takes no adapters: start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=true"
            )
        if reply.status == 404:
            raise UserError(
                f"the vLLM server at {self._server.url} does not see {path}: it must share this server's file system, "
                f"under the same path ({text})"
            )
        raise self._key_refused(reply) or UserError(f"checkpoint: vLLM cannot use these weights: {text}")

    def _unload(self, named: Named) -> None:
        name = self._name(named)
        self._on_unembedding.discard(name)
        leaving = asyncio.get_running_loop().create_task(self._unloaded(name))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    async def _unloaded(self, name: str) -> None:
        with contextlib.suppress(EngineDied):  # then it holds nothing any more
            await self._ask("/v1/unload_lora_adapter", {"lora_name": name})


def _salt(tenant: str) -> str:
    """What tenants do not share their cached prompts by, without telling their names."""
    return hashlib.sha256(tenant.encode()).hexdigest() if tenant else ""


def _is_on_unembedding(directory: Path) -> bool:
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    return "lm_head" in (config.get("target_modules") or ())
