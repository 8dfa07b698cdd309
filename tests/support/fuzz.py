"""Throws hostile requests at a real server and looks at every answer: ``make security TRIALS=10000``.

The server has the real handlers, codec, trainer and sampler. What counts as a finding: a 5xx, 402 or 409, an answer
that takes two seconds, a refusal that is not JSON of the one shape, a traceback or NaN in a body, a promise that fails
as the server's fault, and a bystander whose own training step no longer gives the same loss.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tornado.httpclient import AsyncHTTPClient, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application

from tests.support.fuzz_cases import Case, World, json_case
from tests.support.fuzz_protobuf import protobuf_case
from tests.support.local_engines import LocalEngines
from tuft_jupyter.config import ModelSettings, load_settings
from tuft_jupyter.core.types import JSON
from tuft_jupyter_server.host import Host
from tuft_jupyter_server.tinker import handlers, openai_handlers

SECONDS = 2.0
ROUND = 250
"""Cases between two looks at the bystander, each round with objects of its own."""
BYSTANDER_KEY = "tml-bystander"
NEVER = (402, 409)
PROMISES = frozenset(
    "create_model load_weights forward forward_backward optim_step save_weights save_weights_for_sampler "
    "save_weights_external unload_model asample".split()
)
"""Verbs that promise an answer for later."""


@dataclass(slots=True)
class Findings:
    cases: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    slowest: float = 0.0
    slowest_verb: str = ""
    found: list[str] = field(default_factory=list)

    def add(self, number: int, case: Case, what: str, detail: str = "") -> None:
        body = (case.body or b"")[:300]
        self.found.append(f"case {number}: {case.method} {case.path[:120]} {body!r}: {what} {detail[:600]}")


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} in JSON")


class Target:
    """A server of two tenants, one of whom is up to no good."""

    def __init__(self, home: Path) -> None:
        users = {BYSTANDER_KEY: "bystander"}
        models = [ModelSettings("tuft/demo", max_model_len=64)]
        given = {"authorized_users": users, "supported_models": models, "custom_loss_server_side": True}
        settings = load_settings(None, {"TUFT_HOME": str(home)}, given)
        self.host = Host(settings, engines=LocalEngines())
        self.host.api.hold_seconds = 0.05
        shared = (self.host.api, self.host.keys, 2**23)
        rules = handlers("/api/v1", *shared) + openai_handlers("/oai/api/v1", *shared)
        self.http = HTTPServer(Application(rules))
        socket, self.port = bind_unused_port()
        self.http.add_socket(socket)
        self.client = AsyncHTTPClient(force_instance=True)
        self.key = self.host.key

    async def renew(self) -> None:
        """A key of the fuzzing tenant; cases give it up now and then."""
        self.key = (await self.post("tuft/keys", {"tenant": "mallory"}, self.host.key))["key"]

    async def ask(self, case: Case, key: str = "") -> HTTPResponse:
        return await self.client.fetch(
            f"http://127.0.0.1:{self.port}{case.path}",
            method=case.method,
            body=case.body,
            headers={**case.headers, "X-API-Key": key or self.key},
            allow_nonstandard_methods=True,
            request_timeout=30,
            raise_error=False,
        )

    async def post(self, verb: str, body: Any, key: str = "") -> Any:
        case = Case("POST", f"/api/v1/{verb}", json.dumps(body).encode(), {"Content-Type": JSON})
        answer = await self.ask(case, key)
        assert answer.code == 200, (verb, answer.body)
        return json.loads(answer.body)

    async def settled(self, promise: dict[str, Any], key: str = "") -> Any:
        """The answer to a promise, in JSON."""
        while True:
            case = Case(
                "POST", "/api/v1/retrieve_future", json.dumps({"request_id": promise["request_id"]}).encode()
            )
            answer = await self.ask(case, key)
            if answer.code != 408:
                return answer

    async def new_run(self, session: str, number: int, key: str = "") -> str:
        made = {
            "session_id": session,
            "model_seq_id": number,
            "base_model": "tuft/demo",
            "lora_config": {"rank": 4},
        }
        assert b"error" not in (await self.settled(await self.post("create_model", made, key), key)).body
        return f"{session}:train:{number}"

    async def world(self) -> World:
        """Fresh objects of the fuzzing tenant."""
        await self.renew()
        session = (await self.post("create_session", {}))["session_id"]
        run, spare = await self.new_run(session, 0), await self.new_run(session, 1)
        saved = await self.settled(
            await self.post("save_weights", {"model_id": run, "seq_id": 1, "path": "n"})
        )
        path = json.loads(saved.body)["path"]
        opened = {"session_id": session, "sampling_session_seq_id": 2, "model_path": path}
        sampler = (await self.post("create_sampling_session", opened))["sampling_session_id"]
        step = await self.post("optim_step", {"model_id": run, "seq_id": 2, "adam_params": {}})
        ids = {
            "session": session, "run": run, "spare": spare, "sampler": sampler, "checkpoint": path,
            "kind": "weights", "name": "n", "ticket": "t", "key": "k", "model": "tuft/demo",
            "request": step["request_id"],
        }  # fmt: skip
        return World(ids)


Make = Callable[[random.Random, World], Case]


async def fuzz(target: Target, make: Make, trials: int, seed: int) -> Findings:
    """``trials`` cases, the same for the same seed."""
    findings = Findings()
    bystander = Bystander(target)
    await bystander.start()
    for number in range(trials):
        if number % ROUND == 0:
            world = await target.world()
        case = make(random.Random(f"{seed}:{number}"), world)
        await _one(target, number, case, findings)
        if number % ROUND == ROUND - 1 or number == trials - 1:
            problem = await bystander.look()
            if problem:
                findings.add(number, case, "the bystander was disturbed:", problem)
    return findings


async def _one(target: Target, number: int, case: Case, findings: Findings) -> None:
    answer, seconds = await _timed(target, case)
    if seconds > SECONDS:  # the machine's pause, or does the case take that long each time?
        seconds = min(seconds, (await _timed(target, case))[1])
    findings.cases += 1
    findings.statuses[answer.code] += 1
    if seconds > findings.slowest:
        findings.slowest, findings.slowest_verb = seconds, case.verb
    if seconds > SECONDS:
        findings.add(number, case, f"took {seconds:.1f} s")
    if case.verb == "revoke_key" and answer.code == 200:
        await target.renew()
    problem = wrong_with(case, answer)
    if problem:
        findings.add(number, case, problem, repr(answer.body))
    elif answer.code == 200 and case.verb in PROMISES:
        outcome = await target.settled(json.loads(answer.body))
        problem = wrong_with(case, outcome)
        if not problem and b'"category":"server"' in outcome.body:
            problem = "failed as the server's fault"
        if problem:
            findings.add(number, case, f"its promise: {problem}", repr(outcome.body))


async def _timed(target: Target, case: Case) -> tuple[HTTPResponse, float]:
    began = time.perf_counter()
    answer = await target.ask(case)
    return answer, time.perf_counter() - began


def wrong_with(case: Case, answer: HTTPResponse) -> str:
    """What is wrong with an answer, whatever was asked; "" if nothing is."""
    body = answer.body or b""
    if answer.code >= 500 or answer.code in NEVER or not 200 <= answer.code < 500:
        return f"status {answer.code}"
    if b"Traceback" in body or b'File "' in body:
        return "a traceback"
    if answer.headers.get("Content-Type", "").startswith(JSON):
        try:
            value = json.loads(body, parse_constant=_no_constant)
        except ValueError as error:
            return f"no strict JSON: {error}"
        if answer.code >= 400 and answer.code != 408 and not (isinstance(value, dict) and value.get("error")):
            return "a refusal without words"
    elif answer.code >= 400:
        return "a refusal that is not JSON"
    return ""


class Bystander:
    """Another tenant's run: the same pass must give the same loss for ever, since it never takes a step."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._seqs = itertools.count(1)
        self._loss: float | None = None

    async def start(self) -> None:
        session = (await self._target.post("create_session", {}, BYSTANDER_KEY))["session_id"]
        self._run = await self._target.new_run(session, 0, BYSTANDER_KEY)
        await self.look()

    async def look(self) -> str:
        tensor = {"data": [5, 6, 7], "dtype": "int64"}
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [4, 5, 6]}]}
        datum = {"model_input": prompt, "loss_fn_inputs": {"target_tokens": tensor}}
        asked = {
            "model_id": self._run,
            "seq_id": next(self._seqs),
            "forward_input": {"data": [datum], "loss_fn": "cross_entropy"},
        }
        promise = await self._target.post("forward", asked, BYSTANDER_KEY)
        answer = json.loads((await self._target.settled(promise, BYSTANDER_KEY)).body)
        if "metrics" not in answer:
            return str(answer)
        loss = answer["metrics"]["loss:sum"]
        if self._loss is None:
            self._loss = loss
        return "" if loss == self._loss else f"loss {loss}, was {self._loss}"


async def campaign(kinds: dict[str, Make], trials: int, seed: int) -> dict[str, Findings]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        target = Target(Path(home))
        await target.host.start()
        try:
            return {name: await fuzz(target, make, trials, seed) for name, make in kinds.items()}
        finally:
            target.http.stop()
            await target.host.stop()


KINDS: dict[str, Make] = {"H1 JSON": json_case, "H2 protobuf, zstd": protobuf_case}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=[*KINDS], help="only this one")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    kinds = {name: make for name, make in KINDS.items() if args.kind in (None, name)}
    began = time.monotonic()
    results = asyncio.run(campaign(kinds, args.trials, args.seed))
    print("| row | cases | accepted | refused (4xx) | 5xx | slowest | findings |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, found in results.items():
        count = found.statuses
        accepted = sum(n for status, n in count.items() if status < 400)
        refused = sum(n for status, n in count.items() if 400 <= status < 500)
        worse = sum(n for status, n in count.items() if status >= 500)
        slowest = f"{found.slowest * 1e3:.0f} ms ({found.slowest_verb})"
        print(
            f"| {name} | {found.cases} | {accepted} | {refused} | {worse} | {slowest} | {len(found.found)} |"
        )
    print(f"\nseed {args.seed}, {time.monotonic() - began:.0f} s")
    for found in results.values():
        for line in found.found[:40]:
            print(line)
    sys.exit(any(found.found for found in results.values()))


if __name__ == "__main__":
    main()
