"""The last lines of our own log, for whoever looks at the panel.

Only what the loggers below ``tuft_jupyter`` write is kept, in memory, and no line is longer than ``WIDTH``.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

KEPT = 200
WIDTH = 500


class LogTail(logging.Handler):
    """Keeps the last ``KEPT`` lines; each has a number, so that a reader can ask for what is new."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._lines: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._count = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except (TypeError, ValueError):  # a format that does not fit its arguments must not end the program
            text = str(record.msg)
        sendable = text[:WIDTH].encode(errors="replace").decode()  # a path may be no UTF-8, a message must be
        self._count += 1
        line = {"n": self._count, "time": record.created, "level": record.levelname.lower()}
        self._lines.append({**line, "text": sendable})

    def since(self, n: int) -> list[dict[str, Any]]:
        """The lines after number ``n``, as far as they are kept."""
        return [line for line in list(self._lines) if line["n"] > n]


TAIL = LogTail()


def listen() -> None:
    """Keep what is logged from now on; once per process."""
    log = logging.getLogger("tuft_jupyter")
    if TAIL not in log.handlers:
        log.addHandler(TAIL)
    if log.getEffectiveLevel() > logging.INFO:
        log.setLevel(logging.INFO)
