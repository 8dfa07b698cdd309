"""Stopping a training loop where a step ends: Kernel > Interrupt waits for the step, and no request is left behind.

A loop is code of the user's, so the SDK's calls are the places where it can be stopped. For the time of a
``with Stopping()`` block they are watched: which requests are out, and whether gradients wait for their optimizer step.
An interrupt at rest (between two steps, nothing out) stops the loop at once; any other is remembered, and the loop
stops when it begins its next step. The third one stops it wherever it is, as an interrupt of Python does.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

GRADIENT = ("forward_backward", "forward_backward_custom")
STEP = ("optim_step",)
OTHER = ("forward", "save_state", "save_weights_for_sampler", "load_state", "load_state_with_optimizer")
INSIST = 3
"""The interrupt that is obeyed at once, in the middle of a step."""

Tell = Callable[[str], None]


class Stopped(KeyboardInterrupt):
    """The loop was stopped on purpose. In a notebook it shows as its message alone."""

    def _render_traceback_(self) -> list[str]:
        return [str(self) or "Stopped."]


class Stopping:
    """Watches the SDK's clients during a block, and stops it where a step ends.

    ``clients`` are the training clients that were used; ``tell`` is told in a sentence what an interrupt waits for;
    ``first`` is called with each client before its first request. It works in the main thread; elsewhere no signal
    arrives and the block runs as it is.
    """

    def __init__(self, tell: Tell, first: Callable[[Any], None] = lambda _: None) -> None:
        self.clients: list[Any] = []
        self.asked = 0
        self._tell = tell
        self._first = first
        self._unstepped: set[int] = set()
        self._out: list[Any] = []
        self._calling = 0
        self._before: Any = None
        self._undo: list[Callable[[], None]] = []

    @property
    def between_steps(self) -> bool:
        """Whether every gradient that was asked for has had its optimizer step."""
        return not self._unstepped

    @property
    def out(self) -> list[Any]:
        """The requests without an answer yet."""
        self._out = [future for future in self._out if not future.future().done()]
        return self._out

    def __enter__(self) -> Self:
        from tinker.lib.public_interfaces.sampling_client import SamplingClient
        from tinker.lib.public_interfaces.training_client import TrainingClient

        for name in (*GRADIENT, *STEP, *OTHER):
            self._watch(TrainingClient, name)
        self._watch(SamplingClient, "sample", training=False)
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        while self._undo:
            self._undo.pop()()

    def settle(self) -> None:
        """Wait for the requests that are out. Their failures belong to whoever asks for their results."""
        for future in list(self._out):
            with suppress(Exception):
                future.result()
        self._out.clear()

    def _watch(self, kind: Any, name: str, training: bool = True) -> None:
        plain = getattr(kind, name)

        def watched(client: Any, *arguments: Any, **options: Any) -> Any:
            with self._a_call(client if training else None, name):
                future = plain(client, *arguments, **options)
                if training:
                    self._submitted(client, name, future)
            return future

        watched.__doc__, watched.__name__ = plain.__doc__, name
        setattr(kind, name, watched)
        self._undo.append(lambda: setattr(kind, name, plain))

    @contextmanager
    def _a_call(self, client: Any, name: str) -> Iterator[None]:
        """No interrupt is obeyed within a call: a request is either out and known, or was never sent."""
        ours = threading.current_thread() is threading.main_thread()
        if ours and self.asked and self.between_steps:
            raise Stopped
        if client is not None and not any(client is known for known in self.clients):
            self.clients.append(client)
            self._first(client)
        self._calling += ours
        try:
            yield
        finally:
            self._calling -= ours

    def _submitted(self, client: Any, name: str, future: Any) -> None:
        self._out.append(future)
        if name in GRADIENT:
            self._unstepped.add(id(client))
        elif name in STEP:
            self._unstepped.discard(id(client))

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self._calling:
            return
        if self.asked >= INSIST or (self.between_steps and not self.out):
            raise Stopped
        waits = "its answers" if self.between_steps else "its optimizer step"
        self._tell(f"the loop stops after this step; it waits for {waits} ...")
