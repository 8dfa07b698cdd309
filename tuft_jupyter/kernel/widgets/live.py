"""What the widgets share: a thread that watches the server, and whole pictures sent to whoever looks.

While a cell runs, a kernel hears nothing from the page. So a widget never waits for a question: its thread sends the
whole picture, small enough for that, when something has changed, and again now and then for a page that was reloaded
meanwhile. A page that asks (``{"type": "want"}``) gets it at once, as soon as the kernel can hear. When a view is gone
(``{"type": "gone"}``: its output was cleared), the others are asked whether they still look; if none does, the thread
rests.

It knows nothing of what is shown: a subclass says how to look (:meth:`Live.look`) and how to say it in words
(:meth:`Live.words`).
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import anywidget

from tuft_jupyter.kernel import continuity
from tuft_jupyter.kernel.client import Client, Refused, Unreachable
from tuft_jupyter.kernel.errors import TuftConnectionError

HERE = Path(__file__).parent
TICK = 0.2
"""Seconds between two pictures, at least."""
BYTES_PER_SECOND = 100_000
"""What a widget sends at most: a notebook server drops what all cells print together above ten times that."""
RETRY = 2.0
REPEAT, REPEAT_MOST = 5.0, 60.0
"""Seconds after which a picture that stays the same is sent again; each time the pause doubles."""


def asset(*names: str) -> str:
    """The texts of files beside this one, one after the other."""
    return "\n".join((HERE / name).read_text(encoding="utf-8") for name in names)


def script(name: str, *libraries: str) -> str:
    """A widget's module: libraries, what all widgets share, and its own part, which ends with the export."""
    try:
        return asset(*libraries, "assets/frame.js", f"assets/{name}.js")
    except FileNotFoundError as error:
        raise TuftConnectionError(
            f"{error.filename} is missing: in a checkout, `npm run build` puts it there; else reinstall tuft-jupyter."
        ) from None


def name_of(run: Any) -> str:
    """A run's name, or that of a training client's run, also where the client is still a future of the SDK's."""
    client = run.result() if hasattr(type(run), "result") else run
    return str(getattr(client, "model_id", client))


class Live(anywidget.AnyWidget):
    """A view that is kept up to date. ``client`` is asked from the widget's own thread."""

    _css = asset("assets/widgets.css")

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        self.client: Client = continuity.connected().client
        self.picture: dict[str, Any] = {}
        self._closing = threading.Event()
        self._unseen = False
        self._turning = threading.Lock()
        self._thread: threading.Thread | None = None
        self._sending = threading.Lock()
        self._sent = 0.0
        self._pause = REPEAT
        self.on_msg(self._heard)

    def look(self, patience: float) -> dict[str, Any]:
        """The whole picture as JSON; may wait up to ``patience`` seconds for another one than it gave last."""
        raise NotImplementedError

    def words(self) -> str:
        """The same in a line, for where no picture can be: a printed notebook, a screen reader."""
        raise NotImplementedError

    def __repr__(self) -> str:
        try:
            return f"{type(self).__name__}: {self.words()}"
        except (Refused, Unreachable, TuftConnectionError) as error:
            return f"{type(self).__name__}: {error}"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        self._watch()
        return super()._repr_mimebundle_(**options)

    def close(self) -> None:
        """Stop watching and take the view away."""
        if hasattr(self, "_closing"):  # not where wrong arguments ended __init__
            self._closing.set()
        super().close()

    def _watch(self) -> None:
        with self._turning:
            self._unseen = False
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
                self._thread.start()

    def _ends(self) -> bool:
        """Whether nobody needs the thread any more; then the next view starts another."""
        with self._turning:
            over = self._unseen or self._closing.is_set()
            if over:
                self._thread = None
            return over

    def _run(self) -> None:
        patience, rest = 0.0, TICK
        while not self._ends():
            try:
                picture = self.look(patience)
                patience = REPEAT
                if picture != self.picture:
                    rest = max(TICK, len(json.dumps(picture)) / BYTES_PER_SECOND)
            except (Refused, Unreachable) as error:
                picture = {
                    **self.picture,
                    "problem": f"The TuFT server does not answer ({error}); still trying.",
                }
                patience, rest = 0.0, RETRY
            changed = picture != self.picture
            self.picture = picture
            if changed or time.monotonic() - self._sent > self._pause:
                self._pause = REPEAT if changed else min(2 * self._pause, REPEAT_MOST)
                self._show()
            self._closing.wait(rest)

    def _show(self) -> None:
        with self._sending:
            self._sent = time.monotonic()
            self.send({"type": "picture", **self.picture})

    def _heard(self, _: Any, content: Any, buffers: Any) -> None:
        match content:
            case {"type": "want"}:
                self._watch()
                self._pause = REPEAT
                if self.picture:
                    self._show()
            case {"type": "gone"}:
                self._unseen = True
                self.send({"type": "look?"})


class Watcher:
    """The caller's outlook, asked for again only when it may have changed."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.latest: dict[str, Any] = {}

    def look(self, patience: float) -> dict[str, Any]:
        seen = self.latest.get("version", "") if patience else ""
        self.latest = self.client.outlook(seen, wait=patience)
        return self.latest
