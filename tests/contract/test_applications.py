"""A server from one file in Twinkle's form, on a CPU: started, used through the stock SDK, limited, ended."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from examples.run_on_server import Server
from tests.contract.conftest import clean_environment
from tests.contract.test_kernel_servers import SPELLINGS, alive
from tests.support.live import ask, environment, key_of, python, until
from tests.support.server_configs import EXAMPLE, MODEL, PROCESSOR, SAMPLER, SERVER, changed

pytestmark = pytest.mark.timeout(300)

LAUNCH = """
import os, sys
import tuft_jupyter

if __name__ == "__main__":
    file_dir = os.path.abspath(os.path.dirname(__file__))
    config_path = os.path.join(file_dir, "server_config.yaml")
    tuft_jupyter.launch_server(config_path=config_path)
    print("RETURNED", flush=True)
"""

TRAIN = """
import os, sys
import tinker
from tinker import types

client = tinker.ServiceClient()
names = [model.model_name for model in client.get_server_capabilities().supported_models]
assert names == ["tuft/demo"], names
training = client.create_lora_training_client(base_model="tuft/demo", seed=1)

def datum(length):
    tokens = [7] * length
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs={"target_tokens": tokens})

losses = []
for _ in range(3):
    done = training.forward_backward([datum(8)], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    losses.append(done.result().metrics["loss:sum"])
assert losses[-1] < losses[0], losses

try:  # longer than max_length of the model, though not than the sampler's max_model_len
    training.forward_backward([datum(8), datum(65)], "cross_entropy").result()
except Exception as error:
    print("LONG", " ".join(str(error).split()))
training.forward_backward([datum(64)], "cross_entropy").result()

sampling = training.save_weights_and_get_sampling_client()
prompt, greedy = types.ModelInput.from_ints([7, 7, 7]), types.SamplingParams(max_tokens=4, temperature=0.0)
for name, who in (("BASE", client.create_sampling_client(base_model="tuft/demo")), ("ADAPTED", sampling)):
    print(name, who.sample(prompt, 1, greedy).result().sequences[0].tokens)
drawn = sampling.sample(prompt, 1, types.SamplingParams(max_tokens=4, temperature=2.0, top_k=1)).result()
print("LOGPROBS", drawn.sequences[0].logprobs)
for length, name in ((48, "PROMPT"), (29, "ANSWER")):
    try:
        sampling.sample(types.ModelInput.from_ints([7] * length), 1, types.SamplingParams(max_tokens=4)).result()
    except Exception as error:
        print(name, " ".join(str(error).split()))
print("DONE")
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("applications")


@pytest.fixture(scope="module")
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def env(home: Path, port: int) -> dict[str, str]:
    address = f"http://127.0.0.1:{port}"
    return environment(home, TINKER_BASE_URL=address, TINKER_API_KEY="tml-here", TUFT_API_KEY="tml-here")


def edited(port: int) -> dict[str, Any]:
    """The example, on a free port, with short limits."""

    def change(apps: list[dict[str, Any]]) -> None:
        apps[SERVER]["route_prefix"] = "/team/api/v1"
        apps[MODEL]["args"]["max_length"] = 64
        apps[SAMPLER]["args"]["engine_args"]["max_model_len"] = 32
        apps[SAMPLER]["route_prefix"] = "/team/api/v1/sampler/tuft/demo"
        apps[PROCESSOR]["route_prefix"] = "/texts"

    document = changed(change, yaml.safe_load(EXAMPLE.read_text()))
    document["http_options"]["port"] = port
    return document


@pytest.fixture(scope="module")
def server(home: Path, env: dict[str, str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A script beside its configuration, run from another directory."""
    (home / "server_config.yaml").write_text(yaml.safe_dump({**edited(port), "checkpoint_dir": "kept"}))
    (home / "server.py").write_text(LAUNCH)
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(home / "server.py")], env=env, stdout=log, stderr=log, cwd="/"
        )
    address = f"http://127.0.0.1:{port}"
    until(lambda: alive(address) or process.poll() is not None, 60, "the server did not start")
    assert process.poll() is None, (home / "log").read_text()
    yield process
    process.kill()
    process.wait(30)


def test_the_stock_sdk_trains_and_samples_on_it(
    server: subprocess.Popen[bytes], env: dict[str, str], home: Path
) -> None:
    """S2-17, S2-18, S2-23, S2-24, S2-26, S2-38, S2-50, S2-52, S2-55, S2-62: served as the file says."""
    done = python(TRAIN, env)
    assert "DONE" in done.stdout, done.stdout + done.stderr
    said = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    assert "datum 1: model_input has 65 tokens, the model takes at most 64" in said["LONG"]
    assert "prompt has 48 tokens; the context of 32 tokens" in said["PROMPT"]
    told = "prompt has 29 tokens and max_tokens asks for 4 more, which does not fit the context of 32 tokens"
    assert told in said["ANSWER"]
    assert said["BASE"] != said["ADAPTED"] == "[7, 7, 7, 7]"
    assert json.loads(said["LOGPROBS"]) == [0.0] * 4  # of what one candidate is drawn from
    assert (home / "kept").is_dir()


def test_the_applications_are_where_the_file_puts_them(server: subprocess.Popen[bytes], port: int) -> None:
    """S2-12, S2-27, S2-28, S2-31, S2-35, S2-65, X5: the API below its prefix and at /api/v1; the others tell."""
    address = f"http://127.0.0.1:{port}"
    models = ask(address, "get_server_capabilities", "tml-here")
    assert ask(address + "/team", "get_server_capabilities", "tml-here") == models
    assert models["supported_models"][0]["model_name"] == "tuft/demo"
    listed = ask(address, "tuft/applications", "tml-here")["applications"]
    assert [app["deployment"] for app in listed] == [
        "TinkerCompatServer", "ModelManagement", "SamplerManagement", "ProcessorManagement"
    ]  # fmt: skip
    for place in (
        "/team/api/v1/sampler/tuft/demo",
        "/api/v1/model/tuft/demo",
        "/texts",
    ):  # as a client's base_url
        assert ask(address + place, "get_server_capabilities", "tml-here") == models
        assert ask(address + place, "create_session", "tml-here", {})["session_id"]
    assert ask(address, "model/tuft/demo/get_server_capabilities", "tml-here") == models
    for path, code in (("model/tuft/demo/no_such_path", 404), ("model/tuft/demo/create_session", 400)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(address, path, "tml-here")
        assert refused.value.code == code
    told = ask(address, "model/tuft/demo", "tml-here")
    assert told == listed[MODEL]
    assert (told["name"], told["device_type"], told["dp_size"], told["gpus"]) == ("models-demo", "cpu", 1, 0)
    assert ask(address, "tuft/status", "tml-here")["applications"] == listed
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(address, "model/tuft/demo", "tml-wrong")
    assert refused.value.code == 403
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(address, "sampler/tuft/demo", "tml-here")  # it is at another place
    assert refused.value.code == 404
    assert ask(address + "/team", "sampler/tuft/demo", "tml-here") == listed[SAMPLER]
    request = urllib.request.Request(address + "/texts", headers={"X-API-Key": "tml-here"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        assert json.loads(answer.read()) == listed[PROCESSOR]


def test_another_model_is_not_served_and_the_answer_says_which_are(
    server: subprocess.Popen[bytes], port: int
) -> None:
    """S2-30."""
    address = f"http://127.0.0.1:{port}"
    session = ask(address, "create_session", "tml-here", {})["session_id"]
    wanted = {"session_id": session, "model_seq_id": 0, "base_model": "acme/x", "lora_config": {"rank": 8}}
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(address, "create_model", "tml-here", wanted)
    assert refused.value.code == 400
    assert b"Base model 'acme/x' is not supported. Supported models: tuft/demo" in refused.value.read()


def test_what_has_no_effect_is_in_the_log(server: subprocess.Popen[bytes], home: Path) -> None:
    """S2-25, S2-33, X7."""
    log = (home / "log").read_text()
    assert "proxy_location has no effect here" in log
    assert "max_ongoing_requests (50) is below target_ongoing_requests (128)" in log


def test_a_signal_ends_it_with_its_actors(server: subprocess.Popen[bytes], home: Path) -> None:
    """S2-17: the call returns, the exit code is 0, and Ray is gone."""
    below = psutil.Process(server.pid).children(recursive=True)
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    assert "RETURNED" in (home / "log").read_text()
    _, left = psutil.wait_procs(below, 20)
    assert not left


@pytest.mark.parametrize("log_level", ["INFO", "DEBUG"])
def test_the_module_form_starts_it_too(log_level: str, home: Path, env: dict[str, str]) -> None:
    """S2-19, S2-21, S2-22: --config, --namespace, --log-level in capitals."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    config = home / f"{log_level}.yaml"
    config.write_text(yaml.safe_dump(edited(port)))
    command = [*SPELLINGS["python -m"], "-c", str(config), "--namespace", "mine", "--log-level", log_level]
    with (home / log_level).open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        until(lambda: alive(f"http://127.0.0.1:{port}") or process.poll() is not None, 60, "it did not start")
        ask(f"http://127.0.0.1:{port}", "tuft/status", "tml-here")
    finally:
        process.terminate()
        assert process.wait(60) == 0
    assert ("DEBUG" in (home / log_level).read_text()) == (log_level == "DEBUG")


def test_a_configuration_must_be_named_in_the_module_form(env: dict[str, str]) -> None:
    """S2-20: exit code 2."""
    for words in ([], ["--namespace", "x"], ["--config"]):
        done = subprocess.run(
            [*SPELLINGS["python -m"], *words],
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2, words
        assert "config" in done.stderr


def test_a_notebook_server_takes_the_same_file_and_listens_where_jupyter_does(tmp_path: Path) -> None:
    """S2-12, S2-17, S2-25, S2-26, S2-28: hosted, the prefixes are below /tuft, and what has no effect is said."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    config = tmp_path / "server_config.yaml"
    config.write_text(yaml.safe_dump(edited(port)))
    root = tmp_path / "notebooks"
    root.mkdir()
    with Server(root, tmp_path, env={**clean_environment(tmp_path), "TUFT_CONFIG": str(config)}) as jupyter:
        address = jupyter.url.rstrip("/") + "/tuft"
        key = key_of(tmp_path)
        assert ask(address, "model/tuft/demo", key)["name"] == "models-demo"
        assert ask(address + "/team", "tuft/status", key)["ready"]
        log = jupyter.log.read_text()
        assert not alive(f"http://127.0.0.1:{port}")
    assert f"host and port (127.0.0.1:{port}) have no effect: the notebook server listens" in log
    assert "proxy_location has no effect here" in log
