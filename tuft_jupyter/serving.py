"""A server without a notebook server, in this process: what ``tuft launch`` and :func:`launch_server` do.

Tornado is imported with the first call.
"""

from __future__ import annotations

import asyncio
import os

from tuft_jupyter.config import Settings, load_settings
from tuft_jupyter.config.reader import usable


def launch_server(
    config_path: str | os.PathLike[str], *, namespace: str | None = None, log_level: str | None = None
) -> None:
    """Serve what a configuration file says, until SIGTERM or SIGINT: the call returns when all is ended.

    ``namespace`` is the Ray namespace, ``log_level`` a word such as ``"debug"``; both go before the file. ConfigError
    says what is wrong with the file, OSError what is in the way (a port in use). RuntimeError in a notebook, where the
    call would block the kernel for good: use ``%tuft init`` there.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise RuntimeError(
            "launch_server blocks until the server is told to stop: run it in a script of its own; in a notebook, "
            "`%tuft init --config FILE` starts a server beside the kernel"
        )
    given = {"ray_namespace": namespace, "log_level": log_level}
    overrides = {name: value for name, value in given.items() if value is not None}
    serve(load_settings(config_path, overrides=overrides))


def serve(settings: Settings) -> None:
    """Serve until told to stop."""
    from tuft_jupyter_server.daemon import serve as serve_here

    with usable("checkpoint_dir", settings.checkpoint_dir):
        settings.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    serve_here(settings)
