"""Files that were moved: what the journal knows by an old path is found below the directories of today.

An operator renames a home, mounts a volume elsewhere, sets another ``checkpoint_dir``. The last part of each of our
directories is random and occurs once, so it is enough to find it again. Nothing is looked for that is where it was.
What is still to be written goes below the directories of today.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuft_jupyter.core.objects import State

log = logging.getLogger("tuft_jupyter.service")


@dataclass(frozen=True, slots=True)
class Places:
    """Where checkpoints, snapshots (one more level: by run) and ephemeral weights lie today."""

    checkpoints: Path
    snapshots: Path
    ephemeral: Path

    def today(self, directory: str) -> str:
        """Where a directory of the journal is now; as it was told if it is found nowhere."""
        told = Path(directory)
        if told.is_dir():
            return directory
        below = (
            self.checkpoints / told.name,
            self.ephemeral / told.name,
            self.snapshots.joinpath(*told.parts[-2:]),
        )
        return next((str(path) for path in below if path.is_dir()), directory)

    def relocate(self, args: Mapping[str, Any]) -> Mapping[str, Any]:
        """An accepted op's arguments as they hold today: where its weights are read, or will be written."""
        if "directory" not in args:
            return args
        facts = args.get("facts", {})
        for made, root in (("checkpoint", self.checkpoints), ("sampler", self.ephemeral)):
            if made in facts:
                directory = str(root / Path(args["directory"]).name)
                facts = {**facts, made: {**facts[made], "directory": directory}}
                return {**args, "directory": directory, "facts": facts}
        return {**args, "directory": self.today(args["directory"])}

    def settle(self, state: State) -> None:
        """Put today's places into a state that was just read; a warning if checkpoints lie nowhere."""
        for checkpoint in state.checkpoints.values():
            checkpoint.directory = self.today(checkpoint.directory)
        for sampler in state.samplers.values():
            if sampler.directory is not None:
                sampler.directory = self.today(sampler.directory)
        for run in state.runs.values():
            run.sources = [self.today(directory) for directory in run.sources]
            if run.snapshot is not None:
                run.snapshot = self.today(run.snapshot)
        state.garbage = {self.today(directory) for directory in state.garbage}
        lost = [c.path for c in state.checkpoints.values() if not Path(c.directory).is_dir()]
        if lost:
            log.warning(
                "the files of %d of %d checkpoints are not below %s, those of %s for one: if they were moved, "
                "set checkpoint_dir to where they are and restart",
                len(lost), len(state.checkpoints), self.checkpoints, lost[0],
            )  # fmt: skip
