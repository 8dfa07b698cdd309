"""Closing the lid: the kernel dies, the run goes on, and the next cell continues at the step after the last.

``TUFT_KERNEL_KILLS`` says how often (``make continuity`` does it twenty times).
"""

from __future__ import annotations

import os
import signal

import pytest

from examples.run_on_server import CellFailed, Kernel, Server
from tests.support.live import ask, key_of, until

KILLS = int(os.environ.get("TUFT_KERNEL_KILLS", "3"))
STEPS = 3

pytestmark = pytest.mark.timeout(900)

TRAIN = f"""
from tinker import types

def datum():
    return types.Datum(model_input=types.ModelInput.from_ints([101, 42, 37]),
                       loss_fn_inputs={{"target_tokens": [42, 37, 99]}})

def step(training):
    passed = training.forward_backward([datum()], "cross_entropy")
    return passed, training.optim_step(types.AdamParams(learning_rate=1e-3))

for _ in range({STEPS}):
    passed, stepped = step(training)
    stepped.result(timeout=120)
"""
LEAVE_TWO_BEHIND = """
import time
from tuft_jupyter.kernel.stopping import on_its_way

last = [step(training) for _ in range(2)]
while on_its_way(training):  # what the server has not accepted dies with the kernel
    time.sleep(0.01)
"""


def kill(kernel: Kernel) -> None:
    """As the out-of-memory killer would."""
    os.kill(int(kernel.value("__import__('os').getpid()")), signal.SIGKILL)


def points(server: Server, run: str) -> list[int]:
    address = f"{server.url.rstrip('/')}/tuft"
    steps: list[int] = ask(address, f"tuft/runs/{run}/curve", key_of(server.work))["columns"]["step"]
    return steps


def until_done(server: Server, run: str, steps: int) -> None:
    until(lambda: len(points(server, run)) == steps, 120, "what was submitted before is done")


def test_a_killed_kernel_loses_no_step(alice: Server) -> None:
    """S0-48, F1: each new kernel finds the run, what was submitted before is done, and it goes on at step n + 1;
    in the end the curve has every step once."""
    done, run = 0, ""
    for n in range(KILLS):
        with Kernel(alice) as kernel:
            kernel.run("%load_ext tuft_jupyter\nimport tuft_jupyter")
            if n == 0:
                kernel.run("training = tuft_jupyter.create_training_client('tuft/demo', rank=4).result()")
                run = str(kernel.value("training.model_id"))
            else:
                until_done(alice, run, done)
                listed = kernel.run("%tuft attach").text
                assert run[:8] in listed
                shown = kernel.run("training = %tuft resume").text
                assert f"at step {done}" in shown
                assert kernel.value("training.model_id") == run
            kernel.run(TRAIN)
            kernel.run(LEAVE_TWO_BEHIND)
            done += STEPS + 2
            kill(kernel)
    until_done(alice, run, done)
    assert points(alice, run) == list(range(1, done + 1))


def test_a_run_that_ended_goes_on_from_its_newest_state(alice: Server) -> None:
    """Loaded into a new run at the saved step, with its optimizer: the next losses are bit-equal."""
    with Kernel(alice) as kernel:
        kernel.run("%load_ext tuft_jupyter\nimport tuft_jupyter")
        kernel.run("training = tuft_jupyter.create_training_client('tuft/demo', rank=4).result()" + TRAIN)
        kernel.run("training.save_state('kept').result(); end = training.model_id")
        kernel.run(
            "loss = lambda t: step(t)[0].result().metrics['loss:sum']; want = [loss(training), loss(training)]"
        )
        kernel.run("from tuft_jupyter.kernel import connect")
        kernel.run(
            "connect.current().client.call('POST', 'unload_model', {'model_id': end}); import time\n"
            "while next(r for r in tuft_jupyter.runs() if r['id'] == end)['status'] != 'closed': time.sleep(0.02)"
        )
        shown = kernel.run("again = tuft_jupyter.resume(end)").text
        assert f"at step {STEPS}" in shown
        assert kernel.value("again.model_id != end")
        assert kernel.value("[loss(again), loss(again)] == want")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("resume nobody:0", "'nobody:0' is no run of yours"),
        ("why nobody:0", "'nobody:0' is no run of yours"),
        ("checkpoints --delete nothing", "'nothing' is no checkpoint of yours"),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(kernel: Kernel, line: str, says: str) -> None:
    """S1-34: a run id that is not yours and a path that does not exist, each with the command that helps."""
    kernel.run("%load_ext tuft_jupyter")
    with pytest.raises(CellFailed) as failed:
        kernel.run(f"%tuft {line}")
    assert str(failed.value).startswith("TuftConnectionError: ")
    assert says in str(failed.value)
    assert "%tuft" in str(failed.value)


def test_checkpoints_are_listed_fetched_and_deleted(kernel: Kernel, alice: Server) -> None:
    kernel.run("%load_ext tuft_jupyter\nimport tuft_jupyter, tarfile")
    kernel.run("training = tuft_jupyter.create_training_client('tuft/demo', rank=4).result()")
    kernel.run("path = training.save_state('to-fetch').result().path")
    path = str(kernel.value("path"))
    assert path in kernel.run("%tuft checkpoints").text
    shown = kernel.run(f"%tuft checkpoints --download to-fetch --to {alice.root}").text
    (archive,) = alice.root.glob("*-to-fetch.tar")
    assert archive.name in shown
    names = kernel.value(f"tarfile.open({str(archive)!r}).getnames()")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {name.split("/")[-1] for name in names}
    kernel.run(f"%tuft checkpoints --delete {path}")
    assert path not in kernel.run("%tuft checkpoints").text
