"""``RunTable`` and ``CheckpointTable``: what there is, live."""

from __future__ import annotations

from typing import Any

import traitlets

from tuft_jupyter.kernel import continuity
from tuft_jupyter.kernel.widgets.live import Live, Watcher, name_of, script

RUN_FIELDS = (
    "id",
    "base_model",
    "rank",
    "status",
    "pending",
    "step",
    "loss",
    "tokens_per_second",
    "last_request",
    "why",
)
CHECKPOINT_FIELDS = ("path", "run", "kind", "name", "step", "size_bytes", "created", "expires", "public")


class RunTable(Live):
    """This user's runs: state, step, loss now, tokens per second, and why one waits."""

    _esm = script("run_table")

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        self._watcher = Watcher(self.client)

    def look(self, patience: float) -> dict[str, Any]:
        runs = sorted(self._watcher.look(patience)["runs"], key=lambda run: -run["created"])
        shown = [{name: run[name] for name in RUN_FIELDS} for run in runs]
        return {"runs": [{**run, "name": continuity.short(run["id"])} for run in shown]}

    def words(self) -> str:
        runs = self.client.outlook()["runs"]
        busy = sum(1 for run in runs if run["pending"])
        return f"{len(runs)} runs, {busy} at work"


class CheckpointTable(Live):
    """This user's checkpoints, or those of one ``run``: path, step, size, age, and the code that loads one."""

    _esm = script("checkpoint_table")

    run = traitlets.Unicode("").tag(sync=True)

    def __init__(self, run: Any = None, **traits: Any) -> None:
        super().__init__(**traits)
        if run is not None:
            self.run = continuity.find(self.client, name_of(run))["id"]
        self._watcher = Watcher(self.client)

    def look(self, patience: float) -> dict[str, Any]:
        found = self._mine(self._watcher.look(patience)["checkpoints"])
        return {"checkpoints": [{name: c[name] for name in CHECKPOINT_FIELDS} for c in found]}

    def words(self) -> str:
        found = self._mine(self.client.outlook()["checkpoints"])
        return "; ".join(f"{c['path']} (step {c['step']})" for c in found) or "no checkpoint yet"

    def _mine(self, checkpoints: list[dict[str, Any]]) -> list[dict[str, Any]]:
        mine = [c for c in checkpoints if not self.run or c["run"] == self.run]
        return sorted(mine, key=lambda c: -c["created"])
