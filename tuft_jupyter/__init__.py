"""Fine-tuning as a notebook primitive.

    import tuft_jupyter

    tuft_jupyter.init("tuft/demo")
    training = tuft_jupyter.create_training_client(rank=8).result()  # the stock Tinker SDK's TrainingClient

or, in a notebook, ``%tuft init``. Importing this package imports nothing heavy: no torch, ray, tornado,
transformers or tinker, each of which is loaded by the first call that needs it.
"""

from __future__ import annotations

from typing import Any

from tuft_jupyter._version import __version__
from tuft_jupyter.config import PersistenceConfig
from tuft_jupyter.kernel.connect import (
    create_training_client,
    get_service_client,
    init,
    is_initialized,
    shutdown,
)
from tuft_jupyter.kernel.continuity import resume, runs
from tuft_jupyter.serving import launch_server

__all__ = [
    "PersistenceConfig",
    "__version__",
    "create_training_client",
    "get_service_client",
    "init",
    "is_initialized",
    "launch_server",
    "resume",
    "runs",
    "shutdown",
]

WIDGETS = ("CheckpointTable", "GpuMeter", "LossCurve", "Playground", "RunTable")


def __getattr__(name: str) -> Any:
    """The widgets, imported when one is asked for: anywidget takes a moment."""
    if name in WIDGETS:
        from tuft_jupyter.kernel import widgets

        return getattr(widgets, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_ipython_extension(shell: Any) -> None:
    """Register ``%tuft``: with its first use (jupyter-config/ipython_config.json), or by ``%load_ext tuft_jupyter``."""
    from tuft_jupyter.kernel import magic

    magic.load(shell)


def _jupyter_labextension_paths() -> list[dict[str, str]]:
    return [{"src": "labextension", "dest": "tuft-jupyter"}]


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    from tuft_jupyter_server.app import TuftExtension

    return [{"module": "tuft_jupyter", "app": TuftExtension}]
