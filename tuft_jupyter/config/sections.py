"""The sections of a configuration file: where the journal is kept, one base model, one tenant's own limits.

Each checks itself when it is made: a value out of range is a :class:`~tuft_jupyter.config.reader.ConfigError`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tuft_jupyter.config.reader import ConfigError, at_least

QUOTAS = {
    "per_token_model_limit": "runs",
    "rps_limit": "requests_per_second",
    "tps_limit": "tokens_per_second",
    "max_input_tokens": "input_tokens",
    "max_checkpoint_bytes": "checkpoint_bytes",
    "max_sessions": "sessions",
    "max_samplers": "samplers",
}
"""Our settings, which are the seeds' words, and what they limit."""
SAMPLERS = ("auto", "torch", "vllm")
DTYPES = ("auto", "float32", "bfloat16")
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs")
"""vLLM's words: log-probabilities of the model itself, or of what was drawn from: after temperature and filters."""
MODES = {
    "disabled": "disabled", "disable": "disabled", "memory": "disabled",
    "redis_url": "redis_url", "redis": "redis_url",
    "file_redis": "file_redis", "file": "file_redis",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PersistenceConfig:
    """Where the journal of operations is kept.

    ``disabled`` keeps it in memory, ``redis_url`` in a Redis server, ``file_redis`` in one SQLite file (the
    word is TuFT's). ``future_ttl_seconds`` is how long a result waits for its client (None: for ever). The
    later words DISABLE, REDIS, FILE and memory, redis, file are understood, in any case.
    """

    mode: str = "disabled"
    redis_url: str = field(default="redis://localhost:6379/0", repr=False)
    file_path: Path = Path("~/.cache/tuft/file_redis.json")
    namespace: str = "tuft"
    future_ttl_seconds: int | None = 86400

    def __post_init__(self) -> None:
        mode = MODES.get(str(self.mode).lower())
        if mode is None:
            raise ConfigError(f"mode must be disabled, redis_url or file_redis, not {self.mode!r}")
        object.__setattr__(self, "mode", mode)
        object.__setattr__(self, "file_path", Path(self.file_path).expanduser())
        if not self.namespace:
            raise ConfigError("namespace must not be empty")
        at_least("future_ttl_seconds", self.future_ttl_seconds, 1)

    @property
    def enabled(self) -> bool:
        return self.mode != "disabled"

    @classmethod
    def disabled(cls) -> Self:
        return cls()

    @classmethod
    def from_redis_url(cls, redis_url: str, namespace: str = "tuft") -> Self:
        return cls(mode="redis_url", redis_url=redis_url, namespace=namespace)

    @classmethod
    def from_file_redis(
        cls, file_path: str | Path = "~/.cache/tuft/file_redis.json", namespace: str = "tuft"
    ) -> Self:
        return cls(mode="file_redis", file_path=Path(file_path), namespace=namespace)


@dataclass(frozen=True, slots=True)
class QueueSettings:
    """What each tenant may ask of one engine of one base model, within its limits on the whole server; 0: no limit."""

    rps_limit: float = 0.0
    tps_limit: float = 0.0
    max_input_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("rps_limit", "tps_limit", "max_input_tokens"):
            at_least(name, getattr(self, name), 0)


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """One base model: ``model_name`` on the wire, ``model_path`` a directory or a hub id (default: the name).

    ``max_model_len`` in tokens; None: as far as the model itself goes. ``temperature`` to
    ``min_response_tokens`` are the sampler's defaults, ``max_lora_rank`` and ``max_loras`` its limits. Names and
    defaults are those of TuFT 0.1. ``trust_remote_code``, ``sampler_type`` None: the server's. Of each GPU's memory
    vLLM takes ``gpu_memory_utilization``; ``data_parallel`` processes train together, each on a GPU if there are any.
    ``training_gpus`` and ``sampling_gpus`` are reserved whole (0: none is used; None: some of those there are);
    ``sampling_replicas`` processes sample, each on its share, and those that train are divided over ``training_nodes``
    (None: as the section ``placement`` has it). Every actor asks Ray for ``actor_cpus`` and runs with
    ``actor_env`` in its environment.
    Training takes sequences of ``max_train_len`` tokens; None: of ``max_model_len``. ``training_queue`` and
    ``sampling_queue`` bound what a tenant asks of either engine. ``enable_lora`` false: only the model itself is
    sampled. ``logprobs_mode`` None: raw, as the protocol has it. ``dtype`` is what the frozen weights compute in;
    ``auto``: as their files are, or on a CPU in fp32 where that is faster.
    """

    model_name: str
    model_path: str = ""
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    logprobs: int = 0
    seed: int = 42
    min_response_tokens: int = 0
    max_lora_rank: int = 16
    max_loras: int = 1
    trust_remote_code: bool | None = None
    sampler_type: str | None = None
    gpu_memory_utilization: float = 0.4
    data_parallel: int = 1
    training_gpus: int | None = None
    training_nodes: int | None = None
    sampling_gpus: int | None = None
    sampling_replicas: int = 1
    actor_cpus: float | None = None
    actor_env: Mapping[str, str] = field(default_factory=dict, repr=False)
    max_train_len: int | None = None
    training_queue: QueueSettings = field(default_factory=QueueSettings)
    sampling_queue: QueueSettings = field(default_factory=QueueSettings)
    enable_lora: bool = True
    logprobs_mode: str | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not self.model_name:
            raise ConfigError("model_name must not be empty")
        if not self.model_path:
            object.__setattr__(self, "model_path", self.model_name)
        for name in ("max_model_len", "tensor_parallel_size", "max_lora_rank", "max_loras", "data_parallel"):
            at_least(name, getattr(self, name), 1)
        at_least("sampling_replicas", self.sampling_replicas, 1)
        at_least("training_nodes", self.training_nodes, 1)
        if self.data_parallel % (self.training_nodes or 1):
            raise ConfigError(
                f"data_parallel must be a multiple of training_nodes: {self.data_parallel} processes cannot be divided "
                f"evenly over {self.training_nodes} nodes"
            )
        for name in ("training_gpus", "sampling_gpus", "actor_cpus"):
            at_least(name, getattr(self, name), 0)
        _divides("training_gpus", self.training_gpus, "data_parallel", self.data_parallel)
        _divides("sampling_gpus", self.sampling_gpus, "sampling_replicas", self.sampling_replicas)
        at_least("max_train_len", self.max_train_len, 1)
        one_of("logprobs_mode", self.logprobs_mode, LOGPROBS_MODES)
        one_of("dtype", self.dtype, DTYPES)
        if self.sampler_type is not None:
            check_sampler(self.sampler_type)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization must be above 0 and at most 1, not {self.gpu_memory_utilization}"
            )


@dataclass(frozen=True, slots=True)
class TenantSettings:
    """Other limits for one tenant, or for the members of a JupyterHub group; what is None stays as it is for all.

    ``weight`` is the share of a busy engine beside tenants of weight 1.
    """

    tenant: str = ""
    group: str = ""
    per_token_model_limit: int | None = None
    rps_limit: float | None = None
    tps_limit: float | None = None
    max_input_tokens: int | None = None
    max_checkpoint_bytes: int | None = None
    max_sessions: int | None = None
    max_samplers: int | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        if bool(self.tenant) == bool(self.group):
            raise ConfigError("tenant: name one tenant, or one group")
        for name in QUOTAS:
            at_least(name, getattr(self, name), 0)
        if self.weight is not None and not 0 < self.weight <= 1000:
            raise ConfigError(f"weight must be more than 0 and at most 1000, not {self.weight}")

    def given(self) -> dict[str, float]:
        """The limits that differ, by the names of :class:`tuft_jupyter.core.quotas.Quota`."""
        named = {**QUOTAS, "weight": "weight"}
        values = {quota: getattr(self, name) for name, quota in named.items()}
        return {quota: value for quota, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Served:
    """One application of a file in Twinkle's form, as status shows it. ``gpus`` None: those there are, shared."""

    name: str
    import_path: str
    route_prefix: str
    model: str = ""
    deployment: str = ""
    device_type: str = "cuda"
    gpus: int | None = None
    dp_size: int = 1
    tp_size: int = 1


def _divides(name: str, gpus: int | None, by: str, processes: int) -> None:
    if gpus and gpus % processes:
        raise ConfigError(f"{name} must be a multiple of {by}: {gpus} GPUs are not {processes} equal shares")


def check_sampler(name: str) -> None:
    one_of("sampler_type", name, SAMPLERS)


def check_devices(text: str) -> None:
    """ConfigError unless a list of GPUs is one that CUDA reads to its end, and names each once."""
    names = [name.strip() for name in text.split(",")] if text else []
    for name in names:
        if not name.isdecimal() and not name.startswith(("GPU-", "MIG-")):
            raise ConfigError(
                f"cuda_visible_devices must name GPUs by number or UUID, such as 4,5 or GPU-8f2a,MIG-31c0, not {text!r}"
            )
        if names.count(name) > 1:
            raise ConfigError(f"cuda_visible_devices names {name} twice")


def one_of(name: str, value: str | None, known: Collection[str]) -> None:
    """ConfigError unless a word is among the known ones; None is none."""
    if value is not None and value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, not {value!r}")
