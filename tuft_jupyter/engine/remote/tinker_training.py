"""Training on a server elsewhere that speaks the Tinker protocol: a service such as ours, or any other.

Passes are handed on as they came, in their own bytes, with only the model's name and the number exchanged. What the
server trains can be brought back: a snapshot is a checkpoint there, and a run that was lost is made anew from it by
replaying the ops since, as it is for workers of ours. Weights that are sampled here are fetched as files.

Promises: ops of a run take effect in the order given, each of them once; a run that is unloaded leaves the server, and
so do its snapshots.
"""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tuft_jupyter.core.engine import EngineDied, Outcome, Task
from tuft_jupyter.core.errors import ServerError, TuftError
from tuft_jupyter.core.types import JSON, PROTOBUF, ModelCard, OpKind
from tuft_jupyter.engine.remote import kept_there
from tuft_jupyter.engine.remote.http import Reply, Server
from tuft_jupyter.engine.remote.kept_there import Copies, KeptThere
from tuft_jupyter.engine.remote.tinker_client import TinkerClient
from tuft_jupyter.wire import codec
from tuft_jupyter.wire import tuft_wire_pb2 as pb
from tuft_jupyter.wire.archive import ADAPTER
from tuft_jupyter.wire.peek import base_type

log = logging.getLogger(__name__)

PIPELINED = frozenset({OpKind.FORWARD, OpKind.FORWARD_BACKWARD, OpKind.OPTIM_STEP})
"""Sent without waiting for the answer to what was sent before: the server keeps their order."""
SNAPSHOTS_KEPT = 2
"""Of a run, there: the one on record, and the one that is about to be."""
SAVES_KNOWN = 32
"""Of a run, here: those that a sampler may still hold when the run is over."""


@dataclass(slots=True)
class _Run:
    """``remote`` is its name there, "" while it has none; ``lock`` keeps the order in which its ops are sent."""

    remote: str = ""
    seq: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    snapshots: list[str] = field(default_factory=list)


class TinkerTraining:
    """Implements ``core.engine.TrainingEngine``. ``samples_there``: whether the same server samples, so that weights
    for a sampler without a name need not come here. ``on_unload`` is told where the newest weights of a run lie that
    is over."""

    part_tokens = 0

    def __init__(self, card: ModelCard, server: Server, *, samples_there: bool) -> None:
        self.card = card
        self.on_progress: Callable[[str], None] = lambda _: None
        self.on_unload: Callable[[Collection[Path]], None] = lambda _: None
        self._server, self._samples_there = server, samples_there
        self._client: TinkerClient | None = None
        self._known = False
        self._runs: dict[str, _Run] = {}
        self._copies = Copies(server.url)
        self._saved: dict[str, deque[Path]] = {}

    async def start(self) -> None:
        """Open a session there; UserError says why that cannot be."""
        self.on_progress(f"asking the training server at {self._server.url}")
        await self.stop()
        client = TinkerClient(self._server)
        await client.open(self.card.name, known=self._known)
        self._client, self._known, self._runs = client, True, {}

    async def stop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def step(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Run one batch there; one outcome per task, in order. EngineDied if the server or our session is gone."""
        client = self._client
        if client is None:
            raise EngineDied(f"no session is open on the training server at {self._server.url}")
        queues: dict[str, list[tuple[int, Task]]] = {}
        for position, task in enumerate(tasks):
            queues.setdefault(task.run, []).append((position, task))
        outcomes: dict[int, Outcome] = {}
        working = [
            asyncio.ensure_future(self._work(client, self._runs.setdefault(run, _Run()), queue, outcomes))
            for run, queue in queues.items()
        ]
        try:
            await asyncio.gather(*working)
        finally:
            for work in working:
                work.cancel()
        return [outcomes[position] for position in range(len(tasks))]

    async def _work(
        self, client: TinkerClient, run: _Run, queue: Sequence[tuple[int, Task]], outcomes: dict[int, Outcome]
    ) -> None:
        sent: list[tuple[int, Task, dict[str, Any], float]] = []
        async with run.lock:
            for position, task in queue:
                began = time.perf_counter()
                if task.kind not in PIPELINED:
                    outcomes[position] = await _outcome(task, self._other(client, run, task, began))
                    continue
                try:
                    sent.append((position, task, await self._send(client, run, task), began))
                except TuftError as error:
                    outcomes[position] = _failed(task, error)
        for position, task, promise, began in sent:
            outcomes[position] = await _outcome(task, self._settled(client, task, promise, began))

    # ---- passes and steps

    async def _send(self, client: TinkerClient, run: _Run, task: Task) -> dict[str, Any]:
        names = self._names(run)
        if task.kind is OpKind.OPTIM_STEP:
            return await client.call("POST", "/optim_step", {**names, "adam_params": dict(task.args["adam"])})
        forward = task.kind is OpKind.FORWARD
        body = await self._server.work(_renamed, task, names, forward)
        path = "/forward" if forward and base_type(task.content_type) == JSON else "/forward_backward"
        return await client.call("POST", path, body, task.content_type)

    async def _settled(
        self, client: TinkerClient, task: Task, promise: dict[str, Any], began: float
    ) -> Outcome:
        reply = await client.answer(promise)
        if task.kind is OpKind.OPTIM_STEP:
            metrics = (reply.json() or {}).get("metrics") or {}
            facts = {"learning_rate": task.args["adam"]["learning_rate"]}
            facts |= {"grad_norm": metrics["grad_norm"]} if "grad_norm" in metrics else {}
            return _done(task, {"metrics": metrics}, facts, began)
        facts = await self._server.work(_pass_facts, task, reply)
        content_type = PROTOBUF if reply.content_type.startswith(PROTOBUF) else JSON
        facts["engine_ms"] = _milliseconds(began)
        return Outcome(task.request_id, result=reply.body, content_type=content_type, facts=facts)

    def _names(self, run: _Run) -> dict[str, Any]:
        if not run.remote:
            raise EngineDied("the training server does not hold this run yet")
        run.seq += 1
        return {"model_id": run.remote, "seq_id": run.seq}

    # ---- everything else

    async def _other(self, client: TinkerClient, run: _Run, task: Task, began: float) -> Outcome:
        """What comes of a task that runs by itself."""
        args = task.args
        answer: dict[str, Any]
        facts: dict[str, Any] = {}
        match task.kind:
            case OpKind.CREATE_MODEL:
                lora = {name: value for name, value in args["lora"].items() if name != "alpha"}
                await self._new(
                    client, run, "/create_model", {"base_model": self.card.name, "lora_config": lora}
                )
                answer = {"model_id": task.run, "type": "create_model"}
            case OpKind.LOAD_WEIGHTS:
                note = await self._server.work(kept_there.read, Path(args["directory"]))
                await self._new(
                    client, run, "/load_weights", {"path": note.path, "optimizer": args["optimizer"]}
                )
                if task.request_id == "restore":
                    run.snapshots = [*note.older, note.path]
                answer = {"path": args.get("path"), "model_id": task.run, "type": "load_weights"}
            case OpKind.SAVE_WEIGHTS | OpKind.SAVE_WEIGHTS_FOR_SAMPLER:
                facts["size_bytes"] = await self._save(client, run, task)
                named = "sampling_session_id" if "sampling_session_id" in args else "path"
                answer = {named: args.get(named)}
            case OpKind.UNLOAD_MODEL:
                released = task.request_id == "release"
                await self._leave(client, run, keep=released)
                self._runs.pop(task.run, None)
                if not released:
                    self.on_unload(self._saved.pop(task.run, ()))
                answer = {"model_id": task.run, "type": "unload_model"}
            case _:
                raise ServerError(f"a training server is not asked for {task.kind.value}")
        return _done(task, answer, facts, began)

    async def _new(self, client: TinkerClient, run: _Run, path: str, body: Mapping[str, Any]) -> None:
        """Make the run there; what it was before leaves."""
        await self._leave(client, run, keep=True)
        number = client.number("model")
        await client.settled(path, {"session_id": client.session, "model_seq_id": number, **body})
        run.remote, run.seq = f"{client.session}:train:{number}", 0

    async def _leave(self, client: TinkerClient, run: _Run, *, keep: bool) -> None:
        if run.remote:
            await client.settled("/unload_model", {"model_id": run.remote})
            run.remote = ""
        if not keep:
            for path in run.snapshots:
                await client.forget(path)

    async def _save(self, client: TinkerClient, run: _Run, task: Task) -> int:
        """Have the server save the run, and write what is needed here; bytes on our disk."""
        directory, training = Path(task.args["directory"]), task.kind is OpKind.SAVE_WEIGHTS
        snapshot = task.request_id == "snapshot"
        unnamed = "sampling_session_id" in task.args
        made = await self._server.work(kept_there.beside, directory)
        try:
            if not unnamed or self._samples_there:
                verb = "/save_weights" if training else "/save_weights_for_sampler"
                saved = await client.settled(
                    verb, {**self._names(run), "path": f"tuft-{uuid.uuid4().hex[:16]}"}
                )
                older = tuple(run.snapshots) if snapshot else ()
                note = KeptThere(self._server.url, saved["path"], older)
                await self._server.work(kept_there.write, made, note)
                if snapshot:
                    run.snapshots.append(saved["path"])
            if not snapshot and not (unnamed and self._samples_there):
                await self._fetch(client, run, made)
            size = await self._server.work(kept_there.finish, made, directory)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        if not snapshot:
            self._saved.setdefault(task.run, deque(maxlen=SAVES_KNOWN)).append(directory)
        left = [] if snapshot else await self._server.work(self._copies.saved, directory)
        while len(run.snapshots) > SNAPSHOTS_KEPT:
            left.append(run.snapshots.pop(0))
        for path in left:
            await client.forget(path)
        return size

    async def _fetch(self, client: TinkerClient, run: _Run, made: Path) -> None:
        """The adapter's two files, by way of an export there, which is then deleted."""
        name = f"tuft-{uuid.uuid4().hex[:16]}"
        exported = await client.settled("/save_weights_external", {**self._names(run), "path": name})
        place = f"/training_runs/{run.remote}/checkpoints/external_weights/{name}/external_weights_urls"
        urls = (await client.call("GET", place))["urls"]
        if missing := [file for file in ADAPTER if file not in urls]:
            raise ServerError(f"the training server's export lacks {', '.join(missing)}")
        for file in ADAPTER:
            await client.download(urls[file], made / file)
        await client.forget(exported["path"])


def _renamed(task: Task, names: Mapping[str, Any], forward: bool) -> bytes:
    """The body of a pass under other names. Of a protobuf message, what is said last holds; JSON is not looked into."""
    if base_type(task.content_type) == JSON:
        body = msgspec.json.decode(task.body, type=dict[str, msgspec.Raw])
        return msgspec.json.encode({**body, **names})
    head = (
        pb.ForwardBackwardRequest(**names, forward_only=True)
        if forward
        else pb.ForwardBackwardRequest(**names)
    )
    return task.body + head.SerializeToString()


def _pass_facts(task: Task, reply: Reply) -> dict[str, Any]:
    """What a curve is drawn from, of a pass and its answer."""
    request = codec.decode_forward_backward(task.body, task.content_type)
    if reply.content_type.startswith(PROTOBUF):
        metrics = dict(pb.ForwardBackwardOutput.FromString(reply.body).metrics)
    else:
        metrics = (reply.json() or {}).get("metrics") or {}
    weighed = "weights" if request.loss_fn == "cross_entropy" else "advantages"
    total = 0.0
    for datum in request.data:
        weight = datum.inputs.get(weighed)
        if weight is None:
            total += float(len(datum.tokens))
        else:
            total += float(abs(weight).sum() if weighed == "weights" else (weight != 0).sum())
    facts = {"tokens": request.tokens}
    loss = metrics.get("loss:sum")
    if loss is None or not math.isfinite(loss):  # it diverged, or is not told: no number that could be kept
        return facts
    return facts | {"weight_sum": total, "loss_sum": loss}


async def _outcome(task: Task, working: Awaitable[Outcome]) -> Outcome:
    """What comes of a task, also where that is a failure: none stops the others."""
    try:
        return await working
    except TuftError as error:
        return _failed(task, error)
    except (LookupError, TypeError, ValueError, OSError) as error:  # an answer of another form, a full disk
        log.exception("%s of %s failed", task.kind.value, task.run)
        return _failed(
            task, ServerError(f"{task.kind.value} on the training server: {type(error).__name__}: {error}")
        )


def _done(task: Task, value: Mapping[str, Any], facts: Mapping[str, Any], began: float) -> Outcome:
    facts = {"engine_ms": _milliseconds(began), **facts}
    return Outcome(task.request_id, result=msgspec.json.encode(value), content_type=JSON, facts=facts)


def _milliseconds(began: float) -> float:
    return round((time.perf_counter() - began) * 1e3, 3)


def _failed(task: Task, error: TuftError) -> Outcome:
    return Outcome(task.request_id, category=error.category, error=error.message)
