"""init, shutdown and the clients: what a cell can rely on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import tuft_jupyter
from tests.support.stub_server import KEY, StubServer
from tuft_jupyter.kernel import connect, discovery, launch
from tuft_jupyter.kernel.errors import TuftConnectionError

INJECTED = ("TUFT_ADDRESS", "TUFT_API_KEY", "TINKER_BASE_URL", "TINKER_API_KEY")


class Told:
    def __init__(self) -> None:
        self.phases: list[tuple[str, str]] = []

    def __call__(self, phase: str, text: str) -> None:
        self.phases.append((phase, text))

    def of(self, phase: str) -> str:
        return " | ".join(text for name, text in self.phases if name == phase)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def hosted(server: StubServer, monkeypatch: pytest.MonkeyPatch) -> StubServer:
    """A kernel as a notebook server of ours starts it."""
    for name in INJECTED:
        monkeypatch.setenv(name, server.address if "KEY" not in name else KEY)
    return server


def test_init_finds_the_hosting_server_and_says_what_it_offers(hosted: StubServer, told: Told) -> None:
    """S0-07, S0-13: discovered and connected are reported; nothing is started."""
    tuft_jupyter.init(report=told)
    assert told.of("discovered") == f"{hosted.address} (TUFT_ADDRESS)"
    assert told.of("connected") == f"{hosted.address}; base models: tuft/demo"
    assert told.of("started") == ""
    assert tuft_jupyter.is_initialized()


def test_init_points_the_sdk_at_the_server(server: StubServer, told: Told) -> None:
    """S0-05: the four variables, so that tinker.ServiceClient() needs no arguments; put back by shutdown."""
    os.environ["TUFT_API_KEY"] = "tml-before"
    tuft_jupyter.init(address=server.address, api_key=KEY, report=told)
    assert {name: os.environ[name] for name in INJECTED} == {
        "TUFT_ADDRESS": server.address,
        "TUFT_API_KEY": KEY,
        "TINKER_BASE_URL": server.address,
        "TINKER_API_KEY": KEY,
    }
    tuft_jupyter.shutdown()
    assert {name: os.environ.get(name) for name in INJECTED} == {
        "TUFT_ADDRESS": None,
        "TUFT_API_KEY": "tml-before",
        "TINKER_BASE_URL": None,
        "TINKER_API_KEY": None,
    }
    del os.environ["TUFT_API_KEY"]


@pytest.mark.parametrize("scheme", ["http", "https", "all"])
def test_a_proxy_is_not_asked_for_loopback(
    scheme: str, server: StubServer, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK honours HTTP_PROXY also for 127.0.0.1, and would hang; a notebook server may speak https there."""
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "intra.example")
    tuft_jupyter.init(address=server.address, api_key=KEY, report=told)
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "intra.example,127.0.0.1,localhost"
    tuft_jupyter.shutdown()
    assert os.environ["NO_PROXY"] == "intra.example"


def test_a_model_is_added_to_the_server_and_its_tokenizer_laid(
    hosted: StubServer, told: Told, tmp_path: Path
) -> None:
    """S0-14: a directory is served under its name."""
    (tmp_path / "tiny").mkdir()
    tuft_jupyter.init(tmp_path / "tiny", report=told)
    assert "tiny" in hosted.models
    assert told.of("connected").endswith("base model tiny")
    from tuft_jupyter.kernel import tokenizers

    assert (tokenizers.cache_dir() / "models--tiny" / "refs" / "main").exists()


def test_a_model_that_cannot_be_loaded_is_an_error_with_the_reason(hosted: StubServer, told: Told) -> None:
    hosted.states["tuft/demo"] = {"state": "failed", "detail": "out of memory"}
    with pytest.raises(TuftConnectionError, match=r"tuft/demo cannot be loaded: out of memory"):
        tuft_jupyter.init("tuft/demo", report=told)
    assert not tuft_jupyter.is_initialized()


def test_loading_is_waited_for_and_told(hosted: StubServer, told: Told) -> None:
    hosted.states["tuft/demo"] = {"state": "loading", "detail": "reading weights"}
    polled = hosted.routes["GET /tuft/status"]

    def status(query: dict[str, Any]) -> tuple[int, Any]:
        answer = polled(query)
        hosted.states["tuft/demo"] = {"state": "ready"}
        return answer

    hosted.routes["GET /tuft/status"] = status
    tuft_jupyter.init("tuft/demo", report=told)
    assert "reading weights" in told.of("model")


def test_a_found_server_that_cannot_serve_the_model_says_so(hosted: StubServer, told: Told) -> None:
    hosted.routes["POST /tuft/models"] = lambda _: (403, {"detail": "only the owner may add models"})
    with pytest.raises(TuftConnectionError) as caught:
        tuft_jupyter.init("acme/other", report=told)
    for part in (hosted.address, "acme/other", "only the owner may add models", "It offers: tuft/demo"):
        assert part in str(caught.value)
    tuft_jupyter.init("tuft/demo", report=told)
    assert tuft_jupyter.is_initialized(), "what is offered anyway needs no permission"


def test_a_server_without_a_tokenizer_still_connects(hosted: StubServer, told: Told) -> None:
    hosted.routes["GET /tuft/tokenizer"] = lambda _: (400, {"detail": "this model has no tokenizer"})
    tuft_jupyter.init(report=told)
    assert "no tokenizer for tuft/demo: this model has no tokenizer" in told.of("note")


def test_a_tinker_server_of_another_make_is_used_as_it_is(hosted: StubServer, told: Told) -> None:
    for route in ("GET /tuft/status", "POST /tuft/models", "GET /tuft/tokenizer"):
        del hosted.routes[route]
    tuft_jupyter.init("tuft/demo", report=told)
    connection = connect.current()
    assert connection is not None
    assert "tells no more" in repr(connection.table())


def test_a_server_of_our_own_that_is_busy_is_not_ended(
    hosted: StubServer, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S0-45: what runs there would be lost with it; a server whose process ended is let go at once."""
    tuft_jupyter.init(report=told)
    connection = connect.current()
    assert connection is not None
    process = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    )
    connection.server = launch.OwnedServer(
        hosted.address, process, os.open(os.devnull, os.O_RDONLY), Path("/x")
    )
    monkeypatch.setattr(connect, "PROBE_SECONDS", 0.1)
    healthy = hosted.routes["GET /healthz"]
    hosted.routes["GET /healthz"] = lambda query: (time.sleep(0.5), healthy(query))[1]
    tuft_jupyter.init(report=told)
    assert connect.current() is connection
    process.kill()
    process.wait()
    tuft_jupyter.init(report=told)
    assert connect.current() is not connection
    assert f"{hosted.address} no longer answers" in told.of("note")


def test_init_is_idempotent(hosted: StubServer, told: Told) -> None:
    """X12, S0-45, S0-46: a second call is harmless; ignore_reinit_error=False makes it an error."""
    tuft_jupyter.init(report=told)
    connection = connect.current()
    tuft_jupyter.init(report=told)
    tuft_jupyter.init("tuft/demo", ignore_reinit_error=True, report=told)
    assert connect.current() is connection
    with pytest.raises(RuntimeError, match="already initialized"):
        tuft_jupyter.init(ignore_reinit_error=False, report=told)


def test_another_address_needs_a_shutdown_first(hosted: StubServer, other: StubServer, told: Told) -> None:
    tuft_jupyter.init(report=told)
    tuft_jupyter.init(address=hosted.address + "/", report=told)
    with pytest.raises(TuftConnectionError, match=f"%tuft shutdown.*{other.address}"):
        tuft_jupyter.init(address=other.address, report=told)


def test_twenty_threads_make_one_connection(hosted: StubServer, told: Told) -> None:
    """S0-45: thread-safe."""
    seen: list[Any] = []

    def run() -> None:
        tuft_jupyter.init(report=told)
        seen.append(connect.current())

    threads = [threading.Thread(target=run) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 20
    assert len({id(connection) for connection in seen}) == 1


def test_a_second_call_that_asks_for_something_else_says_so(
    hosted: StubServer, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another key is refused, another configuration is named as unused; the connection stays as it is."""
    tuft_jupyter.init("tuft/demo", report=told)
    (tmp_path / "other.yaml").write_text("port: 1\n")
    tuft_jupyter.init(config=tmp_path / "other.yaml", report=told)
    assert "other.yaml is not used" in told.of("note")
    with pytest.raises(RuntimeError, match="Config file not found"):
        tuft_jupyter.init(config=tmp_path / "missing.yaml", report=told)
    with pytest.raises(RuntimeError, match="another key"):
        tuft_jupyter.init(api_key="tml-another", report=told)
    monkeypatch.setenv("TUFT_API_KEY", "tml-another")
    with pytest.raises(RuntimeError, match=r"another key; `%tuft shutdown` first"):
        tuft_jupyter.init(report=told)
    assert tuft_jupyter.is_initialized()


def test_after_a_failure_init_can_be_called_again(server: StubServer, dead: str, told: Told) -> None:
    """S0-45: failing then succeeding; a failure leaves the environment as it was."""
    with pytest.raises(TuftConnectionError):
        tuft_jupyter.init(address=dead, report=told)
    assert not any(name in os.environ for name in INJECTED)
    tuft_jupyter.init(address=server.address, api_key=KEY, report=told)
    assert tuft_jupyter.is_initialized()


def test_a_server_that_went_away_is_looked_for_again(
    server: StubServer, other: StubServer, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUFT_API_KEY", KEY)
    tuft_jupyter.init(address=server.address, report=told)
    del server.routes["GET /healthz"]
    monkeypatch.setattr(discovery, "DEFAULT_PORT", other.port)
    tuft_jupyter.init(report=told)
    connection = connect.current()
    assert connection is not None
    assert connection.address == other.address
    assert "no longer answers" in told.of("note")


def test_shutdown_is_safe_at_any_time(hosted: StubServer, told: Told) -> None:
    """S0-16, S0-44: without init, and twice; a found server goes on."""
    tuft_jupyter.shutdown()
    tuft_jupyter.init(report=told)
    tuft_jupyter.shutdown()
    tuft_jupyter.shutdown()
    assert not tuft_jupyter.is_initialized()
    assert discovery.check(hosted.address, KEY) == ["tuft/demo"]


def test_with_nothing_to_start_from_the_guidance_names_every_way(told: Told) -> None:
    """S0-32."""
    with pytest.raises(RuntimeError) as caught:
        tuft_jupyter.init(report=told)
    ways = (
        "address=",
        "model=",
        "config=",
        "TUFT_ADDRESS",
        "TUFT_MODEL_PATH",
        "TUFT_CONFIG",
        "tuft_config.yaml",
    )
    assert [way for way in ways if way not in str(caught.value)] == []


def test_a_missing_config_file_is_an_error_whatever_runs(hosted: StubServer, told: Told) -> None:
    """S0-18."""
    with pytest.raises(RuntimeError, match=r"Config file not found: /no/such\.yaml"):
        tuft_jupyter.init(config="/no/such.yaml", report=told)


def test_a_config_beside_a_running_server_is_said_to_be_unused(
    hosted: StubServer, told: Told, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("supported_models: [{model_name: a}]")
    tuft_jupyter.init(config=path, report=told)
    assert "is not used, because a server is running already" in told.of("note")


def test_a_key_the_sdk_would_refuse_is_refused_here(server: StubServer, told: Told) -> None:
    """X2: the server takes any configured key, the SDK only tml- keys."""
    server.key = "local-dev-key"
    with pytest.raises(TuftConnectionError, match="begin with tml-"):
        tuft_jupyter.init(address=server.address, api_key="local-dev-key", report=told)


def test_auto_connect_can_be_switched_off(
    server: StubServer, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S0-37."""
    monkeypatch.setenv("TUFT_ENABLE_AUTO_CONNECT", "0")
    with pytest.raises(RuntimeError, match=r"auto-connect is disabled \(TUFT_ENABLE_AUTO_CONNECT=0\)"):
        tuft_jupyter.get_service_client()
    tuft_jupyter.init(address=server.address, api_key=KEY, report=told)
    assert tuft_jupyter.is_initialized(), "what is asked for explicitly still works"


class FakeSdk:
    """The part of the SDK's surface that the kernel side touches."""

    def __init__(self, **given: Any) -> None:
        self.given = given
        self.asked: dict[str, Any] = {}

    def create_lora_training_client(self, **asked: Any) -> FakeSdk:
        self.asked = asked
        return self


@pytest.fixture
def sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    module = types.ModuleType("tinker")
    module.ServiceClient = FakeSdk  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tinker", module)


@pytest.mark.usefixtures("sdk")
def test_the_service_client_connects_by_itself_and_is_one(hosted: StubServer) -> None:
    """S0-19b: the first call inits, the second returns the same object."""
    client = tuft_jupyter.get_service_client()
    assert client.given == {"base_url": hosted.address, "api_key": KEY}
    assert tuft_jupyter.get_service_client() is client


@pytest.mark.usefixtures("sdk")
def test_the_client_is_of_the_address_that_was_given(
    server: StubServer, other: StubServer, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S0-20: TUFT_ADDRESS names another."""
    monkeypatch.setenv("TUFT_ADDRESS", other.address)
    tuft_jupyter.init(address=server.address, api_key=KEY, report=told)
    assert tuft_jupyter.get_service_client().given["base_url"] == server.address
    assert other.asked == []


@pytest.mark.usefixtures("sdk")
def test_a_training_client_takes_a_name_or_a_directory(
    hosted: StubServer, told: Told, tmp_path: Path
) -> None:
    """S0-15: both ``tiny`` and ``/abs/tiny`` give a client; without a name, the model of init."""
    (tmp_path / "tiny").mkdir()
    tuft_jupyter.init(tmp_path / "tiny", report=told)
    for base_model in ("tiny", str(tmp_path / "tiny"), None):
        training = tuft_jupyter.create_training_client(base_model=base_model, rank=8, seed=1)
        assert training.asked == {"base_model": "tiny", "rank": 8, "seed": 1}
    assert tuft_jupyter.create_training_client("tuft/demo").asked == {"base_model": "tuft/demo"}


def test_without_the_sdk_the_error_says_what_to_install(
    hosted: StubServer, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tinker", None)
    tuft_jupyter.init(report=told)
    with pytest.raises(TuftConnectionError, match=r"%pip install \"tinker>="):
        tuft_jupyter.get_service_client()


def test_importing_the_package_imports_nothing_heavy() -> None:
    """S1-04: no torch, ray, tornado, transformers, tinker or IPython."""
    heavy = "torch ray tornado transformers tinker vllm numpy IPython jupyter_server huggingface_hub".split()
    script = f"import tuft_jupyter, sys; print([m for m in {heavy} if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_exported_is_what_is_promised() -> None:
    assert set(tuft_jupyter.__all__) == {
        "PersistenceConfig", "__version__", "create_training_client", "get_service_client", "init",
        "is_initialized", "launch_server", "resume", "runs", "shutdown",
    }  # fmt: skip
    assert all(hasattr(tuft_jupyter, name) for name in tuft_jupyter.__all__)
