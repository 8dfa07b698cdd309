"""The server: connect, look, open the panel, disconnect."""

from __future__ import annotations

import argparse
import html
from typing import Any

from tuft_jupyter.kernel import connect, doctor
from tuft_jupyter.kernel.commands.command import Command, Text
from tuft_jupyter.kernel.report import CARD, Table

PANEL_COMMAND = "tuft:open-panel"


def _init_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="base model: a directory, a hub id, or tuft/demo")
    parser.add_argument("--model", "-m", dest="model_option", metavar="M", help="the same, as an option")
    parser.add_argument("--address", metavar="URL", help="connect to this server and no other")
    parser.add_argument(
        "--config", "-c", metavar="FILE", help="configuration of the server, if one is started"
    )
    parser.add_argument("--here", action="store_true", help="ignore a TINKER_BASE_URL of your own")


def _init(arguments: argparse.Namespace) -> None:
    connect.init(
        arguments.model_option or arguments.model,
        address=arguments.address,
        config=arguments.config,
        here=arguments.here,
    )


def _status(_: argparse.Namespace) -> Table:
    connection = connect.current()
    if connection is None:
        return Table("TuFT: not connected", [("next", "%tuft init (or %tuft init tuft/demo) connects")])
    return connection.table()


class _Panel:
    """A button that opens the panel in JupyterLab; elsewhere, words that say where it is."""

    def __repr__(self) -> str:
        return "TuFT: in JupyterLab, the panel opens with the TuFT icon in the left sidebar (or Ctrl+Shift+C, TuFT)."

    def _repr_html_(self) -> str:
        button = f'<button data-commandlinker-command="{PANEL_COMMAND}">Open the TuFT panel</button>'
        return f'<div style="{CARD}">{button} &nbsp; {html.escape(repr(self).removeprefix("TuFT: "))}</div>'


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--show", action="store_true", help="print it (the default)")
    parser.add_argument("model", nargs="?", default=None)


def _shutdown(_: argparse.Namespace) -> Text:
    was_on = connect.is_initialized()
    connect.shutdown()
    return Text("TuFT: disconnected." if was_on else "TuFT: was not connected.")


def _panel(_: argparse.Namespace) -> Any:
    return _Panel()


INIT = Command(
    "init",
    "connect to the TuFT server of this notebook, or start one",
    _init,
    _init_options,
    description="Connect to the TuFT server of this notebook, or start one. Afterwards tinker.ServiceClient() "
    "works without arguments.",
    example="%tuft init tuft/demo",
    complete=lambda: ["tuft/demo"],
)
STATUS = Command("status", "what this kernel is connected to, and what is loaded there", _status)
OPEN = Command("open", "open the panel with curves and checkpoints beside the notebook", _panel)
CONFIG = Command(
    "config",
    "print the configuration that would be generated",
    lambda arguments: Text(doctor.shown_config(arguments.model)),
    _config_options,
)
DOCTOR = Command(
    "doctor",
    "versions, interpreters and what is missing",
    lambda _: Table("TuFT doctor", doctor.findings()),
)
SHUTDOWN = Command("shutdown", "disconnect; a server that this kernel started is stopped", _shutdown)
