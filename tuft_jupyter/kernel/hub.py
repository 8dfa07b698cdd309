"""Keeps the Hugging Face client from asking the hub about models that only the TuFT server has.

The files are in the cache (:mod:`~tuft_jupyter.kernel.tokenizers`), but the hub client asks the hub first:
without a network it retries for minutes, and with one it is told that ``tuft/demo`` does not exist and gives
up. So requests about exactly these repositories are answered "offline", for which the client then turns to
its cache. This uses ``huggingface_hub.set_client_factory``, the client's own place for a custom HTTP client;
every other request goes its usual way. It also keeps a stranger who registers such a name on the hub from
supplying the tokenizer.

Promises: nothing is imported that is not installed, and a model of the form ``org/name`` that the hub knows
is left to the hub.
"""

from __future__ import annotations

import http.client
import logging
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from tuft_jupyter.config import DEMO_MODEL

REACH_SECONDS = 2.0
SERVED_HERE = "is served by TuFT and comes from the local cache"

_lock = threading.Lock()
_kept: set[str] = set()
_installed = False


def keep_local(repositories: Iterable[str]) -> str | None:
    """Answer requests about these repositories from the cache from now on; a sentence if that cannot be
    had.
    """
    global _installed
    with _lock:
        wanted = [repo for repo in repositories if repo not in _kept]
        if not wanted:
            return None
        try:
            import huggingface_hub
            from huggingface_hub import constants
            from huggingface_hub.utils import _http
        except ImportError:
            return None
        if constants.HF_HUB_OFFLINE:
            return None
        if not hasattr(huggingface_hub, "set_client_factory"):
            return (
                f"huggingface_hub {huggingface_hub.__version__} asks the hub about {', '.join(wanted)}: "
                "set HF_HUB_OFFLINE=1 before starting the kernel, or upgrade it to 1.0 or later"
            )
        _kept.update(_not_on_the_hub(wanted, constants.ENDPOINT))
        if not _installed:
            make_client = getattr(_http, "_GLOBAL_CLIENT_FACTORY", None) or _http.default_client_factory
            huggingface_hub.set_client_factory(lambda: _with_gate(make_client(), constants.ENDPOINT))
            # The client warns that the hub cannot be reached; here that is how it should be.
            logging.getLogger("huggingface_hub.hf_api").addFilter(lambda r: SERVED_HERE not in r.getMessage())
            _installed = True
    return None


def _not_on_the_hub(repositories: list[str], endpoint: str) -> list[str]:
    """Those that the hub does not have, or cannot be asked about. Bare names and our own are never its
    business.
    """
    kept, reachable = [], True
    for repo in repositories:
        known = False
        if "/" in repo and not repo.startswith(DEMO_MODEL.partition("/")[0] + "/") and reachable:
            known, reachable = _ask(f"{endpoint}/api/models/{repo}")
        if not known:
            kept.append(repo)
    return kept


def _ask(url: str) -> tuple[bool, bool]:
    """Whether the hub has it, and whether the hub answered at all."""
    try:
        with urllib.request.urlopen(url, timeout=REACH_SECONDS):
            return True, True
    except urllib.error.HTTPError:
        return False, True
    except (OSError, http.client.HTTPException, ValueError):  # an HF_ENDPOINT that is no address is nobody's
        return False, False


def _with_gate(client: Any, endpoint: str) -> Any:
    from huggingface_hub.errors import OfflineModeIsEnabled

    prefix = urlsplit(endpoint).path

    def gate(request: Any) -> None:
        path = request.url.path.removeprefix(prefix)
        repo = asked_about(path)
        if repo is not None and repo in _kept:
            raise OfflineModeIsEnabled(f"{repo} {SERVED_HERE}; the hub is not asked about it.")

    client.event_hooks = {**client.event_hooks, "request": [gate, *client.event_hooks.get("request", [])]}
    return client


def asked_about(path: str) -> str | None:
    """The repository of a hub URL path: ``/api/models/{repo}[/revision/...]`` or ``/{repo}/resolve/...``."""
    match = re.fullmatch(
        r"/api/models/(.+?)(?:/(?:revision|tree|paths-info|refs|xet-read-token)(?:/.*)?)?", path
    )
    match = match or re.fullmatch(r"/(.+?)/(?:resolve|raw)/.*", path)
    return match[1] if match else None
