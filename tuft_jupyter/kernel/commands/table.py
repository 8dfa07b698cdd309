"""The table of sub-commands: from it come the parser, the help, tab completion, and the test of their documentation."""

from __future__ import annotations

from tuft_jupyter.kernel.commands import asking, cluster, running, serving, weights
from tuft_jupyter.kernel.commands.command import Command

COMMANDS: tuple[Command, ...] = (
    serving.INIT,
    serving.STATUS,
    running.RUNS,
    running.ATTACH,
    running.RESUME,
    running.WHY,
    weights.CHECKPOINTS,
    asking.SAMPLE,
    cluster.RAY,
    serving.OPEN,
    serving.CONFIG,
    serving.DOCTOR,
    serving.SHUTDOWN,
)
