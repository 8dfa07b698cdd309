"""A real server with a tenant's objects on it and a bystander: where hostile requests are tried one by one."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from tests.support.fuzz import Bystander, Target, wrong_with
from tests.support.fuzz_cases import Case, World
from tuft_jupyter.core.types import JSON

Outcome = TypeVar("Outcome")
Body = Callable[["Scene"], Awaitable[None]]


class Scene:
    """A server, a tenant's objects on it, and a bystander."""

    def __init__(self, target: Target, world: World, bystander: Bystander) -> None:
        self.target, self.world, self.bystander = target, world, bystander

    async def said(self, verb: str, body: Any, *, media: str = JSON, **headers: str) -> tuple[int, str, str]:
        """(status, category, what a request was told) at submission, or through its promise."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": media, **{k.replace("_", "-"): v for k, v in headers.items()}}
        case = Case("POST", f"/api/v1/{verb}", raw, headers)
        answer = await self.target.ask(case)
        assert not wrong_with(case, answer), answer.body
        told = json.loads(answer.body)
        if "request_id" in told and answer.code == 200:
            outcome = await self.target.settled(told)
            assert not wrong_with(case, outcome), outcome.body
            if outcome.headers["Content-Type"] != JSON:
                return 200, "", "accepted"
            told = json.loads(outcome.body)
        return answer.code, told.get("category", ""), told.get("error", "accepted")

    def sample(self, params: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        """The body of a sample request that is answered, changed as given."""
        self.world.seq += 1
        return {
            **self.world.body("asample"),
            **fields,
            "sampling_params": {"max_tokens": 1, **(params or {})},
        }


async def quickest(
    act: Callable[[], Awaitable[Outcome]], seconds: float, tries: int = 3
) -> tuple[Outcome, float]:
    """The outcome and the seconds of the first try within ``seconds``, else of the last one: as in ``live``."""
    for _ in range(tries):
        began = time.perf_counter()
        outcome = await act()
        took = time.perf_counter() - began
        if took < seconds:
            break
    return outcome, took


OnScene = Callable[[Body], None]
