"""``%%tuft_train``: a training cell with its curve, that an interrupt stops at the end of a step, saved.

It runs the cell as IPython would, with :class:`~tuft_jupyter.kernel.stopping.Stopping` around it. An interrupted cell
counts as failed, so "run all" stops there; what it had reached is a checkpoint, and the run can go on.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any

from tuft_jupyter.kernel import continuity
from tuft_jupyter.kernel.errors import TuftConnectionError
from tuft_jupyter.kernel.report import Progress, in_notebook
from tuft_jupyter.kernel.stopping import Stopped, Stopping

NO_AWAIT = (
    "%%tuft_train cannot run `await` at the top of a cell: use .result(), or put the loop into a plain cell."
)
SEARCH = 2.0
"""Seconds within which a training client that the cell made is found and its curve shown."""
LOST = 30.0
"""Seconds after which a request that does not leave this process is given up."""


def train(shell: Any, cell: str, save: bool = True, curve: bool = True) -> None:
    """Run a cell; Stopped, with what was reached as its message, if it was interrupted."""
    run = code_of(shell, cell)
    report = Progress("TuFT training")
    stopping = Stopping(continuity.runs, lambda text: report("interrupt", text))
    try:
        with stopping:
            if curve and in_notebook():
                _show_curve(stopping)
            run()
    except KeyboardInterrupt:
        if not stopping.asked:
            raise
    if stopping.asked:
        raise Stopped(_finish(stopping, report, save)) from None


def code_of(shell: Any, cell: str) -> Callable[[], None]:
    """The cell as IPython reads it: magics are known, a last expression is shown, tracebacks show its lines."""
    text = shell.transform_cell(cell)
    name = shell.compile.cache(text, shell.execution_count, raw_code=cell)
    tree = shell.compile.ast_parse(text, filename=name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    parts = [compile(tree, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)]
    if last is not None:
        shown = ast.Interactive([last])
        parts.append(compile(shown, name, "single", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT))
    if any(part.co_flags & inspect.CO_COROUTINE for part in parts):
        raise TuftConnectionError(NO_AWAIT)

    def run() -> None:
        for part in parts:
            shell.ex(part)

    return run


def _finish(stopping: Stopping, report: Progress, save: bool) -> str:
    """Wait for what is out, save what was reached; the sentence that says so."""
    clients = stopping.used()
    if not clients:
        return "TuFT: stopped before any training."
    if not stopping.settle(clients, LOST):
        return (
            "TuFT: stopped in the middle of a request, and nothing was saved. The server keeps what it was sent; "
            "`training = %tuft resume` goes on from there."
        )
    report("interrupt", "no request is left")
    by_run = {client.model_id: client for client in clients}
    told = []
    for run in stopping.trained(clients):
        where = f"run {continuity.short(run['id'])} stopped after step {run['step']}"
        if run["passes"]:
            where += ", in the middle of the next one: its gradients are added to the next step's"
        told.append(f"{where}; saved as {_saved(by_run[run['id']], run['step'], report)}" if save else where)
    return "TuFT: " + "; ".join(told) + ". Run the cell again to go on."


def _saved(client: Any, step: int, report: Progress) -> str:
    name = f"interrupted-{step}"
    report("checkpoint", f"saving {name} ...")
    path: str = client.save_state(name, overwrite=True).result().path
    report("checkpoint", path)
    return path


def _show_curve(stopping: Stopping) -> None:
    from IPython.display import display

    from tuft_jupyter.kernel.widgets import LossCurve

    display(LossCurve(lambda: [client.model_id for client in stopping.used(age=SEARCH)]))
