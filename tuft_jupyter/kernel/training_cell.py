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


def train(shell: Any, cell: str, save: bool = True, curve: bool = True) -> None:
    """Run a cell; Stopped, with what was reached as its message, if it was interrupted."""
    run = code_of(shell, cell)
    report = Progress("TuFT training")
    stopping = Stopping(
        lambda text: report("interrupt", text), _show_curve if curve and in_notebook() else _nothing
    )
    try:
        with stopping:
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
    if stopping.out:
        report("interrupt", f"waiting for the answers to {len(stopping.out)} requests ...")
    stopping.settle()
    report("interrupt", "no request is left")
    if not stopping.clients:
        return "TuFT: stopped before any training."
    known = {run["id"]: run for run in continuity.runs()}
    told = []
    for client in stopping.clients:
        run = known.get(client.model_id)
        if run is None:
            continue
        where = f"run {continuity.short(run['id'])} stopped after step {run['step']}"
        if not stopping.between_steps:
            where += ", in the middle of the next one: its gradients are added to the next step's"
        told.append(f"{where}; saved as {_saved(client, run['step'], report)}" if save else where)
    return "TuFT: " + "; ".join(told) + ". Run the cell again to go on."


def _saved(client: Any, step: int, report: Progress) -> str:
    name = f"interrupted-{step}"
    report("checkpoint", f"saving {name} ...")
    path: str = client.save_state(name, overwrite=True).result().path
    report("checkpoint", path)
    return path


def _show_curve(client: Any) -> None:
    from IPython.display import display

    from tuft_jupyter.kernel.widgets import LossCurve

    display(LossCurve(client))


def _nothing(_: Any) -> None:
    """No curve."""
