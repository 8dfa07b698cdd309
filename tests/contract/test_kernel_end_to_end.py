"""The README's script and the notebooks, by the unmodified SDK, from real kernels of a real notebook server.

The server has a path prefix, a token and XSRF protection; no network is reachable from it.
"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import sqlite3
import tempfile
import time
import urllib.error
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from examples.run_on_server import CellFailed, Kernel, Server, run_notebook
from tests.support.live import EXAMPLES, ask, key_of, until
from tests.support.tiny_models import make_model

PROMPT = [101, 42, 37, 102]
FOUR = {"TUFT_ADDRESS", "TUFT_API_KEY", "TINKER_BASE_URL", "TINKER_API_KEY"}

pytestmark = pytest.mark.timeout(300)

HELPERS = """
import os, tinker
from tinker import types
client = tinker.ServiceClient()

def datum(tokens=(101, 42, 37, 102), targets=(101, 99, 73, 102), **inputs):
    made = {"target_tokens": list(targets), **inputs}
    return types.Datum(model_input=types.ModelInput.from_ints(list(tokens)), loss_fn_inputs=made)

def loss(training, *data):
    return training.forward(list(data) or [datum()], "cross_entropy").result(timeout=60).metrics["loss:sum"]

def trained(seed=3, steps=2):
    training = client.create_lora_training_client(base_model="tuft/demo", rank=8, seed=seed).result()
    for _ in range(steps):
        training.forward_backward([datum()], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result(timeout=60)
    return training

def refusal(do):
    try:
        do()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None
"""


@pytest.fixture(scope="module")
def home(alice: Server) -> Path:
    """Alice's TUFT_HOME is below; her notebooks get the examples; kernels are told the address from now on."""
    shutil.copytree(EXAMPLES, alice.root, dirs_exist_ok=True)
    address = f"{alice.url.rstrip('/')}/tuft"
    until(lambda: ask(address, "tuft/status", key_of(alice.work))["ready"], 60, "the server is not ready")
    return alice.work


@pytest.fixture
def fresh(alice: Server, home: Path) -> Iterator[Kernel]:
    """A kernel in which nothing has run."""
    with Kernel(alice) as made:
        yield made


@pytest.fixture(scope="module")
def script(alice: Server, home: Path) -> Any:
    """A kernel in which the README's script has run, as it stands, without ``%tuft init``."""
    with Kernel(alice) as kernel:
        began = time.monotonic()
        kernel.run((EXAMPLES / "end_to_end.py").read_text())
        yield kernel, time.monotonic() - began


@pytest.fixture(scope="module")
def sdk(alice: Server, home: Path) -> Any:
    """A kernel with small helpers around the SDK."""
    with Kernel(alice) as kernel:
        kernel.run(HELPERS)
        yield kernel


def test_a_hosted_notebook_needs_no_init(fresh: Kernel) -> None:
    """S0-05, S0-08, S0-21: the first cell works; all four variables are set; the key begins tml-; the address
    ends /tuft.
    """
    outcome = fresh.run("import tinker; print(tinker.ServiceClient().get_server_capabilities())")
    assert "tuft/demo" in outcome.printed
    env = fresh.value(f"{{n: __import__('os').environ[n] for n in {FOUR!r}}}")
    assert env["TINKER_BASE_URL"] == env["TUFT_ADDRESS"]
    assert env["TINKER_BASE_URL"].endswith("/user/alice/tuft")
    assert env["TINKER_API_KEY"] == env["TUFT_API_KEY"]
    assert env["TINKER_API_KEY"].startswith("tml-")


def test_init_names_its_phases_and_the_sdk_needs_no_arguments(fresh: Kernel) -> None:
    """S0-03, S0-05, S0-07: `%load_ext` and `%tuft init model=...` are all that a notebook needs to train."""
    fresh.run("%load_ext tuft_jupyter")
    shown = fresh.run("%tuft init model=tuft/demo").text
    assert re.search(r"discovered +http\S+/user/alice/tuft \(TUFT_ADDRESS\)", shown)
    assert re.search(r"connected +http\S+; base model tuft/demo", shown)
    fresh.run(HELPERS)
    assert fresh.value("loss(trained())") > 0


def test_a_failure_in_a_cell_is_one_sentence(fresh: Kernel) -> None:
    """S0-17, S0-32: no wall of traceback in a real kernel, and the cell has failed."""
    fresh.run("%load_ext tuft_jupyter")
    with pytest.raises(CellFailed) as failed:
        fresh.run("%tuft init --address http://127.0.0.1:9")
    assert str(failed.value).startswith("TuftConnectionError: Cannot connect to TuFT at http://127.0.0.1:9")
    assert len(str(failed.value).splitlines()) == 1
    with pytest.raises(CellFailed) as failed:
        fresh.run("import tuft_jupyter; tuft_jupyter.init(config='/no/such.yaml')")
    assert str(failed.value).startswith("TuftConnectionError: Config file not found: /no/such.yaml; ")


def test_the_hosted_api_has_no_port_of_its_own(alice: Server) -> None:
    """S1-11: the notebook's process serves HTTP on one socket; with a model loaded, Ray's own RPC port is on
    loopback.
    """
    listening = [c for c in psutil.Process(alice.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}
    assert [c.laddr.port for c in listening if speaks_http(c.laddr.port)] == [urlsplit(alice.url).port]


def speaks_http(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/")
        connection.getresponse()
    except (OSError, http.client.HTTPException):
        return False
    return True


def test_the_readme_s_script_runs_as_it_is(script: tuple[Kernel, float], home: Path) -> None:
    """S0-01, S1-29, S1-30, S1-37, S1-38: every call of the README, with its made-up ids and time limits."""
    kernel, _ = script
    metrics = kernel.value("[fwdbwd.metrics, optim.metrics]")
    assert "loss:sum" in metrics[0]
    assert all(isinstance(value, float) for each in metrics for value in each.values())
    assert kernel.value("len(fwdbwd.loss_fn_outputs[0]['logprobs'].data)") == 4


def test_capabilities_name_every_model(script: tuple[Kernel, float]) -> None:
    """S1-17, S1-32, S1-33: names are never empty; the demo model is offered first."""
    names = script[0].value("[m.model_name for m in capabilities.supported_models]")
    assert names[0] == "tuft/demo"
    assert all(names)


def test_the_session_is_known(script: tuple[Kernel, float], home: Path) -> None:
    """S1-31, S1-41: the session is in the list of sessions, and it has our run."""
    kernel, _ = script
    session = kernel.value("session_id")
    listed = ask(kernel.value("os.environ['TINKER_BASE_URL']"), "sessions?limit=100", key_of(home))
    assert session in listed["sessions"]
    assert kernel.value("session_info.training_run_ids") == [f"{session}:train:0"]


def directory_of(path: str, journal: Path) -> Path:
    """Where the server keeps a checkpoint: the journal knows, nobody else needs to."""
    with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as opened:
        rows = opened.execute("SELECT data FROM records WHERE kind = 'op_done'").fetchall()
    saved = [json.loads(data)["facts"].get("checkpoint", {}) for (data,) in rows]
    (directory,) = [each["directory"] for each in saved if each.get("path") == path]
    return Path(directory)


def test_saved_states_and_weights_have_paths_and_files(
    script: tuple[Kernel, float], home: Path, alice: Server
) -> None:
    """S1-39, S1-40, S1-45: tinker:// paths; PEFT files on disk that PEFT loads; the panel is told both."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    kernel, _ = script
    run = kernel.value("session_info.training_run_ids[0]")
    assert kernel.value("checkpoint.path") == f"tinker://{run}/weights/demo-checkpoint"
    assert kernel.value("sampler_weights.path") == f"tinker://{run}/sampler_weights/demo-sampler"

    directory = directory_of(kernel.value("sampler_weights.path"), home / "tuft" / "journal.sqlite")
    assert (directory / "adapter_model.safetensors").is_file()
    base = AutoModelForCausalLM.from_pretrained(EXAMPLES.parent / "tuft_jupyter" / "demo")
    PeftModel.from_pretrained(base, directory)

    state = json.dumps(alice.request("GET", "tuft/lab/state"))
    assert kernel.value("checkpoint.path") in state
    assert kernel.value("sampler_weights.path") in state


def test_samples_are_as_asked(script: tuple[Kernel, float]) -> None:
    """S1-42, S1-43, S1-44: one sequence, at most five ids, a logprob for each, a stop reason."""
    kernel, _ = script
    assert kernel.value("len(sample.sequences)") == 1
    tokens = kernel.value("sample.sequences[0].tokens")
    assert 1 <= len(tokens) <= 5
    assert all(isinstance(token, int) for token in tokens)
    assert kernel.value("len(sample.sequences[0].logprobs)") == len(tokens)
    assert kernel.value("str(sample.sequences[0].stop_reason)") in ("stop", "length")


def test_missing_weights_are_ones(sdk: Kernel) -> None:
    """S1-36."""
    sdk.run("fresh = trained(steps=0)")
    assert sdk.value("loss(fresh, datum(weights=[1.0] * 4))") == sdk.value("loss(fresh, datum())")


def test_a_step_changes_the_weights_and_a_seed_repeats_it(sdk: Kernel) -> None:
    """S1-38: before and after differ; a second run with the same seed is identical."""
    sdk.run("one, two = trained(seed=3), trained(seed=3)")
    assert sdk.value("loss(trained(seed=3, steps=0))") > sdk.value("loss(one)")
    assert sdk.value("loss(one)") == sdk.value("loss(two)")


def test_a_saved_state_gives_the_same_loss_again(sdk: Kernel) -> None:
    """S1-39: bit-equal after loading, with the optimizer: the next step is equal too."""
    sdk.run(
        "first = trained()\n"
        "path = first.save_state('again').result(timeout=60).path\n"
        "second = client.create_training_client_from_state_with_optimizer(path).result()"
    )
    assert sdk.value("loss(first)") == sdk.value("loss(second)")
    sdk.run(
        "for each in (first, second):\n"
        "    each.forward_backward([datum()], 'cross_entropy')\n"
        "    each.optim_step(types.AdamParams(learning_rate=1e-2)).result(timeout=60)"
    )
    assert sdk.value("loss(first)") == sdk.value("loss(second)")


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (
            "client.create_lora_training_client(base_model='tuft/demo', rank=999).result()",
            "(BadRequestError|RequestFailedError)",
            r"999.*64",
        ),
        (
            "client.create_lora_training_client(base_model='x').result()",
            "(BadRequestError|NotFoundError)",
            r"'x'.*tuft/demo",
        ),
        (
            "trained(steps=0).forward_backward([datum(tokens=(101, 42, 37, 2048))], 'cross_entropy').result()",
            "RequestFailedError",
            r"2048.*vocab.*2048",
        ),
        (
            "trained(steps=0).forward_backward([datum([5] * 2049, [5] * 2049)], 'cross_entropy').result()",
            "(RequestFailedError|BadRequestError)",
            r"2048",
        ),
        (
            "client.create_sampling_client(model_path='tinker://other:train:0/sampler_weights/s').result()",
            "(NotFoundError|BadRequestError)",
            r"",
        ),
    ],
    ids=["rank", "base model", "token id", "length", "foreign path"],
)
def test_what_cannot_be_is_refused_by_name(call: str, kind: str, says: str, sdk: Kernel) -> None:
    """S1-19, S1-30, S1-34, S1-42: the error names the datum's fault and the limit; nothing else is
    disturbed.
    """
    name, text = sdk.value(f"refusal(lambda: {call})")
    assert re.fullmatch(kind, name), (name, text)
    assert re.search(says, text, re.DOTALL), text
    assert sdk.value("loss(trained(steps=0))") > 0


def test_the_tokenizer_of_the_demo_model_is_found(fresh: Kernel) -> None:
    """S1-35: training and sampling clients; encode and decode round-trip, without a network, at once."""
    fresh.run("%load_ext tuft_jupyter\n%tuft init\nimport tinker, time; client = tinker.ServiceClient()")
    fresh.run("training = client.create_lora_training_client(base_model='tuft/demo', rank=4).result()")
    fresh.run("import transformers; began = time.monotonic(); t = training.get_tokenizer()")
    fresh.run("s = client.create_sampling_client(base_model='tuft/demo').result().get_tokenizer()")
    assert fresh.value("[x.decode(x.encode('the cat sat')) for x in (t, s)]") == ["the cat sat"] * 2
    assert fresh.value("time.monotonic() - began") < 20


def test_a_local_directory_is_served_under_its_name_with_its_tokenizer(fresh: Kernel, tmp_path: Path) -> None:
    """S0-14, S0-15, S1-18, S1-35: `%tuft init /path/tiny`; both the name and the path give a client."""
    tiny = make_model(tmp_path / "tiny")
    fresh.run(f"%load_ext tuft_jupyter\n%tuft init {tiny}\nimport tuft_jupyter")
    names = fresh.value(
        "[m.model_name for m in tuft_jupyter.get_service_client().get_server_capabilities().supported_models]"
    )
    assert "tiny" in names
    for base_model in ("tiny", str(tiny)):
        fresh.run(f"training = tuft_jupyter.create_training_client({base_model!r}, rank=8).result()")
        assert fresh.value("training.get_info().lora_rank") == 8
        assert fresh.value("training.get_info().model_data.model_name") == "tiny"
        assert fresh.value("(lambda t: t.decode(t.encode('a cat')))(training.get_tokenizer())") == "a cat"


def test_a_two_slash_directory_is_served_under_its_name(fresh: Kernel) -> None:
    """S1-35, tinker_wire 5: of ``/models/tiny`` the SDK would load ``/models``; the server answers with
    ``tiny``.
    """
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        model = make_model(directory.with_name(f"{directory.name}-m"))
        assert str(model).count("/") == 2
        fresh.run("import tinker; client = tinker.ServiceClient()\n%load_ext tuft_jupyter")
        fresh.run(f"%tuft init {model}")
        fresh.run(
            f"training = client.create_lora_training_client(base_model={str(model)!r}, rank=4).result()"
        )
        assert fresh.value("(lambda t: t.decode(t.encode('a cat')))(training.get_tokenizer())") == "a cat"
        fresh.run("sampler = training.save_weights_and_get_sampling_client().result()")
        assert fresh.value("(lambda t: t.decode(t.encode('a cat')))(sampler.get_tokenizer())") == "a cat"
    finally:
        shutil.rmtree(directory)
        shutil.rmtree(directory.with_name(f"{directory.name}-m"), ignore_errors=True)


def test_the_notebooks_run_and_the_model_learns(alice: Server, home: Path) -> None:
    """S1-29, S1-46: quickstart and tokenizer notebooks; the loss falls by a third, the answers turn
    pirate.
    """
    with Kernel(alice, "quickstart.ipynb") as kernel:
        run_notebook(kernel, EXAMPLES / "quickstart.ipynb")
        losses = kernel.value("losses")
        assert sum(losses[-5:]) < 2 / 3 * sum(losses[:5])
        before, after = kernel.value("before"), kernel.value("after")
        assert not any("Arr, matey!" in answer for answer in before)
        assert sum("Arr, matey!" in answer for answer in after) >= 3
    with Kernel(alice, "tokenizer.ipynb") as kernel:
        run_notebook(kernel, EXAMPLES / "tokenizer.ipynb")
        losses = kernel.value("losses")
        assert losses[2] < losses[0]


def test_no_key_and_a_wrong_key_are_told_apart(alice: Server, home: Path) -> None:
    """S1-24, S0-34: 401 and 403; healthz is open."""
    address = f"{alice.url.rstrip('/')}/tuft"
    for key, status in (("", 401), ("tml-wrong", 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(address, "get_server_capabilities", key)
        assert refused.value.code == status
    assert ask(address, "healthz", "")["status"] == "ok"
    assert ask(address, "get_server_capabilities", key_of(home))["supported_models"]
