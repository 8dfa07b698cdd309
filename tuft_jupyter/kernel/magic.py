"""``%tuft``: everything about fine-tuning that is typed into a cell and is not Python.

A thin skin over the command table: it reads the line, shows what comes back as rich output, and turns every failure
into one sentence (the cell still counts as failed, so "run all" stops there).
"""

from __future__ import annotations

import argparse
import re
import shlex
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, NoReturn

from IPython.core.magic import Magics, cell_magic, line_magic, magics_class
from IPython.display import display

from tuft_jupyter.kernel import training_cell
from tuft_jupyter.kernel.commands.command import Text
from tuft_jupyter.kernel.commands.table import COMMANDS
from tuft_jupyter.kernel.errors import TuftConnectionError

_COMMENT = re.compile(r"(?<!\S)#")
_QUESTION = re.compile(r"^(\s*)%tuft\s+(sample\s.*\?)\s*$")
VERBS = {command.name: command for command in COMMANDS}


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
    for command in COMMANDS:
        example = f"Example: {command.example}" if command.example else None
        below = verbs.add_parser(
            command.name, help=command.help, description=command.description or command.help, epilog=example
        )
        command.options(below)
    return top


def train_parser() -> argparse.ArgumentParser:
    options = _Parser(prog="%%tuft_train", add_help=False)
    options.add_argument("--no-save", action="store_true", help="save nothing when it is interrupted")
    options.add_argument("--no-curve", action="store_true", help="show no curve below the cell")
    return options


def split(magic: str, line: str) -> list[str]:
    """The words of a line, as a shell reads them: a ``#`` that begins a word outside quotation begins a comment."""
    for comment in _COMMENT.finditer(line):
        with suppress(ValueError):  # an open quotation before it: the # belongs to a prompt
            return shlex.split(line[: comment.start()])
    try:
        return shlex.split(line)
    except ValueError as error:
        raise TuftConnectionError(f"{magic} {line}: {error}. Close the quotation.") from None


def run(line: str) -> Any:
    """Carry out one ``%tuft`` line and show what it found, wherever in a cell the line stands.

    Returns what is meant for the program, a training client, else None.
    """
    words = split("%tuft", line)
    if words and not words[0].startswith("-") and words[0] not in VERBS:
        near = get_close_matches(words[0], VERBS, n=1)
        meant = f"; did you mean `%tuft {near[0]}`?" if near else "."
        raise TuftConnectionError(f"%tuft has no command {words[0]!r}{meant} `%tuft --help` lists them.")
    try:
        arguments, unknown = parser().parse_known_args(
            [word.replace("model=", "--model=", 1) if word.startswith("model=") else word for word in words]
        )
    except _Help as text:
        return display(Text(str(text)))
    if unknown:
        raise TuftConnectionError(
            f"unrecognized arguments: {' '.join(unknown)}; `%tuft {arguments.verb or ''} --help` lists what it takes."
        )
    if arguments.verb is None:
        return display(Text(parser().format_help()))
    command = VERBS[arguments.verb]
    found = command.run(arguments)
    return found if command.returns or found is None else display(found)


@magics_class
class TuftMagics(Magics):
    @line_magic
    def tuft(self, line: str) -> Any:
        """Fine-tuning as a notebook primitive: ``%tuft init [MODEL]``, ``%tuft runs``, ``%tuft resume`` ...

        ``%tuft --help`` and ``%tuft init --help`` say more.
        """
        return run(line)

    @cell_magic
    def tuft_train(self, line: str, cell: str) -> None:
        """A training loop that Kernel > Interrupt stops where a step ends: ``%%tuft_train [--no-save] [--no-curve]``.

        What was reached is saved, and no request is left behind. A curve grows below the cell.
        """
        options = train_parser().parse_args(split("%%tuft_train", line))
        training_cell.train(self.shell, cell, not options.no_save, not options.no_curve)


def complete(_: Any, event: Any) -> list[str]:
    """Tab completion for ``%tuft``: the verbs, then the verb's options and what it can be given."""
    words = event.line.split()
    if event.line.endswith(" "):
        words.append("")
    words = words[words.index("%tuft") :] if "%tuft" in words else words
    if len(words) <= 2:
        return list(VERBS)
    command = VERBS.get(words[1])
    if command is None:
        return []
    options = _Parser()
    command.options(options)
    return [*(name for action in options._actions for name in action.option_strings), *command.complete()]


def keep_questions(lines: list[str]) -> list[str]:
    """IPython takes a question mark at the end of a line for a call for help; at the end of a prompt it is none."""
    return [
        _QUESTION.sub(lambda m: f"{m[1]}get_ipython().run_line_magic('tuft', {m[2]!r})\n", s) for s in lines
    ]


def load(shell: Any) -> None:
    """Register the magic and its completion with an IPython shell."""
    shell.register_magics(TuftMagics)
    shell.input_transformers_cleanup.append(keep_questions)
    shell.set_hook("complete_command", complete, str_key="%tuft")
