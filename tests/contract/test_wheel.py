"""What somebody gets who installs the wheel: everything that runs, and neither Node nor torch.

The wheel is built from this tree and installed into an environment of its own, with ordinary pip.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.parser import Parser
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tuft_jupyter import __version__

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def call(command: Sequence[str | Path], **environment: str) -> str:
    """Run ``command`` and return all that it said; fail with it if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def interpreter(version: str) -> Path | None:
    """A Python of that version: on the PATH or kept by pyenv."""
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for found in (shutil.which(f"python{version}"), *kept.glob(f"{version}.*/bin/python")):
        if found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0:
            return Path(found)
    return None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT])
    (built,) = folder.glob("*.whl")
    return built


class Installed:
    """A fresh environment with the wheel in it, and a PATH on which there is no Node."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.bin = folder / "bin"
        call([sys.executable, "-m", "venv", "--without-pip", folder])
        self.pip("install", "--quiet", wheel)

    def pip(self, *words: str | Path) -> str:
        return call([sys.executable, "-m", "pip", "--python", self.bin / "python", *words])

    def run(self, *words: str) -> str:
        """Run a program of the environment, with nothing else on PATH and no configuration of this machine."""
        return call([self.bin / words[0], *words[1:]], **self.environment(self.bin.parent / "home"))

    def environment(self, home: Path) -> dict[str, str]:
        return {"PATH": str(self.bin), "HOME": str(home), "JUPYTER_CONFIG_DIR": str(home / "config")}

    @contextmanager
    def server(self, work: Path) -> Iterator[Callable[[str], Any]]:
        """A notebook server of the environment; yields how to GET a path of it with both kinds of key."""
        names = {"TUFT_HOME": str(work / "tuft"), "JUPYTER_RUNTIME_DIR": str(work), "JUPYTER_TOKEN": "t"}
        command = [self.bin / "jupyter", "server", "--no-browser", "--ip=127.0.0.1", "--port=0"]
        command += ["--allow-root", f"--ServerApp.root_dir={work}"]
        with (work / "log").open("wb") as log:
            process = subprocess.Popen(
                command,
                env=self.environment(work) | names | {"TUFT_API_KEY": "tml-t"},
                stdout=log,
                stderr=log,
            )
        try:
            yield partial(ask, work / f"jpserver-{process.pid}.json", process, work / "log")
        finally:
            process.terminate()
            process.wait(30)


def ask(runtime_file: Path, process: subprocess.Popen[bytes], log: Path, path: str) -> Any:
    """GET a path as JSON, as soon as the server listens: it writes its runtime file a moment before, bit by bit."""
    key = {"X-API-Key": "tml-t", "Authorization": "token t"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        assert process.poll() is None, log.read_text()
        try:
            address = f"{json.loads(runtime_file.read_text())['url']}{path}"
            with opener.open(urllib.request.Request(address, headers=key), timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError:
            raise
        except (OSError, json.JSONDecodeError):
            time.sleep(0.05)
        else:
            return json.loads(text)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("environment"), wheel)


def test_the_wheel_carries_everything_that_runs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    data = f"tuft_jupyter-{__version__}.data/data"
    extension = f"{data}/share/jupyter/labextensions/tuft-jupyter"
    for name in (
        "tuft_jupyter/core/service.py",
        "tuft_jupyter_server/app.py",
        "tuft_jupyter/demo/model.safetensors",
        "tuft_jupyter/demo/tokenizer.json",
        f"{data}/etc/jupyter/jupyter_server_config.d/tuft_jupyter.json",
        f"{data}/etc/ipython/ipython_config.json",
        f"{extension}/package.json",
        f"{extension}/install.json",
        f"{extension}/schemas/tuft-jupyter/panel.json",
        f"{extension}/static/style.js",
    ):
        assert name in names
    strangers = {name.split("/")[0] for name in names}
    assert strangers == {
        "tuft_jupyter",
        "tuft_jupyter_server",
        f"tuft_jupyter-{__version__}.data",
        f"tuft_jupyter-{__version__}.dist-info",
    }
    assert not [name for name in names if name.startswith("tuft_jupyter/labextension/")]


def test_the_metadata_names_the_extras_and_the_commands(wheel: Path) -> None:
    """S1-09: the extras have the names that TuFT's users know."""
    info = f"tuft_jupyter-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "backend",
        "dev",
        "hub",
        "otel",
        "persistence",
        "tensorboard",
        "vllm",
    }
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "tuft = tuft_jupyter.cli:main" in scripts
    assert "jupyter-tuft = tuft_jupyter.cli:main" in scripts


def test_front_and_back_have_one_version() -> None:
    assert json.loads((ROOT / "package.json").read_text())["version"] == __version__
    assert f"VERSION = '{__version__}'" in (ROOT / "labextension" / "src" / "tokens.ts").read_text()


def test_a_base_install_is_small_and_without_torch(installed: Installed) -> None:
    """S1-04: the base install has no torch, ray or vllm, and stays below 300 MB."""
    packages = {line.split("==")[0].lower() for line in installed.pip("freeze").splitlines()}
    assert not packages & {"torch", "ray", "vllm", "transformers", "peft"}
    size = sum(f.lstat().st_size for f in installed.bin.parent.rglob("*") if f.is_file())
    assert size < 300e6, size
    loaded = installed.run(
        "python", "-c", "import sys, tuft_jupyter; print('torch' in sys.modules, 'ray' in sys.modules)"
    )
    assert loaded.split() == ["False", "False"]


def test_a_base_install_serves_and_says_what_is_missing(installed: Installed, tmp_path: Path) -> None:
    """S1-04: the server starts without a backend, answers healthz and capabilities, and tells the panel what to
    install."""
    with installed.server(tmp_path) as ask:
        assert ask("tuft/api/v1/healthz")["status"] == "ok"
        offered = ask("tuft/api/v1/get_server_capabilities")["supported_models"]
        assert [model["model_name"] for model in offered] == ["tuft/demo"]
        backend = ask("tuft/lab/state")["status"]["backend"]
    assert not backend["installed"]
    assert 'pip install "tuft-jupyter[backend]"' in backend["detail"]


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_uv_installs_it_on_newer_pythons(version: str, wheel: Path, tmp_path: Path) -> None:
    """S1-03: `uv venv --python 3.12`, `uv pip install`, and the server extension is on."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version} on this machine")
    uv = [sys.executable, "-m", "uv", "--quiet", "--offline"]
    call([*uv, "venv", "--python", python, tmp_path / "environment"])
    bin_ = tmp_path / "environment" / "bin"
    call([*uv[:-1], "pip", "install", "--python", bin_ / "python", wheel])
    listing = call([bin_ / "jupyter", "server", "extension", "list"], HOME=str(tmp_path), JUPYTER_PATH="")
    assert f"tuft_jupyter {__version__} OK" in listing.replace("\x1b[32m", "").replace("\x1b[0m", "")
    assert "tuft launch" in call([bin_ / "tuft", "--help"], PYTHONPATH="")


def test_all_extras_fit_together(tmp_path: Path) -> None:
    """S1-05, S1-06: one environment can hold the backend, vLLM, Redis and what developers need."""
    chosen = [word for extra in ("backend", "vllm", "persistence", "dev") for word in ("--extra", extra)]
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--python-version", "3.12"]
    call([*command, ROOT / "pyproject.toml", *chosen, "--output-file", tmp_path / "locked.txt"])
    locked = {line.split("==")[0] for line in (tmp_path / "locked.txt").read_text().splitlines()}
    assert {"torch", "transformers", "peft", "ray", "vllm", "redis", "pytest"} <= locked


def test_installing_the_wheel_enables_the_server_extension(installed: Installed) -> None:
    """S0-04: nothing is enabled by hand."""
    listing = installed.run("jupyter", "server", "extension", "list")
    plain = listing.replace("\x1b[32m", "").replace("\x1b[0m", "")
    assert "tuft_jupyter enabled" in plain
    assert f"tuft_jupyter {__version__} OK" in plain


def test_the_magic_is_there_without_loading_an_extension(installed: Installed) -> None:
    """S0-03: the first line of a notebook may be `%tuft init`; what IPython reads at its start names no module that
    is imported before that."""
    said = installed.run("ipython", "-c", "import sys; print('tuft_jupyter' in sys.modules)\n%tuft doctor")
    assert "False\n" in said, said
    assert f"tuft-jupyter      {__version__}" in said


def test_the_panel_needs_no_node(installed: Installed) -> None:
    """S1-10: the wheel brings the built lab extension."""
    installed.pip("install", "--quiet", "--no-compile", "jupyterlab>=4.4,<5")
    assert not (installed.bin / "node").exists()
    listing = installed.run("jupyter", "labextension", "list")
    plain = listing.replace("\x1b[32m", "").replace("\x1b[0m", "")
    assert f"tuft-jupyter v{__version__} enabled OK" in plain
