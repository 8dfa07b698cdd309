"""``make demo``: fine-tune the bundled model from a notebook, on a real Jupyter server, without a browser.

Starts ``jupyter server`` with a home of its own, opens ``quickstart.ipynb`` there through the server's REST
API, runs its cells over the kernel's websocket, and checks what a person would look for: the loss fell by at
least a third, and the answers changed in the way the data asks for. Ends with 0 if so, with 1 and the reason
if not.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from run_on_server import CellFailed, Kernel, Server, run_notebook

HERE = Path(__file__).resolve().parent
NOTEBOOK = "quickstart.ipynb"
TAUGHT = "Arr, matey!"
BARS = "▁▂▃▄▅▆▇█"
ENOUGH = 2 / 3


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="tuft-demo-") as scratch:
        work = Path(scratch)
        env = {"TUFT_HOME": str(work / "tuft"), "HF_HOME": str(work / "huggingface")}
        for name in ("TUFT_ADDRESS", "TUFT_API_KEY", "TINKER_BASE_URL", "TINKER_API_KEY", "TUFT_CONFIG"):
            os.environ.pop(name, None)
        server = Server(HERE, work, env=env)
        try:
            with server:
                say(f"A Jupyter server is running at {server.url} (process {server.pid}).\n")
                return demonstrate(server)
        except (RuntimeError, TimeoutError) as problem:
            say(f"\nThe demo failed: {problem}\n")
            say(f"\nThe end of the server's log:\n{server.log.read_text()[-3000:]}\n")
            return 1


def demonstrate(server: Server) -> int:
    began = time.monotonic()
    with Kernel(server, NOTEBOOK) as kernel:
        try:
            run_notebook(kernel, HERE / NOTEBOOK, say)
        except CellFailed as failure:
            raise RuntimeError(f"a cell failed:\n{failure}") from None
        losses = kernel.value("losses")
        before, after = kernel.value("before"), kernel.value("after")
    say(f"\n{'-' * 72}\nloss  {curve(losses)}  {losses[0]:.3f} -> {losses[-1]:.3f}\n")
    for old, new in zip(before, after, strict=True):
        say(f"      {old:<34} -> {new}\n")
    problem = judge(losses, before, after)
    if problem:
        say(f"\nThe demo failed: {problem}.\n")
        return 1
    say(f"\nDone in {time.monotonic() - began:.0f} s. To see the curve move and to try your own: make lab\n")
    return 0


def judge(losses: list[float], before: list[str], after: list[str]) -> str:
    """What is wrong with the result, or nothing."""
    start, end = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    if not end <= ENOUGH * start:
        return f"the loss only went from {start:.3f} to {end:.3f}, which is less than a third"
    taught = sum(TAUGHT in answer for answer in after)
    if any(TAUGHT in answer for answer in before) or taught < ENOUGH * len(after):
        return f"{taught} of {len(after)} answers after training begin like a pirate's"
    return ""


def curve(losses: list[float], width: int = 40) -> str:
    """The losses as a line of bars."""
    group = max(1, len(losses) // width)
    means = [sum(losses[i : i + group]) / len(losses[i : i + group]) for i in range(0, len(losses), group)]
    top = max(means) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int(len(BARS) * mean / top))] for mean in means)


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
