"""A JupyterLab page whose fine-tuning service is played by the test: any state, any record, at any moment.

The notebook server is real; only what the panel asks of ``tuft/lab`` is answered here, so that what takes hours to
train (twenty runs of ten thousand steps) can be looked at and measured in seconds.
"""

from __future__ import annotations

import json
import math
import random
import time
from typing import Any
from urllib.parse import unquote

from playwright.sync_api import Page, Route, WebSocketRoute

MODEL = "tuft/demo"
NAMES = ("pirate-sft", "dpo beta 0.1", "grpo maths", "lr sweep 3e-4", "distil-student")
KL_RUN = 2


LOG = [
    {"n": i + 1, "time": 1790000000.0 + 7 * i, "level": level, "text": text}
    for i, (level, text) in enumerate(
        [
            ("info", "tuft-jupyter keeps its journal in the file journal.sqlite"),
            ("info", "tuft/demo: the training worker is ready after 4.1 s"),
            ("warning", "tuft/demo: the sampling worker went away; another one is started"),
        ]
    )
]


def status(**changes: Any) -> dict[str, Any]:
    return {
        "version": "0.1.0",
        "tenant": "alice",
        "admin": True,
        "ready": True,
        "waiting_for": None,
        "problem": None,
        "persistence": "file journal.sqlite: survives a crash of the server, the notebook and the machine",
        "durability": "machine",
        "backend": {"installed": True, "detail": ""},
        "models": [{"name": MODEL, "state": "ready", "detail": ""}],
        **changes,
    }


def curve(steps: int, seed: int, began: float) -> dict[str, list[float | None]]:
    """A loss that falls, gradients that calm down, a learning rate that warms up and decays."""
    luck = random.Random(seed)
    high, low, pace = luck.uniform(2.5, 5), luck.uniform(0.3, 1.2), luck.uniform(3, 9) / steps
    columns: dict[str, list[float | None]] = {
        name: [] for name in ("step", "time", "loss", "tokens", "grad_norm", "learning_rate", "kl")
    }
    now = began
    for i in range(steps):
        now += luck.uniform(0.3, 0.5)
        decayed = math.exp(-pace * i)
        columns["step"].append(i + 1)
        columns["time"].append(now)
        columns["loss"].append(max(0.02, low + (high - low) * decayed + luck.gauss(0, 0.02 + 0.12 * decayed)))
        columns["tokens"].append(luck.randint(600, 1400))
        columns["grad_norm"].append(0.2 + 3 * decayed * luck.uniform(0.6, 1.4))
        columns["kl"].append(abs(luck.gauss(0.02, 0.01)) * (1 - decayed) if seed == KL_RUN else None)
        columns["learning_rate"].append(1e-3 * min(1, (i + 1) / (0.1 * steps)) * (1 - 0.9 * i / steps))
    return columns


def run(index: int, session: str, steps: int, name: str | None = None) -> dict[str, Any]:
    now = time.time()
    columns = curve(steps, index, now - 0.4 * steps - 30)
    return {
        "id": f"{session}:train:{index}",
        "session": session,
        "tenant": "alice",
        "base_model": MODEL,
        "rank": 8 * (1 + index % 4),
        "created": now - 0.4 * steps - 40,
        "status": "ready",
        "error": None,
        "last_error": None,
        "step": steps,
        "tokens": sum(value or 0 for value in columns["tokens"]),
        "engine_ms": 310.0 * steps,
        "pending": 2 if index == 0 else 0,
        "last_request": now if index == 0 else now - 60,
        "loss_sum": 0.0,
        "weight_sum": 0.0,
        "kl_sum": 0.0,
        "kl_tokens": 0,
        "step_tokens": 0,
        "passes": 0,
        "curve": columns,
    }


def state(runs: int = 3, steps: int = 400) -> dict[str, Any]:
    """A snapshot with so many runs, each in a session of its own, and a few checkpoints."""
    now = time.time()
    sessions = [
        {
            "id": f"6f1c2a52-0000-4000-8000-{i:012d}",
            "tenant": "alice",
            "created": now - 3600 + i,
            "display_name": NAMES[i] if i < len(NAMES) else f"sweep {i}",
            "sdk_version": "0.38.0",
            "finished": None,
        }
        for i in range(runs)
    ]
    made = [run(i, session["id"], steps) for i, session in enumerate(sessions)]
    checkpoints = [
        {
            "path": f"tinker://{one['id']}/{kind}/{name}",
            "run": one["id"],
            "tenant": "alice",
            "kind": kind,
            "name": name,
            "created": now - 300 * (i + 1),
            "size_bytes": 4_200_000 * (1 + i),
            "expires": now + 86400 if name == "draft" else None,
            "public": name == "final",
            "step": steps - 100 * i,
        }
        for i, (one, kind, name) in enumerate(
            [
                (made[0], "weights", "final"),
                (made[0], "sampler_weights", "draft"),
                *([(made[1], "sampler_weights", "best")] if runs > 1 else []),
            ]
        )
    ]
    return {
        "n": 100_000_000,
        "sessions": sessions,
        "runs": made,
        "samplers": [],
        "checkpoints": checkpoints,
    }


def gauges() -> dict[str, Any]:
    return {
        "type": "gauges",
        "time": time.time(),
        "cpu": 61.0,
        "memory": {"used": 5.1e9, "total": 25e9},
        "loop_lag_ms": 0.8,
        "workers": [
            {"name": "notebook server", "pid": 1, "cpu": 4.0, "memory": 190e6},
            {"name": f"training {MODEL}", "pid": 2, "cpu": 96.0, "memory": 540e6},
        ],
        "gpus": [],
    }


SERVER_KEY = {
    "id": "ffffffffffff",
    "tenant": "alice",
    "name": "",
    "admin": True,
    "source": "server",
    "created": None,
    "expires": None,
    "revoked": False,
}


def said(step: int) -> dict[str, Any]:
    """What the weights of a step said: one prompt, three answers."""
    answers = [
        {"tokens": [1, 2], "text": text, "stop_reason": reason}
        for text, reason in (
            ("Arr, the treasure be under the old oak!", "stop"),
            ("Ye'll find it where the gulls sleep, matey", "length"),
            ("Under the X, ye landlubber!", "stop"),
        )
    ]
    prompt = {"tokens": [3, 4], "text": "Where is the treasure?"}
    one = {"time": time.time(), "temperature": 0.7, "prompt": prompt, "sequences": 3, "answers": answers}
    return {"run": "", "step": step - step % 10, "steps": [], "samples": [one], "keeping": True}


def below(url: str, prefix: str) -> str:
    """The path after a prefix; JupyterLab adds a query against caches."""
    return unquote(url.partition(prefix)[2].partition("?")[0])


class Stage:
    """Plays the server for every page that is opened after this one was made. ``frames`` counts what was sent."""

    def __init__(self, page: Page, snapshot: dict[str, Any]) -> None:
        self.snapshot = snapshot
        self.status = status()
        self.frames = 0
        self.calls: list[tuple[str, str, Any]] = []
        self.keys = [dict(SERVER_KEY)]
        self._n = snapshot["n"]
        self._sockets: list[WebSocketRoute] = []
        page.route("**/tuft/lab/state*", self._answer)
        page.route("**/tuft/lab/api/v1/**", self._call)
        page.route("**/tuft/lab/oai/**", self._complete)
        page.route_web_socket("**/tuft/lab/feed*", self._open)

    def send(self, message: dict[str, Any]) -> None:
        for socket in self._sockets:
            socket.send(json.dumps(message))
            self.frames += 1

    def step(self, run: str, loss: float) -> None:
        """One more step of a run, as two records."""
        now = time.time()
        records: list[dict[str, Any]] = []
        for op, facts in (
            ("forward_backward", {"loss_sum": loss, "weight_sum": 1.0, "tokens": 900}),
            ("optim_step", {"grad_norm": 0.4, "learning_rate": 1e-4}),
        ):
            for kind, data in (
                ("op_accepted", {"run": run, "op": op, "args": {}}),
                ("op_done", {"run": run, "op": op, "facts": facts}),
            ):
                self._n += 1
                record = {"n": self._n, "kind": kind, "tenant": "alice", "time": now, "data": data}
                records.append(record)
        self.send({"type": "records", "records": records})

    def _answer(self, route: Route) -> None:
        route.fulfill(json={"state": self.snapshot, "status": self.status})

    def _call(self, route: Route) -> None:
        request = route.request
        path = below(request.url, "/tuft/lab/api/v1/")
        self.calls.append((request.method, path, request.post_data_json if request.post_data else None))
        route.fulfill(json=self._reply(request.method, path, request.url))

    def _reply(self, method: str, path: str, url: str) -> dict[str, Any]:
        if path == "tuft/keys":
            if method == "GET":
                return {"keys": self.keys}
            made = {**self.keys[-1], **self.calls[-1][2], "id": "0123456789ab", "expires": None}
            self.keys.append({**made, "source": "issued", "created": time.time()})
            return {**made, "key": "tml-0123456789abcdef"}
        if path.endswith("/samples"):
            return said(int(url.partition("step=")[2].partition("&")[0]))
        return {}

    def _complete(self, route: Route) -> None:
        asked = route.request.post_data_json
        self.calls.append(("POST", below(route.request.url, "/tuft/lab/oai/"), asked))
        model = asked["model"]
        words = (
            ["Ahoy", " matey,", " the", " sky", " be", " blue."]
            if "tinker" in model
            else ["The", " sky", "."]
        )
        chunks = [{"choices": [{"index": 0, "delta": {"content": word}, "text": word}]} for word in words]
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
        route.fulfill(body="".join(events), content_type="text/event-stream")

    def _open(self, socket: WebSocketRoute) -> None:
        self._sockets.append(socket)
        socket.on_close(lambda *_: self._sockets.remove(socket) if socket in self._sockets else None)
        socket.send(json.dumps({"type": "status", "status": self.status}))
        socket.send(json.dumps(gauges()))
        socket.send(json.dumps({"type": "queue", "queue": self.queue()}))
        socket.send(json.dumps({"type": "log", "lines": LOG}))

    def hang_up(self) -> None:
        """The server goes away."""
        for socket in list(self._sockets):
            socket.close()

    def queue(self) -> list[dict[str, Any]]:
        why = "2 of its requests are accepted; 1 other run shares the engine, in turns"
        waiting = [one for one in self.snapshot["runs"] if one["pending"]]
        return [{"run": one["id"], "pending": one["pending"], "why": why} for one in waiting]
