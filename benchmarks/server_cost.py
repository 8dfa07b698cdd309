"""What the notebook server pays: memory, imports, time to the first answer, and its answers while training runs."""

from __future__ import annotations

import re
import sys
import threading
import time
import urllib.request
from http.client import HTTPConnection
from urllib.parse import urlsplit

import psutil
from common import (
    MODEL,
    RANK,
    Kernel,
    Row,
    SdkLoop,
    Server,
    at_most,
    in_a_process,
    owners_client,
    quantile,
    server,
    show,
    tokens_of,
)

GROWTH_MB = 150
FIRST_ANSWER_SECONDS = 3.0
FIRST_STEP_SECONDS = 30.0
STATUS_P99_MS = 100
STATUS_CALLS = 300
START = (
    "2.6 s where a plain step of 16 tokens takes 20 ms; nearly all of it is Jupyter's own start: the next row"
)
FORBIDDEN = ("torch", "transformers", "vllm")

FIRST_STEP = f"""
%load_ext tuft_jupyter
%tuft init
import tuft_jupyter
from tinker import types
training = tuft_jupyter.create_training_client(base_model={MODEL!r}, rank={RANK})
tokens = list(range(16))
datum = types.Datum(
    model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs={{"target_tokens": tokens, "weights": [1.0] * 16}}
)
training.forward_backward([datum], "cross_entropy").result()
training.optim_step(types.AdamParams(learning_rate=1e-4)).result()
"""


def measure() -> list[Row]:
    began = time.perf_counter()
    with server() as started:
        request(started, "tuft/api/v1/healthz")
        first_answer = time.perf_counter() - began
        with Kernel(started) as kernel:
            began = time.perf_counter()
            kernel.run(FIRST_STEP)
            first_step = time.perf_counter() - began
        latencies = status_while_training(started)
        grown_mb = rss_mb(started)
    began = time.perf_counter()
    with server(extension=False) as bare:
        request(bare, "api")
        bare_answer = time.perf_counter() - began
        grown_mb -= rss_mb(bare)
    imported = forbidden_imports()
    return [
        at_most("server start to first answer", first_answer, FIRST_ANSWER_SECONDS, " s", note=START),
        Row("the same server without the extension", f"{bare_answer:.2f} s"),
        at_most("%tuft init to first trained step", first_step, FIRST_STEP_SECONDS, " s"),
        at_most("notebook server grows by", grown_mb, GROWTH_MB, " MB"),
        Row("torch, transformers, vllm in the notebook server", imported or "none", "none", not imported),
        Row("/api/status while training, median", f"{quantile(latencies, 0.5):.1f} ms"),
        at_most("/api/status while training, p99", quantile(latencies, 0.99), STATUS_P99_MS, " ms"),
    ]


def status_while_training(started: Server) -> list[float]:
    """Milliseconds of each answer, while 8 x 256 tokens are trained without pause."""
    with owners_client(started) as client:
        loop = SdkLoop(client, tokens_of(8, 256))
        loop.step()
        stop = threading.Event()

        def train() -> None:
            while not stop.is_set():
                loop.step()

        trainer = threading.Thread(target=train)
        trainer.start()
        try:
            # In a process of its own: here the SDK's threads would hold it up
            return in_a_process(status_latencies, started.url, started.token)
        finally:
            stop.set()
            trainer.join()


def status_latencies(url: str, token: str) -> list[float]:
    """Milliseconds of each answer of ``/api/status``."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    latencies = []
    for _ in range(STATUS_CALLS):
        began = time.perf_counter()
        connection.request("GET", f"{parts.path}api/status", headers={"Authorization": f"token {token}"})
        connection.getresponse().read()
        latencies.append((time.perf_counter() - began) * 1e3)
        time.sleep(0.02)
    return latencies


def request(started: Server, path: str) -> None:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        f"{started.url}{path}", timeout=30
    ):
        pass


def rss_mb(started: Server) -> float:
    return psutil.Process(started.pid).memory_info().rss / 1e6


def forbidden_imports() -> str:
    """Names from :data:`FORBIDDEN` that a server's process imports to serve a training step.

    Python itself writes every import into the server's log. No kernel is started: it would write there too.
    """
    with server(PYTHONPROFILEIMPORTTIME="1") as started:
        with owners_client(started) as client:
            SdkLoop(client, tokens_of(1, 16)).step()
        log = started.log.read_text(errors="replace")
    lines = re.findall(r"^import time:.*\| +(\S+)$", log, re.MULTILINE)
    if not lines:
        raise SystemExit("the server's log tells nothing of imports")
    return ", ".join(name for name in FORBIDDEN if name in lines)


if __name__ == "__main__":
    sys.exit(not show(measure()))
