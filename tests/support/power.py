"""What a power failure may take: everything of a directory that was not synced, content and names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


class Power:
    """Notes what is synced from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._synced: dict[int, set[str]] = {}
        fsync = os.fsync

        def noted(handle: int) -> None:
            fsync(handle)
            place = Path(f"/proc/self/fd/{handle}").resolve()
            names = {each.name for each in place.iterdir()} if place.is_dir() else set()
            self._synced[os.fstat(handle).st_ino] = names

        monkeypatch.setattr(os, "fsync", noted)

    def lost(self, directory: Path, root: Path) -> list[str]:
        """What a failure now takes of a directory's files and of the names that lead to it from ``root``."""
        lost = [str(file) for file in directory.iterdir() if file.stat().st_ino not in self._synced]
        named = [*directory.iterdir(), directory, *directory.parents]
        return lost + [
            f"the name of {path}"
            for path in named[: named.index(root)]
            if path.name not in self._synced.get(path.parent.stat().st_ino, set())
        ]
