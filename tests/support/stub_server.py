"""A server that answers like TuFT's readiness routes, and remembers what it was asked."""

from __future__ import annotations

import json
import ssl
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

Answer = tuple[int, Any]
KEY = "tml-stub"

TOKENIZER = {
    "config.json": json.dumps({"model_type": "qwen3", "vocab_size": 8}),
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
}


class StubServer:
    """Routes by ``METHOD /path`` below ``/api/v1``; each answers (status, JSON value or text: HTML, or where a 302
    leads)."""

    def __init__(self, models: tuple[str, ...] = ("tuft/demo",), key: str = KEY) -> None:
        self.models = list(models)
        self.key = key
        self.version = "9.9"
        self.ready = True
        self.waiting: str | None = None
        self.backend: dict[str, Any] = {"installed": True, "detail": "torch is installed"}
        self.states: dict[str, dict[str, str]] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.scheme = "http"
        self.routes: dict[str, Callable[[dict[str, Any]], Answer]] = {
            "GET /healthz": lambda _: (200, {"status": "ok"}),
            "GET /get_server_capabilities": lambda _: (
                200,
                {"supported_models": [{"model_name": name} for name in self.models]},
            ),
            "GET /tuft/status": lambda _: (200, self.status()),
            "POST /tuft/models": self.add_model,
            "GET /tuft/tokenizer": lambda query: (200, {"model": query["model"], "files": TOKENIZER}),
        }

    def status(self) -> dict[str, Any]:
        models = [{"name": n, "state": "ready", "detail": "", **self.states.get(n, {})} for n in self.models]
        return {
            "version": self.version,
            "ready": self.ready,
            "waiting_for": self.waiting,
            "persistence": "in a file",
            "backend": self.backend,
            "models": models,
            "tenant": "ada",
        }

    def add_model(self, body: dict[str, Any]) -> Answer:
        name = body["model"].rstrip("/").rpartition("/")[2] if body["model"][0] in "/." else body["model"]
        if name not in self.models:
            self.models.append(name)
        return 200, {"name": name}

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nobody answers any more. Safe to call twice."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def address(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def speak_tls(self, directory: Path) -> str:
        """From now on, with a certificate of its own that nobody vouches for; the certificate's file."""
        key, certificate = str(directory / "key.pem"), str(directory / "cert.pem")
        made = [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate,
            "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
        ]  # fmt: skip
        subprocess.run(made, check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.scheme = "https"
        return certificate

    def _handler(stub) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer()

            do_POST = do_GET  # noqa: N815

            def _answer(self) -> None:
                parts = urlsplit(self.path)
                route = f"{self.command} {parts.path.removeprefix('/api/v1')}"
                key = self.headers.get("X-API-Key")
                stub.asked.append((route, key))
                given = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
                given |= {name: values[0] for name, values in parse_qs(parts.query).items()}
                if route not in stub.routes:
                    status, value = 404, {"detail": "no such path"}
                elif route != "GET /healthz" and key != stub.key:
                    status, value = (
                        (403, {"detail": "Invalid API key"}) if key else (401, {"detail": "no key"})
                    )
                else:
                    status, value = stub.routes[route](given)
                text = value if isinstance(value, str) else json.dumps(value)
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", text)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        return Handler
