"""``LossCurve``: the curves of one or several runs, live, in the output of a cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import traitlets

from tuft_jupyter.kernel import continuity
from tuft_jupyter.kernel.report import number
from tuft_jupyter.kernel.widgets.downsampling import downsampled
from tuft_jupyter.kernel.widgets.live import Live, Watcher, asset, name_of, script

METRICS = ("loss", "grad_norm", "learning_rate", "tokens")
POINTS = 4000
"""Points of all curves together in one picture: more than a screen has columns."""


class LossCurve(Live):
    """Curves of runs over their steps: live, with log scale, smoothing, hover and the values as text.

    ``runs`` names them: a training client, a run's id or its short form, several of them, or a function that gives
    their ids whenever it is asked; without, the newest run, or the first one that is made. ``metric`` is ``loss``
    (nats per weighted token), ``grad_norm``, ``learning_rate`` or ``tokens``.
    """

    _esm = script("loss_curve", "built/uplot.js")
    _css = asset("built/uplot.css", "assets/widgets.css")

    runs = traitlets.List(traitlets.Unicode()).tag(sync=True)
    metric = traitlets.Enum(METRICS, "loss").tag(sync=True)
    log_scale = traitlets.Bool(False).tag(sync=True)
    smoothing = traitlets.Float(0.0, min=0.0, max=0.99).tag(sync=True)

    def __init__(self, runs: Any = None, **traits: Any) -> None:
        super().__init__(**traits)
        self._follow: Callable[[], list[str]] | None = None
        if callable(runs):
            self._follow = runs
        elif runs is not None:
            self.runs = [self._id_of(run) for run in (runs if isinstance(runs, list | tuple) else (runs,))]
        self._watcher = Watcher(self.client)
        self._columns: dict[str, dict[str, list[Any]]] = {}

    def look(self, patience: float) -> dict[str, Any]:
        if self._follow is not None:
            self.runs = self._follow()
        known = {run["id"]: run for run in self._watcher.look(patience)["runs"]}
        shown = self._shown(known)
        for run in shown:
            self._fetch(run["id"])
        most = max(POINTS // max(len(shown), 1), 100)
        return {
            "runs": [
                {
                    "id": run["id"],
                    "name": continuity.short(run["id"]),
                    "live": run["pending"] > 0,
                    "status": run["status"],
                    "step": run["step"],
                    "why": run["why"],
                    "columns": downsampled(self._columns[run["id"]], METRICS, most),
                }
                for run in shown
            ],
            "missing": [run for run in self.runs if run not in known],
        }

    def words(self) -> str:
        known = {run["id"]: run for run in self.client.outlook()["runs"]}
        told = [
            f"{continuity.short(run['id'])} step {run['step']}"
            + (f", loss {number(run['loss'])}" if run["loss"] is not None else "")
            for run in self._shown(known)
        ]
        return "; ".join(told) or ("no run yet" if self._follow is None else "the runs that this cell trains")

    def _shown(self, known: dict[str, Any]) -> list[dict[str, Any]]:
        if self.runs or self._follow is not None:
            return [known[run] for run in self.runs if run in known]
        newest = max(known.values(), key=lambda run: run["created"], default=None)
        return [] if newest is None else [newest]

    def _fetch(self, run: str) -> None:
        """Fetch what is new of a curve; it only ever grows."""
        columns = self._columns.setdefault(run, {})
        fresh = self.client.curve(run, len(columns.get("step", ())))
        for name, values in fresh.items():
            columns.setdefault(name, []).extend(values)

    def _id_of(self, run: Any) -> str:
        found: str = continuity.find(self.client, name_of(run))["id"]
        return found
