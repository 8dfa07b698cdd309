"""Which backend serves an operation: one pure function of the operation and of what is configured.

It asks nobody whether a backend is up; :mod:`~tuft_jupyter.engine.remote.http` does.
"""

from __future__ import annotations

from tuft_jupyter.config.backends import Backend, BackendsConfig
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


def route(operation: str, backends: BackendsConfig) -> Backend:
    """Who serves ``operation`` (a word of the Tinker protocol). UserError says what to configure if nobody does."""
    samples = operation in SAMPLE
    found = backends.sampler if samples else backends.trainer
    if found is None:
        raise UserError(NO_SAMPLING if samples else NO_TRAINING)
    return found
