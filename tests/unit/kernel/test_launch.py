"""From what a server is started, and where it listens."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import yaml

from tuft_jupyter import home as homes
from tuft_jupyter.kernel import launch
from tuft_jupyter.kernel.errors import TuftConnectionError
from tuft_jupyter.kernel.launch import choose_config, choose_port


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"TUFT_HOME": str(tmp_path / "home")}


def file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("supported_models: [{model_name: a}]")
    return path


def test_the_first_source_of_a_configuration_wins(env: dict[str, str], tmp_path: Path) -> None:
    """S0-27, S0-28, S0-30, S0-31, S0-35, S0-36: config=, TUFT_CONFIG, model=, TUFT_MODEL_PATH, the default file."""
    given, variable = file(tmp_path / "a.yaml"), file(tmp_path / "b.yaml")
    with pytest.raises(TuftConnectionError):
        choose_config(None, None, env)
    default = file(homes.default_config(homes.home_dir(env)))
    assert choose_config(None, None, env).path == default
    env["TUFT_MODEL_PATH"] = "tuft/demo"
    assert choose_config(None, None, env).words == "TUFT_MODEL_PATH"
    source = choose_config(None, "acme/m", env)
    assert (source.words, source.generated) == ("model=acme/m", True)
    env["TUFT_CONFIG"] = str(variable)
    assert choose_config(None, "acme/m", env).path == variable
    assert choose_config(given, "acme/m", env).path == given


def test_a_missing_tuft_config_is_told_and_passed_over(env: dict[str, str]) -> None:
    """S0-28: warn and skip."""
    notes: list[str] = []
    source = choose_config(None, "tuft/demo", env | {"TUFT_CONFIG": "/no/such.yaml"}, notes.append)
    assert source.generated
    assert notes == ["TUFT_CONFIG names /no/such.yaml, which does not exist; looking further"]


def test_a_generated_configuration_is_a_private_file(env: dict[str, str], tmp_path: Path) -> None:
    """S0-29, S0-34: it carries a key, so it is readable by its owner alone."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    path = choose_config(None, str(tmp_path / "tiny"), env).path
    assert path.stat().st_mode & 0o777 == 0o600
    document = yaml.safe_load(path.read_text())
    assert document["supported_models"][0]["max_model_len"] == 512
    assert document["persistence"]["mode"] == "file_redis"


def test_a_busy_port_that_was_asked_for_is_an_error_at_once() -> None:
    """S0-40: the error names the port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TuftConnectionError, match=f"Port {port} is in use"):
            choose_port("127.0.0.1", str(port))
    assert choose_port("127.0.0.1", str(port)) == port


def test_a_busy_default_port_is_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(launch, "DEFAULT_PORT", taken.getsockname()[1])
        assert choose_port("127.0.0.1", None) not in (0, launch.DEFAULT_PORT)
    assert choose_port("127.0.0.1", None) == launch.DEFAULT_PORT
    assert choose_port("127.0.0.1", "0") != 0


def test_a_port_that_is_none_is_refused() -> None:
    for text in ("http", "65536"):
        with pytest.raises(TuftConnectionError, match=f"TUFT_PORT must be a port number or 0, not '{text}'"):
            choose_port("127.0.0.1", text)


def test_the_end_of_a_log_is_shown_with_its_place(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("\n".join(f"line {n}" for n in range(100)))
    assert launch.tail(log, 2) == f"    line 98\n    line 99\nThe whole log: {log}"
    assert "(it is empty)" in launch.tail(tmp_path / "none.log")


def test_a_forked_child_lets_go_of_the_owner_s_pipe() -> None:
    """S0-42: a worker that a cell forked must not keep the server alive when the kernel is gone."""
    read_end, write_end = os.pipe()
    server = launch.OwnedServer("http://x", None, write_end, Path("/x"))  # type: ignore[arg-type]
    server.forget()
    assert os.read(read_end, 1) == b""
    server.stop()
    os.close(read_end)
