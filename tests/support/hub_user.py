"""Stands where ``jupyterhub-singleuser`` would: a user's server whose only kernel fine-tunes as soon as it may.

It has exactly the environment that JupyterHub gives a server, and so a kernel: that is all its training knows. It
answers the Hub's questions whether it is up, waits for the file ``go`` beside its home, trains by the stock SDK, and
leaves ``result.json`` in its home.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

LONG = os.environ.get("JUPYTERHUB_USER", "").startswith("long")
STEPS = 300 if LONG else int(os.environ.get("TEST_STEPS", "8"))
DATUMS = 96 if LONG else 4
TOKENS = 64


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("X-JupyterHub-Version", "5.0.0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - the name is the protocol's

    def log_message(self, *args: object) -> None:
        """Nothing to say."""


def train() -> dict[str, object]:
    import tinker

    import tuft_jupyter

    tuft_jupyter.init(report=lambda phase, text: None)
    client = tuft_jupyter.create_training_client("tuft/demo", rank=8)
    tokens = [n % 200 for n in range(TOKENS + 1)]
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * TOKENS},
    )
    (Path.cwd() / "ready").touch()
    go = Path.cwd().parent / "go"
    while not go.exists():
        time.sleep(0.02)
    losses, ahead = [], (10 if LONG else 2)
    waiting: list[tuple[object, object]] = []
    for step in range(STEPS):
        passed = client.forward_backward([datum] * DATUMS, "cross_entropy")
        waiting.append((passed, client.optim_step(tinker.AdamParams(learning_rate=1e-3))))
        if step == 0:
            (Path.cwd() / "begun").write_text(client.model_id)
        while len(waiting) > ahead:
            losses.append(_loss(*waiting.pop(0)))
    losses += [_loss(*pair) for pair in waiting]
    return {"run": client.model_id, "address": os.environ.get("TINKER_BASE_URL"), "losses": losses}


def _loss(passed: object, stepped: object) -> float:
    stepped.result()  # type: ignore[attr-defined]
    return float(passed.result().metrics["loss:sum"])  # type: ignore[attr-defined]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from the Hub: the SDK's threads must not delay the end
    where = urlsplit(os.environ["JUPYTERHUB_SERVICE_URL"])
    server = ThreadingHTTPServer((where.hostname or "127.0.0.1", where.port or 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        result = train()
    except Exception as error:  # noqa: BLE001 - the test is told whatever it is
        result = {"error": f"{type(error).__name__}: {error}"}
    fresh = Path.cwd() / "result.tmp"
    fresh.write_text(json.dumps(result))
    fresh.replace(Path.cwd() / "result.json")
    threading.Event().wait()


if __name__ == "__main__":
    main()
