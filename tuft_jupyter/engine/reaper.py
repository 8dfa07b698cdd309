"""A process that outlives its parent by a moment, to end what the parent left behind.

Run as a program with a pipe as standard input. A line names a process, ``<pid> <creation time>``, or the directory of a
Ray session, ``<path>``; when the pipe closes, because the parent closed it or died in whatever way, the processes that
still run are killed, and so are Ray's that write their logs there: a raylet starts some of them late, and they live on
without it (measured with Ray 2.60). It never kills a process that merely inherited a pid, or one that is not Ray's.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable

import psutil


def main(lines: Iterable[str]) -> None:
    """Read names until the pipe closes, then kill."""
    names = {line.rstrip("\n") for line in lines}
    folders = {name for name in names if name.startswith("/")}
    for name in names - folders:
        pid, created = name.split()
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(pid))
            if abs(process.create_time() - float(created)) < 0.1:
                process.kill()
    for process in psutil.process_iter() if folders else ():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("ray::") and any(
                file.path.startswith(tuple(folders)) for file in process.open_files()
            ):
                process.kill()


if __name__ == "__main__":
    main(sys.stdin)
