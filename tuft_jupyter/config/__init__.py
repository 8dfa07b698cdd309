"""One frozen :class:`Settings`, read from: defaults < YAML file < environment < traits < command line.

Standard library and PyYAML only. The module knows nothing of servers, models or kernels; it turns text into
checked values. It promises that nothing is guessed: an unknown key, a wrong type or a value out of range is a
:class:`ConfigError` that names the key, where it stands and what is near it. The YAML of TuFT's README is
read as it is.

Every plain field ``x`` of :class:`Settings` can be given as ``TUFT_X`` in the environment.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from tuft_jupyter import home as homes
from tuft_jupyter.config import translated
from tuft_jupyter.config.backends import BackendsConfig as BackendsConfig
from tuft_jupyter.config.backends import from_environment
from tuft_jupyter.config.placement import PlacementConfig as PlacementConfig
from tuft_jupyter.config.placement import sampling_gpus, with_torchspec
from tuft_jupyter.config.reader import ConfigError as ConfigError
from tuft_jupyter.config.reader import Reader, at_least, web_address
from tuft_jupyter.config.sections import QUOTAS, SAMPLERS, Served, check_devices, check_sampler
from tuft_jupyter.config.sections import ModelSettings as ModelSettings
from tuft_jupyter.config.sections import PersistenceConfig as PersistenceConfig
from tuft_jupyter.config.sections import TenantSettings as TenantSettings
from tuft_jupyter.models import context_offered

log = logging.getLogger("tuft_jupyter.config")

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 10610
DEFAULT_RANK_LIMIT = 64
DEMO_MODEL = "tuft/demo"
LOCAL_USER = "local-user"
RAY_NAMESPACE = "tuft_cluster"
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of a server. Of the limits, 0 means none."""

    home: Path
    checkpoint_dir: Path
    supported_models: tuple[ModelSettings, ...] = ()
    max_lora_rank: int = DEFAULT_RANK_LIMIT
    """of models that no file lists (:meth:`rank_limit`)"""
    authorized_users: Mapping[str, str] = field(default_factory=dict, repr=False)
    """keys, and the tenants they stand for"""
    persistence: PersistenceConfig = field(default_factory=PersistenceConfig)
    backends: BackendsConfig = field(default_factory=BackendsConfig)
    model_owner: str = LOCAL_USER
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    public_url: str = ""
    """where clients reach this server behind a proxy; "": as the ``Host`` header of a request says"""
    adapter_timeout: float = 1800.0
    """seconds without use after which an adapter leaves the worker"""
    adapter_max_lifetime: float = 36000.0
    """seconds after which a run is saved and closed"""
    max_body_bytes: int = 64 * 1024 * 1024
    max_upload_bytes: int = 1024 * 1024 * 1024
    """of the archive of an adapter"""
    per_token_model_limit: int = 0
    """runs in use, of one tenant; all limits down to ``max_samplers`` are for each tenant"""
    rps_limit: float = 0.0
    """requests a second"""
    tps_limit: float = 0.0
    """input tokens a second"""
    max_input_tokens: int = 0
    """of one request"""
    max_checkpoint_bytes: int = 0
    max_sessions: int = 0
    max_samplers: int = 0
    max_loras: int = 0
    """runs in use on one base model, of all tenants"""
    history_days: float = 30.0
    """how long what is over stays on record; 0: for ever"""
    tenants: tuple[TenantSettings, ...] = ()
    """who has other limits"""
    hub_cache_seconds: float = 30.0
    """how long what JupyterHub says of a token is believed"""
    micro_batch_tokens: int | None = None
    """of one forward and backward pass; None: by device"""
    kv_tokens: int | None = None
    """that the torch sampler keeps at once; None: by free memory"""
    max_ongoing_requests: int = 0
    """answered at once, of all tenants; polls do not count"""
    text_workers: int = 1
    """threads that turn text into tokens, for each base model that is sampled"""
    ray_address: str | None = None
    """None: a local Ray of our own; ``require``: a cluster of this user on this machine, or none"""
    ray_namespace: str = RAY_NAMESPACE
    """that our actors are in"""
    placement: PlacementConfig | None = None
    """None: actors take shares of the GPUs there are"""
    cuda_visible_devices: str = ""
    """of this machine's GPUs those that are used, by number or UUID; "": as the variable of that name says"""
    trainer_threads: int | None = None
    """None: by CPUs"""
    trust_remote_code: bool = False
    """whether Python code that a model brings may be run"""
    keep_samples: bool = True
    """whether the newest samples of each step are kept in memory"""
    standby_worker: bool = True
    """whether a spare process is ready for when a training worker dies"""
    custom_loss_server_side: bool = False
    """whether losses that users wrote are computed beside the model"""
    sampler_type: str = "auto"
    """``torch``, ``vllm`` or ``auto`` (:func:`sampler_choice`)"""
    log_level: str = "info"
    log_format: str = "text"
    toy_backend_seed: int = 0
    """accepted as TuFT 0.1 has it; without effect, because there is no toy engine"""
    file: Path | None = None
    """the configuration file that was read"""
    applications: tuple[Served, ...] = ()
    """of a file in Twinkle's form"""
    notes: tuple[str, ...] = ()
    """what that file says without effect here"""

    def __post_init__(self) -> None:
        for name in (
            "max_lora_rank",
            "max_body_bytes",
            "max_upload_bytes",
            "micro_batch_tokens",
            "trainer_threads",
            "text_workers",
        ):
            at_least(name, getattr(self, name), 1)
        for name in (
            *QUOTAS,
            "max_loras",
            "history_days",
            "max_ongoing_requests",
            "adapter_timeout",
            "adapter_max_lifetime",
            "hub_cache_seconds",
        ):
            at_least(name, getattr(self, name), 0)
        at_least("kv_tokens", self.kv_tokens, 512)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be 0 (any free one) to 65535, not {self.port}")
        if self.log_level.lower() not in LOG_LEVELS:
            raise ConfigError(f"log_level must be one of {', '.join(LOG_LEVELS)}, not {self.log_level!r}")
        object.__setattr__(self, "log_level", self.log_level.lower())
        check_sampler(self.sampler_type)
        check_devices(self.cuda_visible_devices)
        web_address("public_url", self.public_url)
        if self.log_format not in ("text", "json"):
            raise ConfigError(f"log_format must be text or json, not {self.log_format!r}")
        seen: set[str] = set()
        for model in self.supported_models:
            if model.model_name in seen:
                raise ConfigError(f"supported_models names {model.model_name!r} twice; names must be unique")
            seen.add(model.model_name)
            (self.placement or PlacementConfig()).check(model, sampling_gpus(self.placement, model))
        if "" in self.authorized_users:
            raise ConfigError("authorized_users has an empty key")
        if "" in self.authorized_users.values():
            raise ConfigError("authorized_users has a key for nobody; write KEY: NAME")
        if any(name.startswith("tml-") for name in self.authorized_users.values()):
            raise ConfigError("authorized_users has a key where a tenant's name belongs; write KEY: NAME")

    def trusts_code(self, model_name: str) -> bool:
        """Whether Python code that lies beside a model may be run: by the model's own setting, else by that for all."""
        own = self.model(model_name).trust_remote_code
        return self.trust_remote_code if own is None else own

    def model(self, model_name: str) -> ModelSettings:
        """What is set for a model, also for one that no file lists."""
        listed = {model.model_name: model for model in self.supported_models}
        return listed.get(model_name) or ModelSettings(model_name, max_lora_rank=self.max_lora_rank)

    def sampler_asked(self, model_name: str) -> str:
        """``torch``, ``vllm`` or ``auto``: the sampler that workers of this server are asked to use for a model."""
        if self.backends.sampling in SAMPLERS and self.backends.sampling != "auto":
            return self.backends.sampling
        return self.model(model_name).sampler_type or self.sampler_type

    def rank_limit(self, model_name: str) -> int:
        """The highest LoRA rank that may be trained on a model: what cannot be sampled later is refused at once."""
        limit = self.model(model_name).max_lora_rank
        return min(limit, self.backends.max_lora_rank) if self.backends.on_vllm else limit


def sampler_choice(configured: str, *, installed: bool, gpu: bool) -> tuple[str, str]:
    """(``torch`` or ``vllm``, why). ``installed``: whether vLLM can be imported where the workers run."""
    if configured != "auto":
        return configured, "sampler_type is set"
    if not installed:
        return "torch", "vLLM is not installed"
    return ("vllm", "vLLM is installed, and there is a GPU") if gpu else ("torch", "there is no GPU")


def load_settings(
    file: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] = os.environ,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """Read settings; ``overrides`` are traits and command line flags, already laid over one another.

    Without a file: what :func:`generated_config` makes of ``$TUFT_MODEL_PATH``, so the journal is a file
    under ``$TUFT_HOME``. A file without a ``persistence`` section means ``disabled``. ConfigError if anything
    is wrong.
    """
    home = homes.home_dir(env)
    if file is None:
        source, base = "the generated configuration", Path.cwd()
        document = _minimal(env.get("TUFT_MODEL_PATH") or None, home, env)
    else:
        source, base = str(file), Path(file).expanduser().absolute().parent
        document = _read_yaml(Path(file).expanduser())
    user, kept = env.get("JUPYTERHUB_USER"), document.get("persistence")
    if user and isinstance(kept, dict) and "namespace" not in kept:  # on a Hub, one Redis serves many users
        document = {**document, "persistence": {**kept, "namespace": f"tuft:{user}"}}
    document = dict(with_torchspec(document))
    values = _read(Reader(source, base), document, env)
    if file is not None and not values.get("supported_models"):
        raise ConfigError(
            f"{source}: supported_models must list at least one model, such as [{{model_name: tuft/demo}}]"
        )
    values["supported_models"] = tuple(_local(model, base) for model in values.get("supported_models", ()))
    if user:  # a cluster too: actors have names in it
        values.setdefault("ray_namespace", f"{RAY_NAMESPACE}:{user}")
    for theirs, ours in _ALIASES.items():
        if env.get(theirs) and not env.get(ours):
            env = {**env, ours: env[theirs]}
    for name in _FROM_ENVIRONMENT:
        variable = f"TUFT_{name.upper()}"
        if env.get(variable):
            reader = Reader(f"environment variable {variable}", Path.cwd(), text=True)
            values |= reader.read(Settings, {name: env[variable]})
    reader = Reader("command line or traits", Path.cwd(), text=True)
    values |= reader.read(Settings, overrides or {}, without=_SET_ELSEWHERE)
    values.setdefault("checkpoint_dir", home / "checkpoints")
    path = None if file is None else Path(file).expanduser().absolute()
    try:
        return Settings(**values, home=home, file=path)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def config_file(env: Mapping[str, str] = os.environ, trait: str = "") -> Path | None:
    """The file a server reads if none is named: ``TUFT_CONFIG``, the Jupyter trait, the default place."""
    for named, candidate in (("TUFT_CONFIG", env.get("TUFT_CONFIG")), ("config_path", trait)):
        if candidate:
            path = Path(candidate).expanduser()
            if path.is_file():
                return path
            log.warning("%s names %s, which does not exist; looking further", named, path)
    default = homes.default_config(homes.home_dir(env))
    return default if default.is_file() else None


def model_name_of(model: str) -> str:
    """The name a model is served under: the last part of a directory, otherwise what was asked for."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def generated_config(model: str | None, env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The least configuration that serves ``model`` (a directory, a hub id or ``tuft/demo``), as YAML values.

    Its one key is ``TUFT_API_KEY`` or the user's own (made if there is none): write it to private files only.
    """
    home = homes.home_dir(env)
    key = env.get("TUFT_API_KEY") or homes.ensure_key(home)
    return {**_minimal(model, home, env), "authorized_users": {key: LOCAL_USER}}


def _minimal(model: str | None, home: Path, env: Mapping[str, str]) -> dict[str, Any]:
    document: dict[str, Any] = {
        "checkpoint_dir": str(home / "checkpoints"),
        "persistence": {
            "mode": "file_redis",
            "file_path": str(homes.journal_path(home)),
            "namespace": "tuft",
        },
    }
    if model is not None:
        entry: dict[str, Any] = {"model_name": model_name_of(model), "model_path": model}
        path = Path(model).expanduser()
        if path.is_dir():
            entry["model_path"] = str(path.resolve())
        entry["max_model_len"] = context_offered(model, env)
        entry |= {"tensor_parallel_size": 1, "max_lora_rank": DEFAULT_RANK_LIMIT}
        document["supported_models"] = [entry]
    return document


def _read(reader: Reader, document: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, Any]:
    """Either notation; a file with ``applications`` may have keys of our own notation beside them."""
    ours = {key: value for key, value in document.items() if key not in translated.KEYS}
    chosen = ours.pop("backends", None)
    chosen = {} if chosen is None else chosen
    values: dict[str, Any] = reader.read(Settings, ours, without=_SET_ELSEWHERE, also=translated.KEYS)
    elsewhere: dict[str, Any] = {}
    if len(ours) + ("backends" in document) < len(document):
        said = translated.translate(reader, document, values.get("max_lora_rank", DEFAULT_RANK_LIMIT))
        elsewhere = said.pop("backends")
        for key in said.keys() & values.keys():
            raise reader.error(key, "is said by the applications too: leave it out")
        values |= said
    if isinstance(chosen, Mapping):  # what it is otherwise, the reader says
        for key in elsewhere.keys() & chosen.keys():
            raise reader.error(f"backends.{key}", "is said by the applications too: leave it out")
        chosen = from_environment({**elsewhere, **chosen}, env)
        translated.check_elsewhere(reader, elsewhere, chosen)
    return {**values, **reader.read(Settings, {"backends": chosen})}


_SET_ELSEWHERE = frozenset({"home", "file", "applications", "notes"})
_ALIASES = {"TWINKLE_TRUST_REMOTE_CODE": "TUFT_TRUST_REMOTE_CODE"}
_FROM_ENVIRONMENT = [
    f.name
    for f in fields(Settings)
    if f.name
    not in _SET_ELSEWHERE
    | {"supported_models", "tenants", "authorized_users", "persistence", "backends", "placement"}
]


def _local(model: ModelSettings, base: Path) -> ModelSettings:
    """A ``model_path`` that is a directory, seen from the file, wins over a hub id of the same name."""
    directory = base / Path(model.model_path).expanduser()
    return replace(model, model_path=str(directory)) if directory.is_dir() else model


class _Loader(yaml.SafeLoader):
    """YAML in which no key is given twice: PyYAML would take the last one, and say nothing of what it drops."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(
            f"Config file not found: {path}; name one that exists, or leave it out to offer tuft/demo"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold keys and values, such as 'supported_models:'")
    return document
