"""What is bound to fail at its first use is said in the log at the start, where whoever configured the server looks.

Nothing waits for it and nothing is refused because of it: a cluster may come up later, a run may never be used again.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping

from tuft_jupyter.config import BackendsConfig, Settings
from tuft_jupyter.config.backends import GROUP_PORT
from tuft_jupyter.core.engine import Catalog
from tuft_jupyter.core.errors import TuftError, UserError
from tuft_jupyter.core.state import ENDED, State
from tuft_jupyter.engine import ray_place

log = logging.getLogger("tuft_jupyter")


async def warn(settings: Settings, catalog: Catalog, state: State, *, workers: bool) -> None:
    """``workers``: whether this server trains or samples with workers of its own."""
    found = [*models_left_out(catalog, state), *group_port(settings.backends)]
    if workers:
        found += await asyncio.to_thread(
            lambda: [*cluster(settings, os.environ), *vllm(settings, catalog, os.environ)]
        )
    for problem in found:
        # Commands on several lines are put on one: a log's line breaks are escaped, and nobody could copy them.
        log.warning("%s", " ".join(problem.replace("\\\n", " ").split()))


def models_left_out(catalog: Catalog, state: State) -> Iterator[str]:
    """Base models of runs that may go on, which are not on offer any more."""
    runs = Counter(run.base_model for run in state.runs.values() if run.status not in ENDED)
    for model, count in runs.items():
        try:
            catalog.resolve(model)
        except UserError as refusal:
            yield f"{count} of the runs on record cannot go on: {refusal.message}. Add it to supported_models again"


def group_port(backends: BackendsConfig) -> Iterator[str]:
    """A port that somebody chose for handing weights to vLLM, where another program listens."""
    port = backends.vllm_group_port
    if port == GROUP_PORT:
        return
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            yield (
                f"vllm_group_port (VLLM_GROUP_PORT) {port} cannot be had on this machine: {error.strerror}. Nothing is "
                "lost by it: adapters are handed over as files. Leave it out, or name a free one"
            )


def cluster(settings: Settings, env: Mapping[str, str]) -> Iterator[str]:
    """A Ray cluster that was named and does not answer; takes two seconds at most."""
    try:
        place = ray_place.choose(settings.ray_address, env)
        if not place.local:
            ray_place.probe(place.address)
    except TuftError as error:
        yield f"no worker can be started yet: {error.message}"


def vllm(settings: Settings, catalog: Catalog, env: Mapping[str, str]) -> Iterator[str]:
    """Models that are to be sampled with vLLM here, where it is not installed. A cluster has its own packages."""
    if importlib.util.find_spec("vllm") is not None or not ray_place.asked(settings.ray_address, env).local:
        return
    asked = [card.name for card in catalog.cards() if settings.sampler_asked(card.name) == "vllm"]
    if asked:
        yield (
            f"{', '.join(asked)} cannot be sampled: sampler_type is vllm, and vLLM is not installed in the server's "
            'environment: run pip install "tuft-jupyter[vllm]" there, or set sampler_type to auto'
        )
