"""What the doctor sees, and how it says that something needs a hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tuft_jupyter.config import load_settings
from tuft_jupyter.kernel import doctor


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"TUFT_HOME": str(tmp_path / "home")}


def test_small_shared_memory_is_warned_about() -> None:
    """S1-26: Ray and vLLM need more than a container's 64 MB."""
    assert doctor.shared_memory(lambda _: (64 * 2**20, 0, 0)).startswith("! 0.1 GiB")
    assert "--shm-size" in doctor.shared_memory(lambda _: (64 * 2**20, 0, 0))
    assert doctor.shared_memory(lambda _: (8 * 2**30, 0, 0)) == "8.0 GiB"


def test_another_interpreter_is_asked_for_its_versions() -> None:
    """S1-08: the kernel's environment is not the server's."""
    text = doctor.ask(sys.executable)
    assert sys.executable in text
    assert "tinker" in text
    assert doctor.ask("/no/such/python").startswith("! /no/such/python does not run")


def test_a_missing_backend_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("torch", "ray") else "1")
    assert doctor.backend() == '! lacks torch, ray: pip install "tuft-jupyter[backend]"'
    monkeypatch.setattr(doctor, "_version", lambda name: "1")
    assert doctor.backend().startswith("torch 1")


def test_the_journal_is_said_and_its_absence_warned_about(env: dict[str, str], tmp_path: Path) -> None:
    rows = dict(doctor.findings(env))
    assert rows["journal"] == f"{tmp_path / 'home' / 'journal.sqlite'} (SQLite)"
    assert rows["models"] == "tuft/demo on demand"
    path = tmp_path / "c.yaml"
    path.write_text("supported_models: [{model_name: a}]")
    rows = dict(doctor.findings(env | {"TUFT_CONFIG": str(path)}))
    assert rows["journal"].startswith("! in memory only")
    assert rows["models"] == "a"


def test_a_broken_configuration_is_a_finding_not_a_failure(env: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("suported_models: []")
    rows = dict(doctor.findings(env | {"TUFT_CONFIG": str(path)}))
    assert "did you mean 'supported_models'" in rows["configuration"]


def test_no_key_is_shown(env: dict[str, str]) -> None:
    shown = str(doctor.findings(env | {"TUFT_API_KEY": "tml-secret"})) + doctor.shown_config(None, env)
    assert "tml-" not in shown


def test_the_sampler_is_said_with_the_reason(
    tmp_path: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """S2-51: what was derived, and why; a sampler that cannot be had names the extra."""
    settings = load_settings(None, env)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert doctor.sampler(settings, tmp_path) == "torch (vLLM is not installed)"
    asked = load_settings(None, env | {"TUFT_SAMPLER_TYPE": "vllm"})
    assert doctor.sampler(asked, tmp_path).startswith("! vllm is asked for but not installed: pip install")
    monkeypatch.setattr(doctor, "_version", lambda name: "0.33.0")
    assert doctor.sampler(settings, tmp_path) == "torch (there is no GPU)"
    (tmp_path / "0000:01:00.0").mkdir()
    assert doctor.sampler(settings, tmp_path) == "vllm (vLLM is installed, and there is a GPU)"


@pytest.mark.parametrize(
    ("backends", "said"),
    [
        ({"sampling": "external"}, "a vLLM server at http://127.0.0.1:8000"),
        ({"training": "external"}, "the training server at http://localhost:5000"),
        ({"training": "none"}, "none: this server does not sample"),
        ({"sampling": "none"}, "none: this server does not sample"),
    ],
)
def test_who_samples_elsewhere_and_that_nobody_does_is_said(
    backends: dict[str, str], said: str, env: dict[str, str]
) -> None:
    assert doctor.sampler(load_settings(None, env, {"backends": backends})).startswith(said)


def test_a_shown_configuration_says_when_its_model_is_not_there(env: dict[str, str], tmp_path: Path) -> None:
    """S0-29: with the context length of a model that is."""
    assert doctor.shown_config("/no/such", env).startswith(
        "# There is no directory /no/such on this machine.\n"
    )
    assert doctor.shown_config(str(tmp_path), env).startswith("checkpoint_dir:")
    assert "max_model_len: 2048" in doctor.shown_config("tuft/demo", env)


def test_a_kernel_s_sdk_and_package_of_another_time_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """S1-08: what needs a hand begins with an exclamation mark and ends with the command."""
    odd = doctor.ASK.replace("version(name) for", "{'tinker': '0.1.0', 'tuft-jupyter': '9.9'}.get(name) for")
    monkeypatch.setattr(doctor, "ASK", odd)
    text = doctor.ask(sys.executable)
    assert text.startswith("! ")
    for part in ("tinker 0.1.0 is too old", "it has tuft-jupyter 9.9", "pip install --upgrade tuft-jupyter"):
        assert part in text
    monkeypatch.setattr(doctor, "ASK", doctor.ASK.replace("'tinker': '0.1.0', ", ""))
    assert "lacks tinker: " in doctor.ask(sys.executable)
    assert '-m pip install tuft-jupyter "tinker>=' in doctor.ask(sys.executable)
