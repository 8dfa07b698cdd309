"""The section ``backends``: who trains and who samples, chosen independently, and where they are if they are elsewhere.

Beside our own keys it has its own environment variables (``USE_MEGATRON``, ``USE_VLLM``, ``VLLM_BASE_URL`` and so on),
which go before the file as all variables do. Values only: nobody is asked anything here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from tuft_jupyter.config.reader import ConfigError, Reader, at_least, web_address

TRAINING = ("peft", "external", "none")
SAMPLING = ("auto", "torch", "vllm", "external", "none")
TRAINING_URL = "http://localhost:5000"
VLLM_HOST, VLLM_PORT = "0.0.0.0", 8000
GROUP_PORT = 51216
ANY_HOST = ("0.0.0.0", "::")
"""Where a server listens on every address; a client cannot connect to them everywhere."""


class Backend(StrEnum):
    """Who does the work."""

    WORKERS = "workers"
    """our own, on Ray"""
    TRAINING_SERVER = "training server"
    """one that speaks the Tinker protocol, elsewhere"""
    VLLM_SERVER = "vLLM server"
    """one with vLLM's OpenAI-compatible API, elsewhere"""


@dataclass(frozen=True, slots=True)
class BackendsConfig:
    """``training``: ``peft`` (workers of ours), ``external`` (a server that speaks the Tinker protocol) or ``none``.

    ``sampling``: ``torch`` or ``vllm`` (workers of ours), ``external`` (a running vLLM server), ``none``, or ``auto``:
    where the training is, so ``sampler_type`` decides beside ``peft``, and an external training server samples too.
    """

    training: str = "peft"
    sampling: str = "auto"
    training_url: str = TRAINING_URL
    training_key: str = field(default="", repr=False)
    vllm_url: str = f"http://127.0.0.1:{VLLM_PORT}"
    vllm_key: str = field(default="", repr=False)
    vllm_group_port: int = GROUP_PORT
    """read and not used: adapters are handed over as files, no weights are pushed"""
    gpu_memory_utilization: float = 0.2
    """of each GPU's memory, for vLLM workers of ours that ``sampling: vllm`` asks for"""
    enable_lora: bool = True
    """whether vLLM may be asked for adapters"""
    max_loras: int = 4
    """adapters that vLLM is to hold at once"""
    max_lora_rank: int = 64
    """of adapters that vLLM is to sample from"""
    max_workers: int = 4
    """threads for what would hold up the event loop"""

    def __post_init__(self) -> None:
        for name, known in (("training", TRAINING), ("sampling", SAMPLING)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name in ("training_url", "vllm_url"):
            given = getattr(self, name)
            web_address(name, given)
            if not given:
                raise ConfigError(f"{name} must not be empty")
            if "@" in given:  # it is shown in errors and in the panel
                raise ConfigError(f"{name} must not hold a user or a password: give a key of its own")
            object.__setattr__(self, name, given.rstrip("/"))
        # what clients of OpenAI are given; vLLM's own routes (adapters, health) are beside it
        object.__setattr__(self, "vllm_url", self.vllm_url.removesuffix("/v1"))
        for name in ("max_loras", "max_lora_rank", "max_workers"):
            at_least(name, getattr(self, name), 1)
        if not 1 <= self.vllm_group_port <= 65535:
            raise ConfigError(f"vllm_group_port must be 1 to 65535, not {self.vllm_group_port}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization must be above 0 and at most 1, not {self.gpu_memory_utilization}"
            )

    @property
    def trainer(self) -> Backend | None:
        """Who trains; None: nobody."""
        return {"peft": Backend.WORKERS, "external": Backend.TRAINING_SERVER}.get(self.training)

    @property
    def sampler(self) -> Backend | None:
        """Who samples; None: nobody."""
        if self.sampling == "auto":
            return self.trainer
        workers = Backend.WORKERS
        return {"torch": workers, "vllm": workers, "external": Backend.VLLM_SERVER}.get(self.sampling)

    @property
    def on_vllm(self) -> bool:
        """Whether samples are to be drawn by a vLLM that this section describes."""
        return self.sampling in ("vllm", "external")


PLAIN = {
    "MEGATRON_SERVER_URL": "training_url",
    "MEGATRON_SERVER_KEY": "training_key",
    "VLLM_API_KEY": "vllm_key",
    "VLLM_GROUP_PORT": "vllm_group_port",
    "VLLM_GPU_MEMORY_UTIL": "gpu_memory_utilization",
    "VLLM_ENABLE_LORA": "enable_lora",
    "VLLM_MAX_LORAS": "max_loras",
    "VLLM_MAX_LORA_RANK": "max_lora_rank",
    "MAX_WORKERS": "max_workers",
}
"""Environment variables that are one key each."""


@dataclass(frozen=True, slots=True)
class _Flags:
    """Variables that several keys follow from, with the types their text must have."""

    USE_MEGATRON: bool = False
    USE_VLLM: bool = False
    VLLM_BASE_URL: str = ""
    VLLM_HOST: str = VLLM_HOST
    VLLM_PORT: int = VLLM_PORT


def from_environment(document: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, Any]:
    """The section's keys with the environment laid over them; ConfigError names the variable that is wrong.

    ``USE_VLLM=true`` without ``USE_MEGATRON=true`` is sampling only, unless the file says who trains.
    """
    section = dict(document)
    for variable, key in PLAIN.items():
        if env.get(variable):
            section |= _read(BackendsConfig, variable, key, env[variable])
    given: dict[str, Any] = {}
    for variable in ("USE_MEGATRON", "USE_VLLM", "VLLM_BASE_URL", "VLLM_HOST", "VLLM_PORT"):
        if env.get(variable):
            given |= _read(_Flags, variable, variable, env[variable])
    addressed = bool(given.keys() & {"VLLM_BASE_URL", "VLLM_HOST", "VLLM_PORT"})
    if addressed:
        section["vllm_url"] = _vllm_url(_Flags(**given))
    if "USE_MEGATRON" in given or "USE_VLLM" in given:
        section |= _chosen(section, given, external="vllm_url" in section)
    return section


def _chosen(section: Mapping[str, Any], given: Mapping[str, Any], *, external: bool) -> dict[str, str]:
    """Who trains and who samples, where one of the two flags says something."""
    training = section.get("training")
    if given.get("USE_MEGATRON"):
        training = "external"
    elif training is None:
        training = "none" if given.get("USE_VLLM") else "peft"
    elif training == "external" and "USE_MEGATRON" in given:
        training = "none"
    sampling = section.get("sampling", "auto")
    if given.get("USE_VLLM"):
        sampling = "external" if external else "vllm"
    elif "USE_VLLM" in given and sampling in ("auto", "vllm", "external"):
        sampling = "auto" if training == "external" else "torch"
    return {"training": training, "sampling": sampling}


def _vllm_url(flags: _Flags) -> str:
    if flags.VLLM_BASE_URL:
        return flags.VLLM_BASE_URL
    host = "127.0.0.1" if flags.VLLM_HOST in ANY_HOST else flags.VLLM_HOST
    return f"http://[{host}]:{flags.VLLM_PORT}" if ":" in host else f"http://{host}:{flags.VLLM_PORT}"


def _read(cls: type, variable: str, key: str, text: str) -> dict[str, Any]:
    source = f"environment variable {variable}"
    try:
        values: dict[str, Any] = Reader(source, Path.cwd(), text=True).read(cls, {key: text})
        cls(**values)
    except ConfigError as error:
        told = str(error)
        raise error if told.startswith(source) else ConfigError(f"{source}: {told}") from None
    return values
