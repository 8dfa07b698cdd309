"""`tuft runs`, `tuft export` and `tuft stop` against a daemon that trains; the same files from the lab."""

from __future__ import annotations

import csv
import json
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from examples.run_on_server import Kernel, Server
from tests.contract.test_kernel_servers import BIN, Daemon, config, daemon, env, home, port
from tests.support.live import python
from tests.unit.test_metrics import scalars

__all__ = ["config", "daemon", "env", "home", "port"]

pytestmark = pytest.mark.timeout(300)

TRAIN = """
import tuft_jupyter
from tinker import types
training = tuft_jupyter.create_training_client("tuft/demo", rank=4).result()
datum = types.Datum(model_input=types.ModelInput.from_ints([101, 42, 37]),
                    loss_fn_inputs={"target_tokens": [42, 37, 99]})
for _ in range(3):
    passed = training.forward_backward([datum], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    print("loss", passed.result().metrics["loss:sum"] / 3)
print(training.model_id)
"""


def tuft(env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "tuft"), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)


def test_runs_are_listed_exported_and_the_daemon_stopped(
    daemon: Daemon, env: dict[str, str], tmp_path: Path
) -> None:
    """S0-43: the daemon goes on until it is stopped; what is exported is what the program was told."""
    assert "0 runs at" in tuft(env, "runs").stdout
    trained = python(TRAIN, env)
    assert trained.returncode == 0, trained.stderr
    *_, run = trained.stdout.split()
    losses = [float(line.split()[1]) for line in trained.stdout.splitlines() if line.startswith("loss")]
    shown = tuft(env, "runs", "--address", daemon.address).stdout
    assert run[:8] in shown
    assert "ready" in shown
    assert "tenant" not in shown
    everybodys = tuft(env, "runs", "--all").stdout
    assert "tenant" in everybodys
    assert run[:8] in everybodys

    table, lines, events = (str(tmp_path / name) for name in ("m.csv", "m.jsonl", "events.out.tfevents.m"))
    for form, file in (("csv", table), ("jsonl", lines), ("tensorboard", events)):
        done = tuft(env, "export", run[:12], "--format", form, "-o", file)
        assert done.returncode == 0, done.stderr
        assert "3 steps" in done.stdout
    told = [float(row["loss"]) for row in csv.DictReader(Path(table).read_text().splitlines())]
    assert told == pytest.approx(losses, rel=1e-5)
    assert [json.loads(line)["loss"] for line in Path(lines).read_text().splitlines()] == told
    drawn = [value for tag, _, _, value in scalars(Path(events).read_bytes()) if tag == "loss"]
    assert drawn == pytest.approx(told)
    wrong = tuft(env, "export", "nobody")
    assert wrong.returncode == 1
    assert wrong.stderr.strip().startswith("tuft: 'nobody' is no run of yours")
    nowhere = tuft(env, "export", run[:12], "-o", str(tmp_path / "missing" / "m.csv"))
    assert nowhere.returncode == 1
    assert "cannot be written (No such file or directory); name a file with --output FILE" in nowhere.stderr

    stopped = tuft(env, "stop", "--address", daemon.address)
    assert stopped.returncode == 0, stopped.stderr
    assert daemon.process.wait(10) == 0
    again = tuft(env, "stop", "--address", daemon.address)
    assert again.returncode == 1
    assert "jupyter server stop" in again.stderr
    assert "`tuft launch` starts one" in tuft(env, "runs").stderr


def test_the_lab_gives_the_same_files(alice: Server, kernel: Kernel) -> None:
    kernel.run(TRAIN)
    run = kernel.value("training.model_id")
    headers = {"Authorization": f"token {alice.token}"}
    address = f"{alice.url}tuft/lab/export?run={run}&format="
    asked = [urllib.request.Request(address + form, headers=headers) for form in ("jsonl", "tensorboard")]
    with urllib.request.urlopen(asked[0]) as rows:
        assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]
    with urllib.request.urlopen(asked[1]) as events:
        assert "tfevents" in events.headers["Content-Disposition"]
        assert {step for _, step, _, _ in scalars(events.read())} == {1, 2, 3}
    for query, code in ((f"run={run}&format=xls", 400), ("run=nobody", 404)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            alice.request("GET", f"tuft/lab/export?{query}")
        assert refused.value.code == code
