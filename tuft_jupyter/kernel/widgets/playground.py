"""``Playground``: one prompt, the answers of the base model and of any checkpoints side by side, as they are drawn."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

import traitlets

from tuft_jupyter.kernel import continuity
from tuft_jupyter.kernel.answers import Drawing, answer
from tuft_jupyter.kernel.client import Refused, Unreachable
from tuft_jupyter.kernel.widgets.live import Live, Watcher, name_of, script

PIECES_SECONDS = 0.1
"""Text is gathered for this long before it is sent."""


class Playground(Live):
    """Ask base models and checkpoints the same question. ``models`` are those chosen at first: base models,
    ``tinker://`` paths, runs; without, the base models and the newest checkpoint.
    """

    _esm = script("playground")

    models = traitlets.List(traitlets.Unicode()).tag(sync=True)
    prompt = traitlets.Unicode("").tag(sync=True)
    chat = traitlets.Bool(True).tag(sync=True)
    max_tokens = traitlets.Int(64, min=1).tag(sync=True)
    temperature = traitlets.Float(0.7, min=0.0).tag(sync=True)
    top_p = traitlets.Float(1.0, min=0.0, max=1.0).tag(sync=True)
    seed = traitlets.Int(None, allow_none=True).tag(sync=True)

    def __init__(self, models: Iterable[Any] = (), **traits: Any) -> None:
        super().__init__(**traits)
        self._watcher = Watcher(self.client)
        self._stopping = threading.Event()
        one = isinstance(models, str) or not isinstance(models, Iterable)
        chosen = [name_of(model) for model in ([models] if one else models)]
        self.models = chosen or [each["name"] for each in self._offered(0.0) if each["first"]]

    def look(self, patience: float) -> dict[str, Any]:
        return {"offered": self._offered(patience)}

    def words(self) -> str:
        return f"ask {', '.join(self.models)} in a notebook with widgets, or with %tuft sample"

    def _offered(self, patience: float) -> list[dict[str, Any]]:
        bases = [{"name": name, "label": name, "first": True} for name in self.client.models()]
        saved = sorted(self._watcher.look(patience)["checkpoints"], key=lambda c: -c["created"])
        usable = [c for c in saved if c["kind"] in ("weights", "sampler_weights")]
        return bases + [
            {
                "name": c["path"],
                "label": f"{continuity.short(c['run'])} {c['name']} (step {c['step']})",
                "first": n == 0,
            }
            for n, c in enumerate(usable)
        ]

    def _heard(self, widget: Any, content: Any, buffers: Any) -> None:
        match content:
            case {"type": "ask", "id": ask, "models": list(models)}:
                self._stopping.set()
                self._stopping = threading.Event()
                for model in models:
                    answering = (int(ask), str(model), self.drawing(), str(self.prompt), self._stopping)
                    threading.Thread(target=self._answer, args=answering, daemon=True).start()
            case {"type": "stop"}:
                self._stopping.set()
            case _:
                super()._heard(widget, content, buffers)

    def drawing(self) -> Drawing:
        return Drawing(self.max_tokens, self.temperature, self.top_p, self.seed, self.chat)

    def _answer(self, ask: int, model: str, drawing: Drawing, prompt: str, stop: threading.Event) -> None:
        """One model's answer, in its own thread, sent as it grows: each message holds the whole text so far."""
        text, problem, sent = "", "", time.monotonic()
        try:
            for piece in answer(self.client, model, prompt, drawing):
                text += piece
                if stop.is_set():
                    break
                if time.monotonic() - sent > PIECES_SECONDS:
                    sent = time.monotonic()
                    self._say(ask, model, text)
        except (Refused, Unreachable) as error:
            problem = str(error)
        self._say(ask, model, text, ended=True, problem=problem)

    def _say(self, ask: int, model: str, text: str, ended: bool = False, problem: str = "") -> None:
        with self._sending:
            told = {"id": ask, "model": model, "text": text, "ended": ended, "problem": problem}
            self.send({"type": "answer", **told})
