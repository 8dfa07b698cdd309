"""A server with the part of vLLM's OpenAI-compatible API that samplers elsewhere use, and a log of what it was asked.

Real HTTP, no model: sample i of a prompt repeats ``(last token + i + adapters loaded so far) % vocabulary``; the
base model adds nothing. Log-probabilities are -0.5 for what was drawn. Fields and refusals are those of vLLM 0.32.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

VOCAB = 64


class StubVllm:
    """``with StubVllm() as server:``; ``asked`` lists (path, body). It can be ended and begun again on its port."""

    def __init__(
        self, model: str = "tuft/demo", *, port: int = 0, key: str = "", runtime_loras: bool = True
    ) -> None:
        self.model, self.key, self.runtime_loras = model, key, runtime_loras
        self.port = port
        self.openai = True
        self._open: list[socket.socket] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.adapters: dict[str, int] = {}
        self.loaded = 0
        self.breaks = 0
        """answers to completions that are cut off"""
        self.busy = 0
        """completions that are refused for now"""
        self.text = "x"
        """of each token that is drawn"""
        self.hold: threading.Event | None = None
        self.gone = threading.Event()
        """a client went away while it was held"""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for asked, body in self.asked if asked == path]

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self) -> None:
        self.adapters.clear()
        stub = self

        class Http(ThreadingHTTPServer):
            def get_request(self) -> tuple[socket.socket, Any]:
                connection, address = super().get_request()
                stub._open.append(connection)  # here, so that the end of serving has seen them all
                return connection, address

        self._http = Http(("127.0.0.1", self.port), self._handler())
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def end(self) -> None:
        """As a process that is killed: open connections break, and nobody listens."""
        self._http.shutdown()
        self._http.server_close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path in ("/health", "/health/"):
            return (200 if self.openai or path == "/health/" else 404), {}
        if not self.openai:
            return 404, {"detail": "Not Found"}
        if path == "/v1/models":
            return 200, {
                "data": [self._card(self.model, None), *(self._card(n, self.model) for n in self.adapters)]
            }
        if path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") and self.runtime_loras:
            return self._load(body) if path == "/v1/load_lora_adapter" else self._unload(body)
        if path == "/tokenize":
            return 200, {"count": len(str(body.get("prompt") or body.get("messages")))}
        if self.busy and path.endswith("completions"):
            self.busy -= 1
            return 429, error(429, "Too many requests", "RateLimitError")
        if path in ("/v1/completions", "/v1/chat/completions"):
            if body["model"] not in {self.model, *self.adapters}:
                return 404, error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
            return 200, (self._completion(body) if path == "/v1/completions" else self._chat(body))
        return 404, {"detail": "Not Found"}

    def disturbs(self, connection: socket.socket) -> bool:
        """Whether an answer is not given, because the stub was told to break, or to wait until the client leaves."""
        if self.hold is not None:
            self.hold.wait()
            connection.settimeout(5)
            if connection.recv(1) == b"":
                self.gone.set()
            return True
        if self.breaks:
            self.breaks -= 1
            connection.shutdown(socket.SHUT_RDWR)
            return True
        return False

    def _card(self, name: str, parent: str | None) -> dict[str, Any]:
        length = 128 if parent is None else None
        return {"id": name, "object": "model", "root": name, "parent": parent, "max_model_len": length}

    def _load(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters:
            return 400, error(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        if not path.is_dir():
            return 404, error(
                404, f"Loading lora {name} failed: No adapter found for {path}", "NotFoundError"
            )
        if (path / "broken").exists():
            return 500, error(500, "LoRA rank 128 is greater than max_lora_rank 64.", "InternalServerError")
        self.loaded += 1
        self.adapters[name] = self.loaded
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.adapters.pop(body["lora_name"], None) is None:
            return 404, error(
                404, f"The lora adapter '{body['lora_name']}' cannot be found.", "NotFoundError"
            )
        return 200, "Success"

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        prompt = [len(prompt)] if isinstance(prompt, str) else prompt
        shift, length, k = (
            self.adapters.get(body["model"], 0),
            body.get("max_tokens", 16),
            body.get("logprobs"),
        )
        choices = []
        for index in range(body.get("n", 1)):
            token = (prompt[-1] + index + shift) % VOCAB
            choice: dict[str, Any] = {"index": index, "text": self.text * length, "finish_reason": "length"}
            if k is not None:
                name = f"token_id:{token}"
                top = {name: -0.5} | {f"token_id:{(token + j) % VOCAB}": -0.5 - j for j in range(1, k)}
                choice["logprobs"] = {
                    "tokens": [name] * length, "token_logprobs": [-0.5] * length, "top_logprobs": [top] * length
                }  # fmt: skip
            if body.get("return_token_ids"):
                choice |= {"token_ids": [token] * length, "prompt_token_ids": prompt}
            if body.get("prompt_logprobs") is not None:
                scored = [{str(t): {"logprob": -0.25, "rank": 1, "decoded_token": "x"}} for t in prompt[1:]]
                choice["prompt_logprobs"] = [None, *scored]
            choices.append(choice)
        drawn = length * len(choices)
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": drawn,
            "total_tokens": len(prompt) + drawn,
        }
        return {
            "id": "cmpl-1",
            "object": "text_completion",
            "model": body["model"],
            "choices": choices,
            "usage": usage,
        }

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}
        return {
            "id": "chat-1",
            "object": "chat.completion",
            "model": body["model"],
            "choices": [choice],
            "usage": usage,
        }

    def _handler(stub) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - "self" is the handler below
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._reply({})

            def do_POST(self) -> None:
                self._reply(json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}"))

            def _reply(self, body: dict[str, Any]) -> None:
                stub.asked.append((self.path, body))
                if self.path.endswith("completions") and stub.disturbs(self.connection):
                    return
                known = stub.key in ("", (self.headers.get("Authorization") or "").removeprefix("Bearer "))
                known = known or not self.path.startswith("/v1")
                status, value = stub.answer(self.path, body) if known else (401, {"error": "Unauthorized"})
                if status == 200 and body.get("stream"):
                    self._events(value, body)
                    return
                self._send(status, "application/json", json.dumps(value).encode())

            def _events(self, value: dict[str, Any], body: dict[str, Any]) -> None:
                lines = [
                    {**value, "choices": [{**c, "text": c["text"][:1]}], "usage": None}
                    for c in value["choices"]
                ]
                if (body.get("stream_options") or {}).get("include_usage"):
                    lines.append({**value, "choices": []})
                told = [json.dumps(line, ensure_ascii=False) for line in lines]  # as vLLM writes it
                text = "".join(f"data: {line}\n\n" for line in [*told, "[DONE]"])
                self._send(200, "text/event-stream", text.encode())

            def _send(self, status: int, content_type: str, text: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def error(status: int, message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "code": status}}
