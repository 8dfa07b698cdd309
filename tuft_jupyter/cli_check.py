"""``tuft check-config FILE``: what a server would make of a configuration file, without starting one.

A file that cannot be used is a ConfigError, which names the key. A base model whose files are not on this machine is
said and is no error: the file may be meant for another one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from tuft_jupyter import models
from tuft_jupyter.config import ModelSettings, Settings, load_settings
from tuft_jupyter.config.backends import Backend
from tuft_jupyter.config.placement import sampling_gpus
from tuft_jupyter.core.errors import UserError


def add_parser(verbs: Any) -> None:
    check = verbs.add_parser("check-config", help="read a configuration file, and say what would be served")
    check.add_argument("file", metavar="FILE", help="YAML configuration, in either form")


def run(options: argparse.Namespace) -> int:
    print("\n".join(summary(load_settings(options.file))))
    return 0


def summary(settings: Settings) -> Iterator[str]:
    """What would be served, line by line."""
    yield f"{settings.file} can be used."
    yield f"  listens on    {settings.host}:{settings.port} (a daemon; in a notebook server, below /tuft)"
    yield f"  journal       {settings.persistence.mode}"
    for model in settings.supported_models:
        yield f"  base model    {model.model_name}: {_files(model)}"
        yield f"    training    {_training(model, settings)}"
        yield f"    sampling    {_sampling(model, settings)}"
    for app in settings.applications:
        yield f"  application   {app.name} ({app.import_path}, {app.deployment}) at {app.route_prefix}"
    for note in settings.notes:
        yield f"  note          {note}"


def _files(model: ModelSettings) -> str:
    try:
        card = models.resolve(model.model_path)
    except UserError as error:
        return f"NOT ON THIS MACHINE. {error.message}"
    return f"{card.arch} in {card.path}"


def _training(model: ModelSettings, settings: Settings) -> str:
    length = model.max_train_len or model.max_model_len
    longest = f", sequences of up to {length} tokens" if length else ""
    rank = f", rank up to {settings.rank_limit(model.model_name)}"
    match settings.backends.trainer:
        case Backend.TRAINING_SERVER:
            return f"a server at {settings.backends.training_url}{rank}"
        case None:
            return "none"
    if settings.placement is not None and settings.placement.mode == "debug_inference_only":
        return "none: placement.mode is debug_inference_only"
    from tuft_jupyter.engine import demands  # as late as it is needed: every command imports this module

    ask, processes = demands.ask_of(settings, model.model_name), demands.ranks_of(settings, model.model_name)
    return f"{_processes(settings, model, processes, ask.training_gpus)}{longest}{rank}"


def _sampling(model: ModelSettings, settings: Settings) -> str:
    longest = f", sequences of up to {model.max_model_len} tokens" if model.max_model_len else ""
    adapters = "" if model.enable_lora else ", without adapters"
    match settings.backends.sampler:
        case Backend.VLLM_SERVER:
            return f"vLLM at {settings.backends.vllm_url}"
        case Backend.TRAINING_SERVER:
            return "by the server that trains"
        case None:
            return "none"
    if settings.placement is not None and settings.placement.mode == "debug_train_only":
        return "none: placement.mode is debug_train_only"
    kind, gpus = settings.sampler_asked(model.model_name), sampling_gpus(settings.placement, model)
    return f"{kind}, {_processes(settings, model, model.sampling_replicas, gpus)}{longest}{adapters}"


def _processes(settings: Settings, model: ModelSettings, count: int, gpus: int) -> str:
    """How many and where; nothing of GPUs where nobody said how many: the machine then decides."""
    said = settings.placement is not None or (model.training_gpus, model.sampling_gpus) != (None, None)
    where = f" on {gpus} GPU{'s' if gpus > 1 else ''}" if said else ""
    if not gpus:
        where = " on the CPU"
    return f"{count} process{'es' if count > 1 else ''}{where}"
