"""What lives inside a training actor: from tasks with bytes to a :class:`Trainer` with arrays, and back.

The worker groups the tasks of one step into the fewest trainer calls that keep every run's order, cuts ops that are
over their grant, and turns every failure into an outcome of its own task. It is plain Python: it runs without Ray,
and knows neither lanes nor tenants.

Promises: tasks of one run take effect in the order given, also over several steps; a task that fails leaves the
others alone; when a failure may have left a run's state half changed, the outcome says so (``facts["dirty"]``).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuft_jupyter.core.engine import EngineDied, Outcome, Task, Trainer
from tuft_jupyter.core.errors import DatumError, ServerError, TuftError
from tuft_jupyter.core.types import JSON, PROTOBUF, AdamParams, ForwardBackward, LoraSpec, OpKind
from tuft_jupyter.engine.divergence import sampled_kl
from tuft_jupyter.engine.slices import Sliced
from tuft_jupyter.wire import codec
from tuft_jupyter.wire.peek import base_type

log = logging.getLogger(__name__)

PASSES = frozenset({OpKind.FORWARD, OpKind.FORWARD_BACKWARD})
HARMLESS = frozenset({OpKind.CREATE_MODEL, OpKind.SAVE_WEIGHTS, OpKind.SAVE_WEIGHTS_FOR_SAMPLER})
"""Kinds that change no run that was there, however they fail."""
AFRESH = frozenset({OpKind.CREATE_MODEL, OpKind.LOAD_WEIGHTS, OpKind.UNLOAD_MODEL})
"""Kinds that do not ask what the run was like before."""

Queue = deque[tuple[int, Task]]


class TrainingWorker:
    """Runs tasks on ``trainer``.

    ``alive`` raises if the trainer can never work again (a broken device); it is asked after every failure that is
    not the user's, and then :meth:`step` raises :class:`EngineDied`.
    """

    def __init__(self, trainer: Trainer, alive: Callable[[], None] = lambda: None) -> None:
        self.trainer = trainer
        self._alive = alive
        self._unfinished: dict[str, Sliced] = {}
        self._dirty: set[str] = set()

    def step(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Run the tasks; one outcome each, in order.

        After a failure that left a run half changed, its other tasks come back unfinished until the run is made or
        loaded again; then they are to be sent again, whole.
        """
        outcomes: dict[int, Outcome] = {}
        queues: dict[str, Queue] = {}
        for position, task in enumerate(tasks):
            queues.setdefault(task.run, deque()).append((position, task))
        while waiting := [queue for queue in queues.values() if queue]:
            for queue in waiting:
                if self._must_wait(queue[0][1]):
                    outcomes |= self._hold(queue)
            waiting = [queue for queue in waiting if queue]
            passes = [queue for queue in waiting if queue[0][1].kind in PASSES]
            steps = [queue.popleft() for queue in waiting if queue[0][1].kind is OpKind.OPTIM_STEP]
            if passes:
                outcomes |= self._passes(passes)
            if steps:
                outcomes |= self._optim_steps(steps)
            if not passes and not steps:
                outcomes |= {position: self._other(task) for position, task in (q.popleft() for q in waiting)}
        if any(outcome.category == "server" for outcome in outcomes.values()):
            self._check_alive()
        return [outcomes[position] for position in range(len(tasks))]

    def _must_wait(self, task: Task) -> bool:
        """Whether the run must be rebuilt first, or an op of it that is unfinished from an earlier step."""
        if task.kind in AFRESH:
            return False
        first = (key for key, sliced in self._unfinished.items() if sliced.run == task.run)
        return task.run in self._dirty or next(first, task.request_id) != task.request_id

    def _check_alive(self) -> None:
        try:
            self._alive()
        except Exception as error:
            log.exception("the trainer is broken beyond use")
            raise EngineDied(f"the trainer cannot be used any more: {_one_line(error)}") from error

    # ---- forward and forward_backward

    def _passes(self, queues: Sequence[Queue]) -> dict[int, Outcome]:
        """One trainer call over the passes at the head of several runs' queues."""
        outcomes: dict[int, Outcome] = {}
        batch: list[tuple[int, Task, Sliced, ForwardBackward]] = []
        for queue in queues:
            while queue and queue[0][1].kind in PASSES:
                position, task = queue.popleft()
                try:
                    sliced = self._sliced(task)
                except TuftError as error:
                    outcomes[position] = self._failed(task, error)
                    continue
                part = sliced.next(task.grant)
                batch.append((position, task, sliced, part))
                if not sliced.reaches_the_end(part):
                    outcomes |= self._hold(queue)
        if not batch:
            return outcomes
        began = time.perf_counter()
        try:
            results = self.trainer.forward_backward([(task.run, part) for _, task, _, part in batch])
        except Exception as error:
            log.exception("forward_backward failed for %s", sorted({task.run for _, task, _, _ in batch}))
            for position, task, sliced, _ in batch:
                self._unfinished.pop(task.request_id, None)
                outcomes[position] = self._failed(
                    task, _unexpected(task, error), dirty=sliced.request.backward
                )
            return outcomes
        ms_per_token = (time.perf_counter() - began) * 1e3 / sum(part.tokens for _, _, _, part in batch)
        for (position, task, sliced, part), result in zip(batch, results, strict=True):
            if isinstance(result, TuftError):
                self._unfinished.pop(task.request_id, None)
                if isinstance(result, DatumError):
                    result = result.after(sliced.cursor)
                outcomes[position] = self._failed(task, result, dirty=sliced.dirty)
                continue
            sliced.add(part, result, ms_per_token * part.tokens)
            outcomes[position] = self._progress(task, sliced)
        return outcomes

    def _sliced(self, task: Task) -> Sliced:
        """What is left of a task; one that brings its body begins anew."""
        if not task.body:
            known = self._unfinished.get(task.request_id)
            if known is None:
                raise ServerError(f"the training worker does not hold {task.kind.value} {task.request_id}")
            return known
        try:
            request = codec.decode_forward_backward(task.body, task.content_type)
            if task.kind is OpKind.FORWARD:
                request = replace(request, backward=False)
            self.trainer.check(request)
        except TuftError:
            raise
        except Exception as error:
            log.exception("%s of %s could not be read", task.kind.value, task.run)
            raise _unexpected(task, error) from error
        sliced = self._unfinished[task.request_id] = Sliced(task.run, request)
        return sliced

    def _hold(self, queue: Queue) -> dict[int, Outcome]:
        """Keep what comes after an unfinished op for a later step: their bodies are not sent again."""
        outcomes = {}
        while queue:
            position, task = queue.popleft()
            outcomes[position] = Outcome(task.request_id, finished=False)
            if task.kind in PASSES and task.body:
                try:
                    self._sliced(task)
                except TuftError as error:
                    outcomes[position] = self._failed(task, error)
        return outcomes

    def _progress(self, task: Task, sliced: Sliced) -> Outcome:
        facts: dict[str, Any] = {"engine_ms": round(sliced.engine_ms, 3), "tokens": sliced.tokens}
        if not sliced.finished:
            return Outcome(task.request_id, finished=False, facts=facts)
        del self._unfinished[task.request_id]
        answer = sliced.joined()
        facts |= _finite({"loss_sum": answer.loss_sum, "weight_sum": answer.weight_sum})
        facts |= sampled_kl(sliced.request, answer)
        try:
            if base_type(task.content_type) == PROTOBUF:
                result, content_type = codec.encode_forward_backward_output(answer), PROTOBUF
            else:
                result, content_type = codec.encode_forward_backward_output_json(answer), JSON
        except Exception as error:
            log.exception("the answer to %s of %s could not be written", task.kind.value, task.run)
            return self._failed(task, _unexpected(task, error), dirty=sliced.request.backward)
        return Outcome(task.request_id, result=result, content_type=content_type, facts=facts)

    # ---- everything else

    def _optim_steps(self, batch: Sequence[tuple[int, Task]]) -> dict[int, Outcome]:
        began = time.perf_counter()
        try:
            params = [(task.run, AdamParams(**task.args["adam"])) for _, task in batch]
            results = self.trainer.optim_step(params)
        except Exception as error:
            log.exception("optim_step failed for %s", [task.run for _, task in batch])
            return {
                position: self._failed(task, _unexpected(task, error), dirty=True) for position, task in batch
            }
        engine_ms = (time.perf_counter() - began) * 1e3 / len(batch)
        outcomes = {}
        for (position, task), (_, adam), result in zip(batch, params, results, strict=True):
            if isinstance(result, TuftError):
                outcomes[position] = self._failed(task, result)
                continue
            metrics = _finite(result)
            facts = {"engine_ms": round(engine_ms, 3), "learning_rate": adam.learning_rate}
            if "grad_norm" in metrics:
                facts["grad_norm"] = metrics["grad_norm"]
            outcomes[position] = _done(task, {"metrics": metrics}, facts)
        return outcomes

    def _other(self, task: Task) -> Outcome:
        began = time.perf_counter()
        try:
            value, facts = self._run(task)
        except TuftError as error:
            return self._failed(task, error)
        except Exception as error:
            log.exception("%s of %s failed", task.kind.value, task.run)
            return self._failed(task, _unexpected(task, error), dirty=task.kind not in HARMLESS)
        return _done(task, value, {"engine_ms": round((time.perf_counter() - began) * 1e3, 3), **facts})

    def _run(self, task: Task) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the answer, further facts) of a task that runs by itself."""
        run, args = task.run, task.args
        match task.kind:
            case OpKind.CREATE_MODEL:
                self.trainer.remove(run)  # a run that is rebuilt may still be here
                self.trainer.create(run, LoraSpec(**args["lora"]))
                self._forget(run)
                return {"model_id": run, "type": "create_model"}, {}
            case OpKind.LOAD_WEIGHTS:
                self.trainer.load(run, Path(args["directory"]), optimizer=args["optimizer"])
                self._forget(run)
                return {"path": args.get("path"), "model_id": run, "type": "load_weights"}, {}
            case OpKind.SAVE_WEIGHTS:
                size = self.trainer.save(run, Path(args["directory"]), optimizer=args["optimizer"])
                return {"path": args.get("path")}, {"size_bytes": size}
            case OpKind.SAVE_WEIGHTS_FOR_SAMPLER:
                named = "sampling_session_id" if "sampling_session_id" in args else "path"
                # What was never given a name can be saved again; five syncs are most of the time to its first token
                size = self.trainer.save(
                    run, Path(args["directory"]), optimizer=False, durable=named == "path"
                )
                return {named: args[named]}, {"size_bytes": size}
            case OpKind.UNLOAD_MODEL:
                self.trainer.remove(run)
                self._forget(run)
                return {"model_id": run, "type": "unload_model"}, {}
        raise ServerError(f"the training worker does not know {task.kind.value}")

    def _forget(self, run: str) -> None:
        """The run is made anew or gone, and with it the gradients of what is unfinished."""
        self._dirty.discard(run)
        for request_id in [key for key, sliced in self._unfinished.items() if sliced.run == run]:
            del self._unfinished[request_id]

    def _failed(self, task: Task, error: TuftError, *, dirty: bool = False) -> Outcome:
        """``dirty``: the run may be half changed, and nothing more happens to it before it is rebuilt."""
        if dirty:
            self._dirty.add(task.run)
        facts = {"dirty": True} if dirty else {}
        return Outcome(task.request_id, facts=facts, category=error.category, error=error.message)


def _done(task: Task, value: Mapping[str, Any], facts: Mapping[str, Any]) -> Outcome:
    result = json.dumps(value, allow_nan=False).encode()
    return Outcome(task.request_id, result=result, content_type=JSON, facts=facts)


def _unexpected(task: Task, error: Exception) -> ServerError:
    """A failure that nobody foresaw, as one line; the traceback is in the worker's log."""
    return ServerError(f"{task.kind.value} failed in the training worker: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _finite(numbers: Mapping[str, float]) -> dict[str, float]:
    """Only what JSON can say."""
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
