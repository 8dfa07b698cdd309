"""A directory of ours for weights that a training server keeps: a note of where, and the files if they are here too.

The note is one small JSON file beside the adapter's own. A checkpoint with an optimizer, a snapshot, and what is only
sampled there are found again by it, also after a restart of either server.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tuft_jupyter.core.durable import make, sync, sync_all
from tuft_jupyter.core.errors import UserError

NOTE = "kept_there.json"


@dataclass(frozen=True, slots=True)
class KeptThere:
    """``path`` is the checkpoint's there (``tinker://...``), ``url`` the server's address when it was made.

    ``older`` are snapshots that were still there when this one was made.
    """

    url: str
    path: str
    older: Sequence[str] = ()


def read(directory: Path) -> KeptThere:
    """UserError if the weights of a directory are not on a training server, or the note cannot be read."""
    try:
        return KeptThere(**json.loads((directory / NOTE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(
            "these weights were not made on the training server that is configured, and cannot be sent to it: train "
            "where they were made, or sample from them with backends.sampling set to torch, vllm or external"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"the note {directory / NOTE} of where these weights are cannot be read ({error}): save them again"
        ) from None


def write(directory: Path, note: KeptThere) -> None:
    """Put a note into a directory that is being made."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / NOTE).write_text(json.dumps(asdict(note)), encoding="utf-8")


def beside(directory: Path) -> Path:
    """Where a directory is made before it gets its name, whole or not at all."""
    made = directory.parent / f".{uuid.uuid4().hex}.part"
    make(made)
    return made


def finish(made: Path, directory: Path) -> int:
    """Give it its name, when it is on the disk; returns the size of its files in bytes."""
    sync_all(made)
    shutil.rmtree(directory, ignore_errors=True)
    made.rename(directory)
    sync(directory.parent)
    return sum(file.stat().st_size for file in directory.iterdir())


class Copies:
    """Which of our directories stand for what there, so that a copy whose directory was deleted can be deleted too.

    Blocks on files: for a thread. Directories from before this process are found when their parent is first seen.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._known: dict[Path, dict[Path, str]] = {}

    def saved(self, directory: Path) -> list[str]:
        """A directory was just made. Returns the paths of copies whose directories beside it are gone.

        Only then, because whoever can write there sees it: a disk that is not mounted is no deletion.
        """
        before = self._known.get(directory.parent, {})
        gone = [path for known, path in before.items() if not known.is_dir()]
        found = {known: path for known, path in before.items() if known.is_dir()}
        for each in [directory] if before else directory.parent.iterdir():
            with contextlib.suppress(UserError):  # weights of our own; a note that a crash cut off
                note = read(each)
                if note.url == self._url:
                    found[each] = note.path
        self._known[directory.parent] = found
        return gone
