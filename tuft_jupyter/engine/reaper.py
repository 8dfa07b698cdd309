"""A process that outlives its parent by a moment, to end what the parent left behind.

Run as a program with a pipe as standard input. A line names a process, ``<pid> <creation time>``, or the directories
of Ray sessions, ``<path>`` with ``*`` for any characters. When the pipe closes, because the parent closed it or died in
whatever way, the processes that still run are killed, and so are Ray's that work for such a session: a raylet starts
some of them late, also while it is being killed, and they live on without it (measured with Ray 2.60). So they are
looked for again each second for a while, unless a line said ``done``: then the parent had ended Ray in good order. It
never kills a process that merely inherited a pid, or one that is not Ray's.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable
from fnmatch import fnmatch

import psutil

DONE = "done"
SECONDS = 5.0
"""How long the sessions' processes are looked for, once a second."""


def main(lines: Iterable[str]) -> None:
    """Read names until the pipe closes, then kill."""
    names = {line.rstrip("\n") for line in lines}
    sessions = {name for name in names if name.startswith("/")}
    for name in names - sessions - {DONE}:
        pid, created = name.split()
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(pid))
            if abs(process.create_time() - float(created)) < 0.1:
                process.kill()
    deadline = time.monotonic() + (SECONDS if sessions and DONE not in names else 0.0)
    while True:
        for process in psutil.process_iter() if sessions else ():
            with contextlib.suppress(psutil.Error):
                if _works_for(process, sessions):
                    process.kill()
        if time.monotonic() >= deadline:
            return
        time.sleep(1.0)


def _works_for(process: psutil.Process, sessions: Iterable[str]) -> bool:
    """By its arguments while it starts; later Ray writes over those, and it has its log open."""
    if process.name().startswith("ray::"):
        paths = [file.path for file in process.open_files()]
    else:
        paths = [part.partition("=")[2] for part in process.cmdline() if part.startswith("--session-dir=")]
    return any(fnmatch(f"{path}/", f"{session}/*") for path in paths for session in sessions)


if __name__ == "__main__":
    main(sys.stdin)
