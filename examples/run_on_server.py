"""A real Jupyter server and real kernels, driven from a script: what a browser does, without the browser.

:class:`Server` starts ``jupyter server`` with a runtime directory of its own and stops it by its process id.
:class:`Kernel` starts a kernel through the server's REST API and runs code over its websocket, as a notebook
would. :func:`run_notebook` runs a notebook's cells one after the other. Nothing here knows about fine-tuning.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import websocket

START_SECONDS = 60.0
STOP_SECONDS = 30.0


@dataclass
class Server:
    """``jupyter server`` in ``root``, with token authentication and XSRF protection, on a free port.

    ``work`` is a directory for its runtime files and its log. ``base_url`` is a path prefix such as
    ``/user/alice/``. ``stop`` ends it gently, ``kill`` as a crash would; ``start`` may be called again after
    either.
    """

    root: Path
    work: Path
    base_url: str = "/"
    env: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    port: int = 0
    token: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    process: subprocess.Popen[bytes] | None = None
    url: str = ""

    def start(self) -> Self:
        runtime = self.work / "runtime"
        runtime.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "jupyter", "server", "--no-browser", "--ServerApp.ip=127.0.0.1"]
        command += [f"--ServerApp.port={self.port}", "--ServerApp.port_retries=0"]
        command += [
            f"--ServerApp.root_dir={self.root}",
            f"--ServerApp.base_url={self.base_url}",
            *self.options,
        ]
        if os.getuid() == 0:
            command.append("--allow-root")
        # The token travels in the environment: arguments can be read by everybody on the machine.
        env = {**os.environ, **self.env, "JUPYTER_RUNTIME_DIR": str(runtime), "JUPYTER_TOKEN": self.token}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait(runtime / f"jpserver-{self.process.pid}.json")
        except BaseException:
            self.stop()
            raise
        return self

    @property
    def log(self) -> Path:
        return self.work / "jupyter.log"

    @property
    def pid(self) -> int:
        assert self.process is not None, "the server is not running"
        return self.process.pid

    def stop(self) -> None:
        """Ask it to end, and its kernels with it; insist if it does not."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """What a crash is: no goodbye."""
        self._end(signal.SIGKILL)

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """One call of the server's own REST API, authenticated by the token; the answer's JSON."""
        request = urllib.request.Request(
            f"{self.url}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"token {self.token}", "Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait(self, info: Path) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Jupyter server did not start:\n{self.log.read_text()[-3000:]}")
            try:
                self.url = json.loads(info.read_text())["url"]
                self.request("GET", "api/status")
            except (OSError, ValueError, urllib.error.URLError):
                time.sleep(0.05)
            else:
                return

    def _end(self, first: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        for number in (first, signal.SIGKILL):
            if process.poll() is None:
                process.send_signal(number)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            return


@dataclass
class Outcome:
    """What a cell did: text on stdout and stderr, displayed values (the last form of each), its error if it
    failed.
    """

    printed: str = ""
    warned: str = ""
    displayed: dict[str, dict[str, str]] = field(default_factory=dict)
    error: str = ""

    @property
    def text(self) -> str:
        """Everything as plain text, in the order in which it first appeared."""
        shown = [data.get("text/plain", "") for data in self.displayed.values()]
        return "\n".join(
            part.rstrip() for part in [*shown, self.printed, self.warned, self.error] if part.strip()
        )


class CellFailed(RuntimeError):
    """A cell raised; the message is what the notebook would show."""


class Kernel:
    """A kernel in a session of the server, as opening ``notebook`` (a path below the root) makes one.

    Two sessions of one path share a kernel, so without a path a new one is made up.
    """

    def __init__(self, server: Server, notebook: str = "", name: str = "python3") -> None:
        self.server = server
        notebook = notebook or f"{uuid.uuid4().hex}.ipynb"
        model = {"path": notebook, "name": notebook, "type": "notebook", "kernel": {"name": name}}
        self.session = server.request("POST", "api/sessions", model)
        self.id = self.session["kernel"]["id"]
        self._client = uuid.uuid4().hex
        address = server.url.replace("http", "ws", 1)
        self._socket = websocket.create_connection(
            f"{address}api/kernels/{self.id}/channels?session_id={self._client}",
            header=[f"Authorization: token {server.token}"],
            timeout=600,
            http_no_proxy=["127.0.0.1"],
        )

    def run(self, code: str, timeout: float = 300.0, live: Callable[[str], None] = lambda _: None) -> Outcome:
        """Run code to its end. ``live`` is told printed text as it comes. CellFailed if it raises."""
        outcome = Outcome()
        for message in self._messages(code, timeout):
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                if content["name"] == "stdout":
                    outcome.printed += content["text"]
                else:
                    outcome.warned += content["text"]
                live(content["text"])
            elif kind in ("display_data", "update_display_data", "execute_result"):
                known = content.get("transient", {}).get("display_id") or f"output {len(outcome.displayed)}"
                outcome.displayed[known] = content["data"]
            elif kind == "error":
                outcome.error = "\n".join(content["traceback"]) or f"{content['ename']}: {content['evalue']}"
        if outcome.error:
            raise CellFailed(outcome.text)
        return outcome

    def value(self, expression: str, timeout: float = 300.0) -> Any:
        """A value of the kernel, if it can be said in JSON."""
        return json.loads(
            self.run(f"import json as _json; print(_json.dumps({expression}))", timeout).printed
        )

    def interrupt(self) -> None:
        """What the stop button does."""
        self.server.request("POST", f"api/kernels/{self.id}/interrupt")

    def close(self) -> None:
        """Close the notebook and shut its kernel down."""
        self._socket.close()
        self.server.request("DELETE", f"api/sessions/{self.session['id']}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _messages(self, code: str, timeout: float) -> Iterator[dict[str, Any]]:
        """Send a cell; yield what belongs to it until the kernel is idle again and has replied."""
        asked = uuid.uuid4().hex
        content = {"code": code, "silent": False, "store_history": True, "stop_on_error": True}
        header = {"msg_id": asked, "session": self._client, "msg_type": "execute_request", "version": "5.3"}
        header |= {"username": "script", "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        message = {
            "header": header,
            "parent_header": {},
            "metadata": {},
            "content": content,
            "channel": "shell",
        }
        self._socket.send(json.dumps(message))
        deadline = time.monotonic() + timeout
        replied = idle = False
        while not (replied and idle):
            self._socket.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                answer = json.loads(self._socket.recv())
            except websocket.WebSocketTimeoutException:
                raise TimeoutError(f"the cell did not end within {timeout:.0f} s:\n{code}") from None
            if answer["parent_header"].get("msg_id") != asked:
                continue
            if answer["msg_type"] == "execute_reply":
                replied = True
            elif answer["msg_type"] == "status":
                idle = answer["content"]["execution_state"] == "idle"
            else:
                yield answer


def cells(notebook: Path) -> list[tuple[str, str]]:
    """A notebook's cells as (type, source)."""
    document = json.loads(notebook.read_text(encoding="utf-8"))
    return [(cell["cell_type"], "".join(cell["source"])) for cell in document["cells"]]


def run_notebook(
    kernel: Kernel, notebook: Path, say: Callable[[str], None] = lambda _: None, timeout: float = 300.0
) -> None:
    """Run the code cells in order; ``say`` is told each heading and what the cells print. CellFailed stops
    it.
    """
    for kind, source in cells(notebook):
        if kind == "markdown":
            for line in source.splitlines():
                if line.startswith("#"):
                    say(f"\n{line}\n")
        else:
            printed: list[str] = []

            def live(text: str, printed: list[str] = printed) -> None:
                printed.append(text)
                say(text)

            outcome = kernel.run(source, timeout, live)
            for data in outcome.displayed.values():
                say(data.get("text/plain", "").rstrip() + "\n")
