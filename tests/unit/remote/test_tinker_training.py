"""Training on a server elsewhere: what is put on record of its answers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import httpx
import pytest

from tests.support.sdk_bodies import RUN, sdk_body, sdk_datum
from tests.support.world import scenario, world
from tuft_jupyter.core.engine import Outcome, Task
from tuft_jupyter.core.types import JSON, PROTOBUF, OpKind
from tuft_jupyter.engine.remote import tinker_training
from tuft_jupyter.engine.remote.http import Reply
from tuft_jupyter.wire import tuft_wire_pb2 as pb


def answered(kind: str, loss: float) -> Reply:
    body = json.dumps({"metrics": {"loss:sum": loss if math.isfinite(loss) else None}}).encode()
    if kind == PROTOBUF:
        body = pb.ForwardBackwardOutput(metrics={"loss:sum": loss}).SerializeToString()
    return Reply(httpx.Response(200, content=body, headers={"Content-Type": kind}))


@pytest.mark.parametrize("kind", [PROTOBUF, JSON])
@pytest.mark.parametrize("loss", [math.nan, math.inf, 2.5])
def test_a_loss_that_diverged_there_is_a_gap_in_the_curve(kind: str, loss: float, tmp_path: Path) -> None:
    """A number that the journal cannot hold would leave the pass without an outcome, and its client waiting."""
    sent = Task("r", RUN, OpKind.FORWARD_BACKWARD, {}, sdk_body([sdk_datum()]), PROTOBUF, 8)
    facts = tinker_training._pass_facts(sent, answered(kind, loss))
    kept = loss / 5 if math.isfinite(loss) else None

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            w.engines.trainer._pass = lambda task, _: Outcome(task.request_id, result=b"x", facts=facts)
            passed = await w.forward_backward(run)
            stepped = await w.optim_step(run)
            for promise in (passed, stepped):
                assert not (await w.answer(promise)).category
            assert list(w.service.state.runs[run].curve["loss"]) == [kept]

    scenario(body)
