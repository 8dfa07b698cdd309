"""Asking: one prompt, the answers of a base model and of any checkpoints, printed as they are drawn."""

from __future__ import annotations

import argparse
import sys

from tuft_jupyter.kernel import connect, continuity, models
from tuft_jupyter.kernel.answers import Drawing, answer
from tuft_jupyter.kernel.client import Client, Refused, Unreachable
from tuft_jupyter.kernel.commands.command import Command
from tuft_jupyter.kernel.errors import TuftConnectionError, in_a_sentence
from tuft_jupyter.kernel.report import Progress, meanwhile


def named(client: Client, name: str) -> str:
    """What the server calls it: a base model, a checkpoint, or a run by its short form."""
    if name in client.models() or name.startswith("tinker://"):
        return name
    return str(continuity.find(client, name)["id"])


def _sample(arguments: argparse.Namespace) -> None:
    connection = continuity.connected()
    client = connection.client
    drawing = Drawing(
        arguments.max_tokens, arguments.temperature, arguments.top_p, arguments.seed, not arguments.plain
    )
    prompt = " ".join(arguments.prompt)
    with in_a_sentence(client):
        asked = [named(client, name) for name in arguments.model or []]
        for model in asked or [connection.model or models.only_model(client)]:
            pieces = answer(client, model, prompt, drawing)
            with meanwhile(Progress("TuFT sample"), "answer", lambda: _waits_for(client)):
                first = next(pieces, "")
            sys.stdout.write(f"{model}: {first}")
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")


def _waits_for(client: Client) -> str:
    try:
        return str(client.status().get("waiting_for") or "the answer is being drawn")
    except (Refused, Unreachable):  # the request itself will say what is wrong
        return "the server is asked"


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="+", help="what is asked, in quotation marks")
    parser.add_argument(
        "--model",
        "-m",
        action="append",
        metavar="M",
        help="a base model, a checkpoint's tinker:// path, or a run (its newest save); more than one may be named",
    )
    drawing = Drawing()
    parser.add_argument("--max-tokens", type=int, default=drawing.max_tokens, help="(default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=drawing.temperature, help="(default: %(default)s)"
    )
    parser.add_argument("--top-p", type=float, default=drawing.top_p, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, help="the same seed gives the same answer")
    parser.add_argument("--plain", action="store_true", help="go on with the text instead of answering it")


def _known() -> list[str]:
    connection = connect.current()
    if connection is None:
        return []
    try:
        with in_a_sentence(connection.client):
            saved = [c["path"] for c in connection.client.outlook()["checkpoints"]]
            return [*connection.client.models(), *saved]
    except TuftConnectionError:
        return []


SAMPLE = Command(
    "sample",
    "ask a base model or checkpoints, side by side",
    _sample,
    _options,
    example='%tuft sample "Where is the treasure?" -m tuft/demo -m 6f1c2a52:0',
    complete=_known,
)
