"""Directories that survive a power failure: what a file is called is as durable as the directory that says so.

POSIX keeps the content of a file once the file is synced, and its name once its directory is, level by level. Blocks on
the disk: for a thread or a worker.
"""

from __future__ import annotations

import os
from pathlib import Path


def make(directory: Path) -> None:
    """Make a directory, with those above it that are missing, if it is not there."""
    missing = []
    above = directory
    while not above.is_dir():
        missing.append(above)
        above = above.parent
    directory.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)


def sync_all(directory: Path) -> None:
    """The files in a directory, and that they are in it; not yet the directory's own name."""
    for path in (*directory.iterdir(), directory):
        sync(path)


def sync(path: Path) -> None:
    """A file's content, or the names in a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
