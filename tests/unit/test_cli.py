"""The tuft command: its spellings, its exit codes, and what it hands to the server."""

from __future__ import annotations

import asyncio
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import tuft_jupyter
from tests.support.server_configs import EXAMPLE
from tuft_jupyter import cli
from tuft_jupyter._version import __version__
from tuft_jupyter.config import ConfigError, PersistenceConfig, Settings
from tuft_jupyter_server.host import open_journal

MODELS = "supported_models: [{model_name: a}]\nport: 1\ncheckpoint_dir: from-file\n"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "TUFT_CONFIG",
        "TUFT_MODEL_PATH",
        "TUFT_ADDRESS",
        "TINKER_BASE_URL",
        "TUFT_PORT",
        "TUFT_HOST",
        "JUPYTERHUB_USER",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TUFT_HOME", str(tmp_path / "home"))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What the daemon was asked to serve; the daemon itself has its own tests."""
    asked: list[Settings] = []
    module: Any = types.ModuleType("tuft_jupyter_server.daemon")
    module.serve = asked.append
    monkeypatch.setitem(sys.modules, "tuft_jupyter_server.daemon", module)
    return asked


@pytest.fixture
def models(tmp_path: Path) -> str:
    path = tmp_path / "models.yaml"
    path.write_text(MODELS)
    return str(path)


def test_the_readme_s_command_line_works_as_written(
    served: list[Settings], models: str, tmp_path: Path
) -> None:
    """X1, S1-12, S1-13, S1-14, S1-27: the legacy form; flags win over the file; a missing directory is made."""
    target = tmp_path / "new" / "checkpoints"
    arguments = ["--port", "8080", "--checkpoint-dir", str(target), "--model-config", models]
    assert cli.main(arguments) == 0
    assert (served[0].port, served[0].checkpoint_dir) == (8080, target)
    assert [m.model_name for m in served[0].supported_models] == ["a"]
    assert target.is_dir()


def test_the_legacy_form_without_a_model_file_is_refused(
    served: list[Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    """S1-14: exit code 2 and the seed's message."""
    assert cli.main(["--port", "8080", "--checkpoint-dir", "d"]) == 2
    assert "Model configuration file must be provided via --model-config" in capsys.readouterr().err
    assert served == []


@pytest.mark.parametrize(
    "form", [["launch", "--config"], ["launch", "-c"], ["--config"], ["launch", "--model-config"]]
)
def test_a_daemon_is_launched_in_every_spelling(form: list[str], served: list[Settings], models: str) -> None:
    """S0-02."""
    assert cli.main([*form, models]) == 0
    assert served[0].port == 1


def test_flags_reach_the_server(served: list[Settings], models: str) -> None:
    """X1, S1-15: --host, --log-level; the defaults are the file's and the daemon's own."""
    cli.main(["launch", "-c", models, "-p", "7", "--host", "10.0.0.1", "--log-level", "debug"])
    assert (served[0].host, served[0].port, served[0].log_level) == ("10.0.0.1", 7, "debug")
    cli.main(["launch"])
    assert (served[1].host, served[1].port, served[1].log_level) == ("127.0.0.1", 10610, "info")


def test_the_ray_namespace_and_a_level_in_capitals_are_flags_too(
    served: list[Settings], models: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S2-21, S2-22: the default is tuft_cluster; on a Hub each user has one; DEBUG is debug."""
    cli.main(["-c", models, "--namespace", "mine", "--log-level", "DEBUG"])
    assert (served[0].ray_namespace, served[0].log_level) == ("mine", "debug")
    cli.main(["-c", models])
    monkeypatch.setenv("JUPYTERHUB_USER", "ada")
    cli.main(["-c", models])
    assert [settings.ray_namespace for settings in served[1:]] == ["tuft_cluster", "tuft_cluster:ada"]


def test_a_server_is_launched_from_python_and_never_in_a_notebook(
    served: list[Settings], models: str
) -> None:
    """S2-17: the file, and what goes before it; in a running event loop it would block for good."""
    tuft_jupyter.launch_server(config_path=models, namespace="mine", log_level="DEBUG")
    assert (served[0].port, served[0].ray_namespace, served[0].log_level) == (1, "mine", "debug")

    async def cell() -> None:
        tuft_jupyter.launch_server(config_path=models)

    with pytest.raises(RuntimeError, match="launch_server blocks"):
        asyncio.run(cell())
    assert len(served) == 1


def test_a_configuration_is_checked_without_a_server(
    served: list[Settings], models: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """S2-24, S2-25: exit 0 and what would be served; a misspelt key is exit 1 and its name; no file is exit 2."""
    assert cli.main(["check-config", str(EXAMPLE)]) == 0
    out = capsys.readouterr().out
    for part in (
        "127.0.0.1:8000",
        "tuft/demo: Qwen3ForCausalLM",
        "1 process on the CPU, sequences of up to 1024",
    ):
        assert part in out
    assert "application   sampler-demo (sampler, SamplerManagement) at /api/v1/sampler/tuft/demo" in out
    assert "note          proxy_location has no effect here" in out
    assert cli.main(["check-config", models]) == 0
    assert "base model    a: NOT ON THIS MACHINE." in capsys.readouterr().out
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(EXAMPLE.read_text().replace("use_megatron", "use_megatorn"))
    assert cli.main(["check-config", str(wrong)]) == 1
    told = "unknown key 'applications[1].args.use_megatorn'; did you mean 'use_megatron'?"
    assert told in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main(["check-config"])
    assert ended.value.code == 2
    assert served == []


@pytest.mark.parametrize(
    ("section", "training", "sampling"),
    [
        ("{}", "1 process on 1 GPU,", "1 process on 1 GPU"),
        (
            "{training_num_nodes: 2, training_num_gpus_per_node: 2, inference_num_gpus: 8}",
            "4 processes on 4 GPUs,",
            "1 process on 8 GPUs",
        ),
        ("{mode: debug_train_only}", "1 process on 1 GPU,", "none: placement.mode is debug_train_only"),
        (
            "{mode: debug_inference_only}",
            "none: placement.mode is debug_inference_only",
            "1 process on 1 GPU",
        ),
    ],
)
def test_check_config_counts_what_the_placement_asks_for(
    section: str, training: str, sampling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "placed.yaml"
    file.write_text(f"supported_models: [{{model_name: tuft/demo}}]\nplacement: {section}\n")
    assert cli.main(["check-config", str(file)]) == 0
    shown = capsys.readouterr().out
    assert f"    training    {training}" in shown
    assert re.search(rf"    sampling    (auto, )?{sampling}$", shown, re.MULTILINE)


def test_launch_takes_the_default_file(
    served: list[Settings], models: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUFT_CONFIG", models)
    cli.main(["launch"])
    assert served[0].file == Path(models)


def test_a_wrong_file_is_a_sentence_and_exit_code_1(
    served: list[Settings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """S1-22: non-zero exit with the reason."""
    path = tmp_path / "bad.yaml"
    path.write_text("supported_model: []")
    assert cli.main(["launch", "--config", str(path)]) == 1
    assert "did you mean 'supported_models'" in capsys.readouterr().err
    assert served == []


def test_a_directory_that_cannot_be_made_is_told_by_its_setting(
    served: list[Settings], models: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["launch", "--config", models, "--checkpoint-dir", f"{models}/below-a-file"]) == 1
    assert "checkpoint_dir: " in capsys.readouterr().err
    assert served == []


def test_a_journal_that_cannot_be_a_file_is_told_by_its_setting(tmp_path: Path) -> None:
    kept = PersistenceConfig.from_file_redis(tmp_path)
    with pytest.raises(ConfigError, match=r"persistence\.file_path: .* cannot be used \(Is a directory\)"):
        open_journal(Settings(home=tmp_path, checkpoint_dir=tmp_path, persistence=kept))


def test_a_port_in_use_is_a_sentence(
    models: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module: Any = types.ModuleType("tuft_jupyter_server.daemon")

    def serve(settings: Settings) -> None:
        raise OSError(f"port {settings.port} cannot be used")

    module.serve = serve
    monkeypatch.setitem(sys.modules, "tuft_jupyter_server.daemon", module)
    assert cli.main(["launch", "--config", models]) == 1
    assert capsys.readouterr().err == "tuft: port 1 cannot be used\n"


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    """S1-15: --help lists the options of the daemon."""
    for arguments in ([], ["--help"], ["launch", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
    out = capsys.readouterr().out
    for word in ("launch", "status", "doctor", "config", "--host", "--port", "--log-level", __version__):
        assert word in out


def test_config_shows_what_would_be_generated(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--show", "tuft/demo"]) == 0
    out = capsys.readouterr().out
    assert "model_name: tuft/demo" in out
    assert "tml-" not in out
