"""What connecting looks like: the phases as they are reached, and the connection at a glance.

In a notebook one output is drawn and redrawn; elsewhere each phase is a line. Every value is escaped in HTML
and has a plain text beside it. It knows nothing of servers: it is told names and texts.
"""

from __future__ import annotations

import html
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

CARD = (
    "font-family: var(--jp-ui-font-family, sans-serif); font-size: var(--jp-ui-font-size1, 13px);"
    " color: var(--jp-ui-font-color1, inherit); border-left: 3px solid var(--jp-brand-color1, #1976d2);"
    " padding: 4px 12px; margin: 4px 0;"
)
ROWS = "margin: 4px 0; color: inherit; font-size: inherit;"
FAINT = "color: var(--jp-ui-font-color2, #666); padding-right: 12px; text-align: left; vertical-align: top;"
PLAIN_CELL = "text-align: left; vertical-align: top;"
NUMBER = "text-align: right; vertical-align: top; font-variant-numeric: tabular-nums;"
_NUMBER = re.compile(r"-?\d[\d.,e+-]*( .*)?")
"""A number, alone or with its unit; a run's short name may begin with a digit and is none."""
CLOCK_SECONDS = 1.0
"""How often the seconds are drawn while something is waited for."""
BAR = '<progress style="width: 6em; height: 0.7em; vertical-align: middle; accent-color: var(--jp-brand-color1)">'


class Table:
    """Rows of a label and a text, as plain text and as HTML."""

    def __init__(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        self.title = title
        self.rows = [(label, text) for label, text in rows if text]

    def __repr__(self) -> str:
        width = max((len(label) for label, _ in self.rows), default=0)
        lines = []
        for label, text in self.rows:
            first, *more = text.splitlines() or [""]
            lines += [f"  {label:<{width}}  {first}", *(f"  {'':<{width}}  {line}" for line in more)]
        return "\n".join([self.title, *lines])

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr style="background: none"><td style="{FAINT}">{html.escape(label)}</td>'
            f'<td style="{PLAIN_CELL}">{html.escape(text).replace(chr(10), "<br>")}{_bar(text)}</td></tr>'
            for label, text in self.rows
        )
        title = f"<strong>{html.escape(self.title)}</strong>"
        return f'<div style="{CARD}">{title}<table style="{ROWS}">{rows}</table></div>'


class Grid:
    """Columns with headings, as plain text and as HTML; ``foot`` is a line below. Numbers stand to the right."""

    def __init__(
        self, title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], foot: str = ""
    ) -> None:
        self.title = title
        self.columns = list(columns)
        self.rows = [["" if value is None else value for value in row] for row in rows]
        self.foot = foot

    def __repr__(self) -> str:
        lines = [self.columns, *([str(value) for value in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [self.title]
        for n, line in enumerate(lines if self.rows else []):
            cells = [
                text.rjust(width) if n and self._number(n - 1, i) else text.ljust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            ]
            texts.append("  " + "  ".join(cells).rstrip())
        return "\n".join([*texts, f"  {self.foot}"] if self.foot else texts)

    def _repr_html_(self) -> str:
        head = "".join(f'<th style="{FAINT}">{html.escape(name)}</th>' for name in self.columns)
        body = "".join(
            '<tr style="background: none">'
            + "".join(
                f'<td style="{NUMBER if self._number(n, i) else PLAIN_CELL}">{html.escape(str(value))}</td>'
                for i, value in enumerate(row)
            )
            + "</tr>"
            for n, row in enumerate(self.rows)
        )
        table = f'<table style="{ROWS}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        foot = f'<div style="{FAINT}">{html.escape(self.foot)}</div>' if self.foot else ""
        title = f"<strong>{html.escape(self.title)}</strong>"
        return f'<div style="{CARD}">{title}{table if self.rows else ""}{foot}</div>'

    def _number(self, row: int, column: int) -> bool:
        return _NUMBER.fullmatch(str(self.rows[row][column])) is not None


def ago(seconds: float) -> str:
    """A time that has passed, in its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def size(count: float) -> str:
    """Bytes, in a unit that reads well."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def number(value: float | None) -> str:
    """Four digits of a number that was measured; nothing for None."""
    return "" if value is None else f"{value:.4g}"


class Progress:
    """Reports phases: ``progress("discovered", "http://... (TUFT_ADDRESS)")``. A phase told again is
    updated; one whose text ends in " ..." is still waited for: it shows a bar, and the clock goes on.
    """

    def __init__(self, title: str = "TuFT") -> None:
        self.title = title
        self._phases: dict[str, str] = {}
        self._began = self._drawn = time.monotonic()
        self._handle = None
        self._notebook = in_notebook()

    def __call__(self, phase: str, text: str) -> None:
        told, now = self._phases.get(phase), time.monotonic()
        waits = self._notebook and text.endswith(" ...") and now - self._drawn > CLOCK_SECONDS
        if told == text and not waits:
            return
        self._drawn = now
        self._phases[phase] = f"{told}\n{text}" if phase == "note" and told and told != text else text
        if not self._notebook:
            sys.stdout.write(f"tuft: {phase}: {text}\n")
            sys.stdout.flush()
            return
        from IPython.display import display

        table = Table(self._headline(), self._phases.items())
        if self._handle is None:
            self._handle = display(table, display_id=True)
        else:
            self._handle.update(table)

    def _headline(self) -> str:
        return f"{self.title} · {time.monotonic() - self._began:.1f} s"


@contextmanager
def meanwhile(report: Callable[[str, str], None], phase: str, what: Callable[[], str]) -> Iterator[None]:
    """While the block lasts, and longer than a second, tell ``report`` what is waited for."""
    began, over = time.monotonic(), threading.Event()
    told = False

    def tell() -> None:
        nonlocal told
        while not over.wait(CLOCK_SECONDS):
            report(phase, f"{what()} ...")
            told = True

    thread = threading.Thread(target=tell, name="meanwhile", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if told:
            report(phase, f"after {time.monotonic() - began:.1f} s")


def status_table(address: str, source: str, status: Mapping[str, Any] | None, owned: bool) -> Table:
    """``%tuft status``: the connection and what its server says of itself."""
    rows = [("server", address), ("found by", source + (" (ends with this kernel)" if owned else ""))]
    if status is None:
        return Table("TuFT: connected", [*rows, ("note", "not a TuFT server of this kind; it tells no more")])
    backend = status.get("backend") or {}
    waiting = status.get("waiting_for")
    rows += [
        ("version", str(status.get("version") or "")),
        ("state", "ready" if status.get("ready") else f"waiting for {_words(waiting) or 'its start'}"),
        ("tenant", str(status.get("tenant") or "")),
        ("models", "\n".join(_model_line(model) for model in status.get("models") or [])),
        ("placed", "\n".join(map(_placed_line, status.get("placements") or []))),
        ("backend", _backend_line(backend)),
        ("persistence", _words(status.get("persistence"))),
        ("elsewhere", "\n".join(map(_elsewhere_line, status.get("servers") or []))),
        ("note", "\n".join(status.get("notes") or [])),
    ]
    return Table("TuFT: connected", rows)


def _model_line(model: Mapping[str, Any]) -> str:
    detail = f" ({model['detail']})" if model.get("detail") else ""
    return f"{model.get('name')}: {model.get('state')}{detail}"


def _elsewhere_line(server: dict[str, str]) -> str:
    return f"{server.get('name')} at {server.get('url')}: {server.get('state')}"


def _placed_line(placed: Mapping[str, Any]) -> str:
    mesh = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in placed["mesh"].items() if count)
    return f"{placed['model']}: {placed['gpus']} GPUs, {placed['mode']} ({mesh})"


def _backend_line(backend: Mapping[str, Any]) -> str:
    detail = _words(backend.get("detail"))
    if backend.get("installed"):
        return detail or "installed"
    return detail or 'not installed; in the server\'s environment: pip install "tuft-jupyter[backend]"'


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {text}" for key, text in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value or "")


def _bar(text: str) -> str:
    return f" {BAR}</progress>" if text.endswith(" ...") else ""


def in_notebook() -> bool:
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")
