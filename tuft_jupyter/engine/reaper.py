"""A process that outlives its parent by a moment, to end what the parent left behind.

Run as a program with a pipe as standard input. Each line names a process, ``<pid> <creation time>``; when the pipe
closes, because the parent closed it or died in whatever way, those that still run are killed. Needed because some of
Ray's processes notice a killed driver only after a minute (measured with Ray 2.60). It knows nothing but pids, and
never kills a process that merely inherited one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable

import psutil


def main(lines: Iterable[str]) -> None:
    """Read names until the pipe closes, then kill."""
    wards = {tuple(line.split()) for line in lines}
    for pid, created in wards:
        with contextlib.suppress(psutil.Error, ValueError):
            process = psutil.Process(int(pid))
            if abs(process.create_time() - float(created)) < 0.1:
                process.kill()


if __name__ == "__main__":
    main(sys.stdin)
