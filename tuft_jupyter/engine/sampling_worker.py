"""What lives inside a sampling actor: requests as bytes from the event loop, tokens from one engine thread.

The thread calls :meth:`Sampler.step` while anything is decoding and sleeps on a condition otherwise; nothing polls.
Plain Python, without Ray. Promises: every request gets exactly one outcome, also if it is cancelled or if the engine
breaks; after that the worker takes no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tuft_jupyter.core.engine import Listener, Outcome, Sampler
from tuft_jupyter.core.errors import ServerError, TuftError, UserError
from tuft_jupyter.core.types import SAMPLED, SampleRequest, SampleResult
from tuft_jupyter.wire.sample_codec import decode_sample_request, encode_sample_response

log = logging.getLogger(__name__)

HUNG_SECONDS = 900.0
"""A step that takes longer hangs: the process writes where, and ends, so that a new one can take over."""
REARM_SECONDS = 60.0
"""How often that is put off while all is well; setting the timer costs a quarter of a millisecond."""

Waiting = tuple[asyncio.AbstractEventLoop, asyncio.Future[SampleResult | TuftError]]


class SamplingWorker:
    """Samples from ``sampler``.

    ``adapters``: whether any may be asked for. ``on_death`` is called in the engine thread when the sampler broke,
    after every request was told.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        adapters: bool = True,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.sampler = sampler
        self._adapters = adapters
        self._on_death = on_death
        self._changed = threading.Condition()
        self._waiting: dict[str, Waiting] = {}
        self._problem = ""
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="sampler", daemon=True)
        self._thread.start()

    async def sample(self, request_id: str, adapter: str | None, body: bytes, *, salt: str = "") -> Outcome:
        """Sample from the base model, or from the adapter saved in a directory."""
        began = time.perf_counter()
        try:
            request = replace(decode_sample_request(body), salt=salt)
            result = await self.draw(request_id, adapter, request)
            encoded = encode_sample_response(result)
        except TuftError as error:
            return Outcome(request_id, category=error.category, error=error.message)
        except Exception as error:
            log.exception("sample request %s failed", request_id)
            text = f"sampling failed in the sampling worker: {type(error).__name__}"
            return Outcome(request_id, category="server", error=text)
        facts = {
            "engine_ms": round((time.perf_counter() - began) * 1e3, 3),
            "prompt_tokens": len(request.prompt),
            "tokens": sum(len(sequence.tokens) for sequence in result.sequences),
        }
        return Outcome(request_id, result=encoded, content_type=SAMPLED, facts=facts)

    async def draw(
        self, request_id: str, adapter: str | None, request: SampleRequest, on_token: Listener | None = None
    ) -> SampleResult:
        """The same over values; TuftError says why there is none. Cancelling the call stops the drawing."""
        self.sampler.check(request)
        if adapter is not None and not self._adapters:
            raise UserError(
                "this base model is sampled without adapters here (enable_lora is false for it): sample the base "
                "model, or ask whoever runs this server to set enable_lora to true"
            )
        path = None if adapter is None else Path(adapter)
        return await self._result(
            request_id, lambda: self.sampler.submit(request_id, path, request, on_token)
        )

    def cancel(self, request_id: str) -> None:
        """Stop drawing for a request; it fails as cancelled. Unknown ids are ignored."""
        if self._settle(request_id, UserError("this sample request was cancelled")):
            self.sampler.cancel(request_id)

    def waits_for(self, request_id: str) -> str:
        """In words, why nothing is drawn for a request yet; empty if something is."""
        return self.sampler.waits_for(request_id)

    def close(self) -> None:
        """End the engine thread after the step it is in."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    async def _result(self, request_id: str, submit: Callable[[], None]) -> SampleResult:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[SampleResult | TuftError] = loop.create_future()
        with self._changed:
            if self._problem:
                raise ServerError(self._problem)
            self._waiting[request_id] = (loop, future)
            submit()
            self._changed.notify()
        try:
            result = await future
        except asyncio.CancelledError:
            self._waiting.pop(request_id, None)
            self.sampler.cancel(request_id)
            raise
        if isinstance(result, TuftError):
            raise result
        return result

    def _settle(self, request_id: str, result: SampleResult | TuftError) -> bool:
        """Hand a result to whoever waits for it; False if nobody does (any more)."""
        loop, future = self._waiting.pop(request_id, (None, None))
        if loop is None or future is None:
            return False
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(_set, future, result)
        return True

    def _serve(self) -> None:
        try:
            self._step_while_busy()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _step_while_busy(self) -> None:
        watched_since = 0.0
        while True:
            with self._changed:
                if not self.sampler.busy():
                    faulthandler.cancel_dump_traceback_later()
                    watched_since = 0.0
                self._changed.wait_for(lambda: self._closed or self.sampler.busy())
                if self._closed:
                    return
            if time.monotonic() - watched_since > REARM_SECONDS:
                # A timer of its own that needs no interpreter: a step may hang with the lock in its hands
                faulthandler.dump_traceback_later(HUNG_SECONDS, exit=True)
                watched_since = time.monotonic()
            try:
                ended = self.sampler.step()
            except Exception as error:
                log.exception("the sampler is broken")
                self._break(
                    f"the sampling worker failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                )
                return
            for request_id, result in ended:
                self._settle(request_id, result)

    def _break(self, problem: str) -> None:
        with self._changed:
            self._problem = problem
        for request_id in list(self._waiting):
            self._settle(request_id, ServerError(problem))
        self._on_death()


def _set(future: asyncio.Future[SampleResult | TuftError], result: SampleResult | TuftError) -> None:
    if not future.done():
        future.set_result(result)
