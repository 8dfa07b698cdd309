"""The whole server in one file, in the form of Twinkle's server configuration: ``applications:``, each with its keys.

This is the notation only: every key with its type, its default and what it must fit; what the keys come to is
:mod:`~tuft_jupyter.config.translated`'s business. Each section checks itself when it is made, and an error names the
place: ``applications[1].args.device_mesh: dp_size 2 x tp_size 2 = 4 processes do not fit ranks 2``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tuft_jupyter.config.reader import ConfigError, Reader, at_least
from tuft_jupyter.config.sections import LOGPROBS_MODES, QueueSettings, check_sampler, one_of

PROXY_LOCATIONS = ("EveryNode", "HeadOnly", "Disabled")
DEVICES = ("cuda", "cpu")
BACKENDS = ("transformers", "megatron")


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """Where a daemon listens; None: as without the section."""

    host: str | None = None
    port: int | None = None


@dataclass(frozen=True, slots=True)
class AutoscalingConfig:
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float | None = None

    def __post_init__(self) -> None:
        for name in ("min_replicas", "max_replicas"):
            if getattr(self, name) != 1:
                raise ConfigError(
                    f"{name}: {getattr(self, name)} replicas are not supported, an application has one: set it to 1 "
                    "(what samples in several processes is device_mesh.dp_size of the sampler)"
                )


@dataclass(frozen=True, slots=True)
class RuntimeEnv:
    env_vars: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RayActorOptions:
    num_cpus: float | None = None
    num_gpus: float | None = None
    runtime_env: RuntimeEnv = field(default_factory=RuntimeEnv)

    def __post_init__(self) -> None:
        at_least("num_cpus", self.num_cpus, 0)
        at_least("num_gpus", self.num_gpus, 0)


@dataclass(frozen=True, slots=True)
class Deployment:
    """``name`` is a label."""

    name: str
    max_ongoing_requests: int | None = None
    autoscaling_config: AutoscalingConfig = field(default_factory=AutoscalingConfig)
    ray_actor_options: RayActorOptions = field(default_factory=RayActorOptions)

    def __post_init__(self) -> None:
        at_least("max_ongoing_requests", self.max_ongoing_requests, 1)


@dataclass(frozen=True, slots=True)
class DeviceGroup:
    """``ranks``: GPUs to reserve; on a CPU a label."""

    ranks: int
    name: str = ""
    device_type: str = "cuda"

    def __post_init__(self) -> None:
        at_least("ranks", self.ranks, 0)
        object.__setattr__(self, "device_type", _device(self.device_type))
        if self.device_type == "cuda" and not self.ranks:
            raise ConfigError(
                "ranks is 0, and device_type is cuda: give the number of GPUs, or device_type: CPU"
            )


@dataclass(frozen=True, slots=True)
class DeviceMesh:
    """How processes share the work: data, tensor, pipeline and expert parallel; dp_size None: by the group."""

    device_type: str = "cuda"
    dp_size: int | None = None
    tp_size: int = 1
    pp_size: int = 1
    ep_size: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "device_type", _device(self.device_type))
        for name in ("dp_size", "tp_size", "pp_size", "ep_size"):
            at_least(name, getattr(self, name), 1)

    def check(self, group: DeviceGroup | None) -> None:
        """ConfigError unless the mesh fits a group of devices."""
        if group is None:
            return
        if group.device_type != self.device_type:
            raise ConfigError(
                f"device_mesh: device_type {self.device_type} is not that of device_group, {group.device_type}"
            )
        sizes = {name: getattr(self, name) or 1 for name in ("dp_size", "tp_size", "pp_size")}
        processes = math.prod(sizes.values())
        if self.device_type == "cuda" and group.ranks % processes:
            said = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
            raise ConfigError(
                f"device_mesh: {said} = {processes} processes do not fit ranks {group.ranks} of device_group: "
                "ranks must be a multiple of them"
            )


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """In seconds; None: as for everything else on the server."""

    adapter_timeout: float | None = None
    adapter_max_lifetime: float | None = None

    def __post_init__(self) -> None:
        at_least("adapter_timeout", self.adapter_timeout, 0)
        at_least("adapter_max_lifetime", self.adapter_max_lifetime, 0)


@dataclass(frozen=True, slots=True)
class EngineArgs:
    """Of the sampler; the words are vLLM's."""

    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    enable_lora: bool = True
    logprobs_mode: str | None = None
    max_loras: int | None = None
    max_lora_rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_loras", "max_lora_rank"):
            at_least(name, getattr(self, name), 1)
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization must be above 0 and at most 1, not {share}")
        one_of("logprobs_mode", self.logprobs_mode, LOGPROBS_MODES)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    per_token_model_limit: int = 0
    supported_models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least("per_token_model_limit", self.per_token_model_limit, 0)


@dataclass(frozen=True, slots=True)
class ServerArgs:
    server_config: ServerConfig = field(default_factory=ServerConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicesOfOne:
    """What model and sampler have in common: a base model on a group of devices."""

    model_id: str
    nproc_per_node: int = 1
    device_group: DeviceGroup | None = None
    device_mesh: DeviceMesh | None = None
    queue_config: QueueSettings = field(default_factory=QueueSettings)

    def __post_init__(self) -> None:
        at_least("nproc_per_node", self.nproc_per_node, 1)
        if self.device_mesh is not None:
            self.device_mesh.check(self.device_group)

    @property
    def mesh(self) -> DeviceMesh:
        """The mesh as written, or the one that the group of devices stands for; ``dp_size`` is a number in it."""
        written, group = self.device_mesh, self.device_group
        device = written.device_type if written else group.device_type if group else "cuda"
        mesh = written or DeviceMesh(device)
        inner = mesh.tp_size * mesh.pp_size
        spread = group.ranks // inner if group is not None and group.device_type == "cuda" else 1
        return DeviceMesh(device, mesh.dp_size or spread, mesh.tp_size, mesh.pp_size, mesh.ep_size)

    @property
    def gpus(self) -> int | None:
        """GPUs to reserve; None: nothing is said of devices."""
        if self.device_group is None and self.device_mesh is None:
            return None
        if self.mesh.device_type == "cpu":
            return 0
        mesh = self.mesh
        return (
            self.device_group.ranks
            if self.device_group
            else (mesh.dp_size or 1) * mesh.tp_size * mesh.pp_size
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArgs(DevicesOfOne):
    """``use_megatron: true`` and ``backend: megatron`` are two spellings of one thing."""

    use_megatron: bool | None = None
    backend: str | None = None
    max_length: int | None = None
    adapter_config: AdapterConfig = field(default_factory=AdapterConfig)
    max_loras: int | None = None

    def __post_init__(self) -> None:
        DevicesOfOne.__post_init__(self)
        at_least("max_length", self.max_length, 1)
        at_least("max_loras", self.max_loras, 1)
        if self.backend is not None:
            object.__setattr__(self, "backend", self.backend.lower())
            one_of("backend", self.backend, BACKENDS)
        if self.use_megatron is not None:
            chosen = BACKENDS[self.use_megatron]
            if self.backend not in (None, chosen):
                raise ConfigError(
                    f"backend is {self.backend}, and use_megatron: {str(self.use_megatron).lower()} says {chosen}: "
                    "leave one of them out"
                )
            object.__setattr__(self, "backend", chosen)
        mesh = self.mesh
        for name in ("tp_size", "pp_size", "ep_size"):
            if self.backend != "megatron" and getattr(mesh, name) > 1:
                raise ConfigError(
                    f"device_mesh: {name} {getattr(mesh, name)} is not supported: the training worker shares its "
                    "batches over dp_size processes and keeps the model whole in each; set it to 1"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerArgs(DevicesOfOne):
    sampler_type: str = "auto"
    engine_args: EngineArgs = field(default_factory=EngineArgs)

    def __post_init__(self) -> None:
        DevicesOfOne.__post_init__(self)
        check_sampler(self.sampler_type)
        mesh = self.mesh
        for name in ("pp_size", "ep_size"):
            if getattr(mesh, name) > 1:
                raise ConfigError(
                    f"device_mesh: {name} {getattr(mesh, name)} is not supported: a sampler is spread with tp_size, "
                    "and made several with dp_size; set it to 1"
                )
        if self.sampler_type == "torch" and mesh.tp_size > 1:
            raise ConfigError(
                f"device_mesh: tp_size {mesh.tp_size} is not supported by sampler_type torch: choose vllm, or set it "
                "to 1"
            )


@dataclass(frozen=True, slots=True)
class ProcessorArgs:
    ncpu_proc_per_node: int = 1
    device_group: DeviceGroup | None = None
    device_mesh: DeviceMesh | None = None

    def __post_init__(self) -> None:
        at_least("ncpu_proc_per_node", self.ncpu_proc_per_node, 1)
        for name in ("device_group", "device_mesh"):
            device = getattr(self, name)
            if device is not None and device.device_type != "cpu":
                raise ConfigError(f"{name}.device_type must be CPU: a processor uses no GPU")


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """``name`` is a label; ``route_prefix`` "": that of Twinkle's own example."""

    import_path: str
    name: str
    route_prefix: str = ""
    deployments: tuple[Deployment, ...] = ()

    def __post_init__(self) -> None:
        prefix = self.route_prefix
        fits = prefix.startswith("/") and all(part for part in prefix[1:].split("/"))
        if prefix and not (
            fits and prefix.isascii() and prefix.isprintable() and not set(prefix) & set(" ?#%{}")
        ):
            raise ConfigError(f"route_prefix must be a path such as /api/v1/model/NAME, not {prefix!r}")
        if len(self.deployments) > 1:
            raise ConfigError(
                f"deployments[1]: an application has one deployment, not {len(self.deployments)}"
            )

    @property
    def deployment(self) -> Deployment:
        return self.deployments[0] if self.deployments else Deployment(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerApplication(Application):
    args: ServerArgs = field(default_factory=ServerArgs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelApplication(Application):
    args: ModelArgs


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerApplication(Application):
    args: SamplerArgs


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorApplication(Application):
    args: ProcessorArgs = field(default_factory=ProcessorArgs)


KINDS: dict[str, type[Application]] = {
    "server": ServerApplication,
    "model": ModelApplication,
    "processor": ProcessorApplication,
    "sampler": SamplerApplication,
}
"""By ``import_path``."""


def read_applications(reader: Reader, document: Any) -> tuple[Application, ...]:
    """The list under ``applications:``, in its order; ConfigError says what is wrong in which of them."""
    if not isinstance(document, list) or not document:
        raise reader.error("applications", "must be a list with at least one entry, each beginning '- name:'")
    found = []
    for n, entry in enumerate(document):
        place = f"applications[{n}]"
        if not isinstance(entry, Mapping):
            raise reader.error(place, f"must hold keys and values, not {entry!r}")
        kind = entry.get("import_path")
        if not isinstance(kind, str) or kind not in KINDS:
            raise reader.error(f"{place}.import_path", f"must be one of {', '.join(KINDS)}, not {kind!r}")
        found.append(reader.build(KINDS[kind], entry, place))
    return tuple(found)


def _device(name: str) -> str:
    if name.lower() not in DEVICES:
        raise ConfigError(f"device_type must be cuda or CPU, not {name!r}: nothing else is supported")
    return name.lower()
