"""The one way in which the kernel side fails: a sentence that says what happened and what to do."""

from __future__ import annotations


class TuftConnectionError(RuntimeError):
    """No server could be found, started or used. In a notebook it shows as its message, without a
    traceback.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]
