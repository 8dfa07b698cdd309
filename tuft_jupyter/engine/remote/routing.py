"""Which backend serves an operation: one pure function of the operation and of what is configured.

It asks nobody whether a backend is up; :mod:`~tuft_jupyter.engine.remote.http` does.
"""

from __future__ import annotations

from enum import StrEnum

from tuft_jupyter.config.backends import BackendsConfig
from tuft_jupyter.core.errors import UserError

SAMPLE = frozenset({"sample", "asample"})
"""All other operations change or save an adapter, and belong to whoever trains it."""

NO_SAMPLING = (
    "No valid sampling backend configured: neither USE_VLLM nor USE_MEGATRON is set. Set USE_VLLM=true (sampling) or "
    "USE_MEGATRON=true (training and sampling), or backends.sampling in the configuration file, and restart the server"
)
NO_TRAINING = (
    "Training not supported in non-Megatron mode: no training backend is configured, so this server only samples. Set "
    "USE_MEGATRON=true and MEGATRON_SERVER_URL, or backends.training in the configuration file ('peft' trains in "
    "workers of this server), and restart the server"
)


class Backend(StrEnum):
    WORKERS = "workers"
    """our own, on Ray"""
    TRAINING_SERVER = "training server"
    """one that speaks the Tinker protocol, elsewhere"""
    VLLM_SERVER = "vLLM server"
    """one with vLLM's OpenAI-compatible API, elsewhere"""


def route(operation: str, backends: BackendsConfig) -> Backend:
    """Who serves ``operation`` (a word of the Tinker protocol). UserError says what to configure if nobody does."""
    elsewhere = backends.training == "external"
    if operation not in SAMPLE:
        if backends.training == "none":
            raise UserError(NO_TRAINING)
        return Backend.TRAINING_SERVER if elsewhere else Backend.WORKERS
    if backends.sampling == "external":
        return Backend.VLLM_SERVER
    if backends.sampling in ("torch", "vllm"):
        return Backend.WORKERS
    if backends.sampling == "none" or backends.training == "none":
        raise UserError(NO_SAMPLING)
    return Backend.TRAINING_SERVER if elsewhere else Backend.WORKERS
