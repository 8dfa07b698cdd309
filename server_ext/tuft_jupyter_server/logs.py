"""How a daemon logs: lines for people or JSON for machines, each with the request it belongs to; and an extension.

Nothing that a tenant sent is logged: no keys, bodies, prompts or names, at any level. A request's id is the client's
``X-Request-Id`` where that is a plain word, else made here; it goes back in the answer.
"""

from __future__ import annotations

import contextvars
import json
import logging
import re
import secrets
import sys
import time

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("tuft_request_id", default="")
PLAIN = re.compile(r"[A-Za-z0-9._-]{1,64}")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
QUIET = dict.fromkeys(("tornado.access", "tornado.general", "httpx", "httpcore"), logging.WARNING)


def begin_request(given: str | None) -> str:
    """Name the request that this task answers from here on."""
    name = given if given and PLAIN.fullmatch(given) else secrets.token_hex(8)
    request_id.set(name)
    return name


class Named(logging.Filter):
    """Puts the request's id on every record."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


class Json(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and where there is one, request and traceback."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if getattr(record, "request_id", ""):
            entry["request_id"] = record.request_id  # type: ignore[attr-defined]
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class Lines(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """One line, whatever is in it: nobody's text begins a line of its own or moves a terminal's cursor."""
        return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        name = getattr(record, "request_id", "")
        return f"{line} [{name}]" if name else line


def configure(level: str, form: str) -> None:
    """Log to stderr. Libraries that would log requests or bodies stay at warnings, whatever the level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Named())
    handler.setFormatter(Json() if form == "json" else Lines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name, least in QUIET.items():
        logging.getLogger(name).setLevel(least)


def join(server: logging.Logger, level: int) -> None:
    """Have our loggers write where a notebook server's does, from ``level`` on; the panel gets no fewer lines by it."""
    ours = logging.getLogger("tuft_jupyter")
    ours.parent = server
    ours.setLevel(min(level, logging.INFO))
