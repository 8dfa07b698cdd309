"""``%tuft``: connect, look, disconnect, from a notebook cell.

A thin skin over :mod:`~tuft_jupyter.kernel.connect`: it reads the line, shows what comes back as rich output,
and turns every failure into one sentence (the cell still counts as failed, so "run all" stops there).
"""

from __future__ import annotations

import argparse
import shlex
from typing import Any, NoReturn

from IPython.core.magic import Magics, line_magic, magics_class

from tuft_jupyter.kernel import connect, doctor
from tuft_jupyter.kernel.errors import TuftConnectionError
from tuft_jupyter.kernel.report import Table

VERBS = ("init", "status", "shutdown", "config", "doctor")
OPTIONS = {
    "init": ("--model", "--address", "--config", "--here", "--help", "tuft/demo"),
    "config": ("--show",),
}


class _Help(Exception):
    """The line asked for help; the text is the help."""


class _Parser(argparse.ArgumentParser):
    """An argument parser that never ends the kernel."""

    def error(self, message: str) -> NoReturn:
        raise TuftConnectionError(f"{message}. Usage: {' '.join(self.format_usage().split()[1:])}")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise _Help

    def print_help(self, file: Any = None) -> None:
        raise _Help(self.format_help())


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="%tuft", description="Fine-tuning as a notebook primitive.")
    verbs = top.add_subparsers(dest="verb", metavar="{" + ",".join(VERBS) + "}", parser_class=_Parser)
    init = verbs.add_parser(
        "init",
        help="connect to the TuFT server of this notebook, or start one",
        description="Connect to the TuFT server of this notebook, or start one. Afterwards "
        "tinker.ServiceClient() works without arguments.",
        epilog="Example: %%tuft init tuft/demo",
    )
    init.add_argument("model", nargs="?", help="base model: a directory, a hub id, or tuft/demo")
    init.add_argument("--model", "-m", dest="model_option", metavar="M", help="the same, as an option")
    init.add_argument("--address", metavar="URL", help="connect to this server and no other")
    init.add_argument("--config", "-c", metavar="FILE", help="configuration of the server, if one is started")
    init.add_argument("--here", action="store_true", help="ignore a TINKER_BASE_URL of your own")
    verbs.add_parser("status", help="what this kernel is connected to, and what is loaded there")
    verbs.add_parser("shutdown", help="disconnect; a server that this kernel started is stopped")
    config = verbs.add_parser("config", help="print the configuration that would be generated")
    config.add_argument("--show", action="store_true", help="print it (the default)")
    config.add_argument("model", nargs="?", default=None)
    verbs.add_parser("doctor", help="versions, interpreters and what is missing")
    return top


def run(line: str) -> Any:
    """Carry out one ``%tuft`` line; returns what the cell shows, None where progress was shown already."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise TuftConnectionError(f"%tuft {line}: {error}. Close the quotation.") from None
    try:
        arguments = parser().parse_args(
            [word.replace("model=", "--model=", 1) if word.startswith("model=") else word for word in words]
        )
    except _Help as text:
        return _Text(str(text))
    match arguments.verb:
        case "init":
            connect.init(
                arguments.model_option or arguments.model,
                address=arguments.address,
                config=arguments.config,
                here=arguments.here,
            )
            return None
        case "status":
            return _status()
        case "shutdown":
            was_on = connect.is_initialized()
            connect.shutdown()
            return _Text("TuFT: disconnected." if was_on else "TuFT: was not connected.")
        case "config":
            return _Text(doctor.shown_config(arguments.model))
        case "doctor":
            return Table("TuFT doctor", doctor.findings())
        case _:
            return _Text(parser().format_help())


def _status() -> Table:
    connection = connect.current()
    if connection is None:
        return Table("TuFT: not connected", [("next", "%tuft init (or %tuft init tuft/demo) connects")])
    return connection.table()


class _Text(str):
    """Text that the notebook shows as it is, without quotation marks."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


@magics_class
class TuftMagics(Magics):
    @line_magic
    def tuft(self, line: str) -> Any:
        """Fine-tuning as a notebook primitive: ``%tuft init [MODEL]``, ``%tuft status``, ``%tuft shutdown``.

        ``%tuft --help`` and ``%tuft init --help`` say more.
        """
        return run(line)


def complete(_: Any, event: Any) -> list[str]:
    """Tab completion for ``%tuft``: the verbs, then the options of the verb."""
    words = event.line.split()
    if event.line.endswith(" "):
        words.append("")
    if len(words) <= 2:
        return list(VERBS)
    return list(OPTIONS.get(words[1], ()))


def load(shell: Any) -> None:
    """Register the magic and its completion with an IPython shell."""
    shell.register_magics(TuftMagics)
    shell.set_hook("complete_command", complete, str_key="%tuft")
