"""Kernel > Interrupt in a training cell: it stops where a step ends, saved, with no request left behind.

``TUFT_INTERRUPTS`` says how often (``make interrupts`` does it a hundred times).
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from typing import Any

import pytest

from examples.run_on_server import CellFailed, Kernel, Server
from tests.support.live import ask, key_of

INTERRUPTS = int(os.environ.get("TUFT_INTERRUPTS", "6"))

pytestmark = pytest.mark.timeout(900)

SETUP = """
%load_ext tuft_jupyter
import tuft_jupyter
from tinker import types
training = tuft_jupyter.create_training_client("tuft/demo", rank=4).result()
adam = types.AdamParams(learning_rate=1e-4)
datum = types.Datum(model_input=types.ModelInput.from_ints([101, 42, 37]),
                    loss_fn_inputs={"target_tokens": [42, 37, 99]})
seen = []
"""
LOOPS = {
    "one after the other": """
while True:
    training.forward_backward([datum], "cross_entropy").result()
    seen.append(training.optim_step(adam).result())
    print(len(seen), flush=True)
""",
    "ahead": """
while True:
    sent = []
    for _ in range(4):
        sent += [training.forward_backward([datum, datum], "cross_entropy"), training.optim_step(adam)]
    seen += [future.result() for future in sent]
    print(len(seen), flush=True)
""",
    "of one's own": """
def squared(data, logprobs):
    return sum((each**2).sum() for each in logprobs), {}
while True:
    training.forward_backward_custom([datum], squared).result()
    seen.append(training.optim_step(adam).result())
    print(len(seen), flush=True)
""",
    "thoughtful": """
import time
while True:
    training.forward_backward([datum], "cross_entropy").result()
    time.sleep(0.05)
    seen.append(training.optim_step(adam).result())
    print(len(seen), flush=True)
""",
    "gathered": """
while True:
    passes = [training.forward_backward([datum], "cross_entropy") for _ in range(3)]
    [future.result() for future in passes]
    seen.append(training.optim_step(adam).result())
    print(len(seen), flush=True)
""",
}


def state(server: Server, run: str) -> dict[str, Any]:
    address = f"{server.url.rstrip('/')}/tuft"
    shown = ask(address, "tuft/outlook", key_of(server.work))
    (found,) = [each for each in shown["runs"] if each["id"] == run]
    return {**found, "saved": [c for c in shown["checkpoints"] if c["run"] == run]}


def interrupted(kernel: Kernel, cell: str, delay: float) -> str:
    """Run a cell that never ends, interrupt it a moment after it printed; what the cell then says."""
    timer = threading.Timer(delay, kernel.interrupt)

    def begun(_: str) -> None:
        if timer.ident is None:
            timer.start()

    with pytest.raises(CellFailed) as stopped:
        kernel.run(cell, live=begun)
    if timer.is_alive():
        timer.join()
    return str(stopped.value)


def test_every_interrupt_leaves_a_whole_number_of_steps_and_nothing_else(
    alice: Server, kernel: Kernel
) -> None:
    """S0-48: no orphaned op, the state at a step boundary and saved; the cell goes on when it is run again."""
    kernel.run(SETUP)
    run = str(kernel.value("training.model_id"))
    chance, before = random.Random(7), 0
    for n in range(INTERRUPTS):
        loop = list(LOOPS.values())[n % len(LOOPS)]
        said = interrupted(kernel, f"%%tuft_train --no-curve\n{loop}", chance.uniform(0, 0.3))
        after = state(alice, run)
        assert after["pending"] == 0
        assert after["passes"] == 0, "gradients wait for a step"
        assert after["step"] > before
        assert f"stopped after step {after['step']}; saved as tinker://{run}/weights/" in said
        assert max(c["step"] for c in after["saved"]) == after["step"]
        assert "Traceback" not in said
        before = after["step"]
    kernel.run(
        'training.forward_backward([datum], "cross_entropy").result(); training.optim_step(adam).result()'
    )
    assert state(alice, run)["step"] == before + 1


def test_between_two_steps_it_stops_at_once_and_the_sdk_is_as_it_was(kernel: Kernel) -> None:
    """Also in code that has nothing to do with training; without --no-save there is nothing to save."""
    kernel.run(SETUP)
    said = interrupted(kernel, "%%tuft_train\nprint('now', flush=True)\nimport time; time.sleep(600)", 0.1)
    assert "stopped before any training" in said
    assert kernel.value("training.optim_step.__module__").startswith("tinker.")
    assert kernel.run("%%tuft_train --no-save\nsix = 6\nsix * 7").text.endswith("42")


def test_the_third_interrupt_stops_a_loop_that_never_ends_a_step(alice: Server, kernel: Kernel) -> None:
    """The first two wait for an optimizer step. What the loop leaves is said, and the client stays usable."""
    kernel.run(SETUP)
    loop = (
        "import time\nwhile True:\n    training.forward_backward([datum], 'cross_entropy').result()\n"
        "    print(f'at {time.monotonic()} s', flush=True)"
    )
    sent = [0.0]

    def going_on(text: str) -> None:
        """Interrupt again when the loop has printed behind the last one: two that come at once are one signal."""
        if any(float(at) > sent[-1] for at in re.findall(r"at ([\d.]+) s", text)):
            kernel.interrupt()
            sent.append(time.monotonic())

    with pytest.raises(CellFailed) as stopped:
        kernel.run(f"%%tuft_train --no-curve --no-save\n{loop}", live=going_on)
    said = str(stopped.value)
    assert len(sent) > 3, "the first two did not stop it"
    assert "stopped after step 0, in the middle of the next one: its gradients are added" in said
    run = str(kernel.value("training.model_id"))
    left = state(alice, run)
    assert left["pending"] == 0
    assert left["passes"] > 1
    kernel.run("training.optim_step(adam).result()")
    assert state(alice, run)["step"] == 1


def test_a_cell_s_own_errors_are_shown_with_its_lines(kernel: Kernel) -> None:
    kernel.run("%load_ext tuft_jupyter")
    with pytest.raises(CellFailed, match=r"1 / 0"):
        kernel.run("%%tuft_train\nx = 1\ny = 1 / 0")
    with pytest.raises(CellFailed, match=r"use .result\(\)"):
        kernel.run("%%tuft_train\nimport asyncio\nawait asyncio.sleep(0)")
    with pytest.raises(CellFailed, match="unrecognized arguments: --fast"):
        kernel.run("%%tuft_train --fast\n1")
