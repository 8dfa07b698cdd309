"""The section ``placement`` of a configuration file: how the GPUs of a Ray cluster are shared out.

Names and defaults of the sizes are those of TorchSpec, whose own two sections are read as well. Checks itself when it
is made: a contradiction is a :class:`~tuft_jupyter.config.reader.ConfigError` with its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tuft_jupyter.config.reader import ConfigError, at_least
from tuft_jupyter.config.sections import ModelSettings

MODES = ("auto", "separate", "colocate", "debug_train_only", "debug_inference_only")
FLAGS = MODES[2:]
STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
TRAINING = ("training_num_nodes", "training_num_gpus_per_node")
INFERENCE = ("inference_num_gpus", "inference_num_gpus_per_node", "nnodes", "dist_init_addr", "dist_timeout")


@dataclass(frozen=True, slots=True)
class PlacementConfig:
    """Sizes are of each base model, unless it has its own.

    ``mode``: training and sampling on GPUs of their own (``separate``), on the same ones (``colocate``), or one of the
    two alone; ``auto`` shares where the cluster has a single GPU. The flags ``colocate``, ``debug_train_only`` and
    ``debug_inference_only`` are TorchSpec's way to say so. ``strategy`` is one of Ray's. ``wait_seconds``: how long
    nodes may take to join. ``nnodes`` nodes run one replica together. Processes on several nodes meet at
    ``dist_init_addr`` (None: found out) within ``dist_timeout`` seconds.
    """

    mode: str = "auto"
    strategy: str = "PACK"
    wait_seconds: float = 300.0
    training_num_nodes: int = 1
    training_num_gpus_per_node: int = 1
    inference_num_gpus: int = 1
    inference_num_gpus_per_node: int = 8
    nnodes: int = 1
    dist_init_addr: str | None = None
    dist_timeout: float = 60.0
    colocate: bool = False
    debug_train_only: bool = False
    debug_inference_only: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode must be one of {', '.join(MODES)}, not {self.mode!r}")
        said = {flag for flag in FLAGS if getattr(self, flag)} | ({self.mode} - {"auto"})
        if len(said) > 1:
            raise ConfigError(f"mode cannot be {' and '.join(sorted(said))} at once: leave one")
        object.__setattr__(self, "mode", said.pop() if said else "auto")
        object.__setattr__(self, "strategy", self.strategy.upper())
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"strategy must be one of {', '.join(STRATEGIES)}, not {self.strategy!r}")
        for name in (*TRAINING, *INFERENCE[:3]):
            at_least(name, getattr(self, name), 1)
        at_least("wait_seconds", self.wait_seconds, 0)
        if not self.dist_timeout > 0:
            raise ConfigError(f"dist_timeout must be more than 0, not {self.dist_timeout}")
        if self.dist_init_addr is not None and not _is_address(self.dist_init_addr):
            raise ConfigError(f"dist_init_addr must be IP:PORT, not {self.dist_init_addr!r}")
        self.gpus_per_engine(self.inference_num_gpus, 1)

    def gpus_per_engine(self, gpus: int, replicas: int) -> int:
        """Of each sampling process, where all of a model's have ``gpus``; ConfigError if they cannot be dealt out."""
        processes = replicas * self.nnodes
        if gpus % processes:
            raise ConfigError(
                f"inference_num_gpus must be a multiple of the {processes} processes ({replicas} replicas on "
                f"{self.nnodes} nodes each), not {gpus}"
            )
        each = gpus // processes
        if each > self.inference_num_gpus_per_node:
            raise ConfigError(
                f"nnodes: a replica with {gpus // replicas} GPUs needs more than {self.nnodes} nodes with "
                f"inference_num_gpus_per_node {self.inference_num_gpus_per_node}: raise one of them"
            )
        return each

    def check(self, model: ModelSettings, gpus: int) -> None:
        """ConfigError if a model's own numbers do not go with the section's; ``gpus`` sample from it."""
        each = self.gpus_per_engine(gpus, model.sampling_replicas)
        if each and each < model.tensor_parallel_size:
            raise ConfigError(
                f"{model.model_name} is spread over tensor_parallel_size {model.tensor_parallel_size} GPUs, and "
                f"each of its {model.sampling_replicas} sampling replicas has {each}"
            )
        if self.mode == "colocate":
            rank = (model.training_gpus or 0) // model.data_parallel
            for kind, gpus in (("training", rank), ("sampling", each)):
                if gpus > 1:
                    raise ConfigError(
                        f"colocate shares single GPUs, and a {kind} process of {model.model_name} has {gpus}"
                    )


def sampling_gpus(section: PlacementConfig | None, model: ModelSettings) -> int:
    """GPUs that sample from a model: its own number, else the section's, else as many as its processes span."""
    if model.sampling_gpus is not None:
        return model.sampling_gpus
    return (
        model.tensor_parallel_size * model.sampling_replicas
        if section is None
        else section.inference_num_gpus
    )


def with_torchspec(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """A document whose sections ``training`` and ``inference`` (TorchSpec's) are one section ``placement``.

    What the two do not know stays where it is, to be refused by its name. So does a key that ``placement`` has too.
    """
    placement = document.get("placement")
    if placement is not None and not isinstance(placement, Mapping):
        return document
    own = dict(placement or {})
    rest = {key: value for key, value in document.items() if key not in ("training", "inference")}
    for section, names in (("training", (*TRAINING, *FLAGS)), ("inference", INFERENCE)):
        given = document.get(section)
        if not isinstance(given, Mapping):
            if section in document:
                rest[section] = given
            continue
        left = dict(given)
        engine = left.pop("sglang", {})
        for source in (left, engine if isinstance(engine, dict) else {}):
            for name in [name for name in source if name in names and name not in own]:
                own[name] = source.pop(name)
        if engine:
            left["sglang"] = engine
        if left:
            rest[section] = left
    return {**rest, "placement": own} if own else rest


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 65536
