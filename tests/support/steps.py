"""Two steps of a small run, as tasks of a training engine, and their losses."""

from __future__ import annotations

from tinker import types as sdk
from tinker.proto.response_conv import deserialize_forward_backward_output

from tests.support.sdk_bodies import sdk_body
from tuft_jupyter.core.engine import Outcome, Task
from tuft_jupyter.core.types import PROTOBUF, OpKind

RUN = "s:train:0"


def steps() -> list[Task]:
    data = [
        sdk.Datum(model_input=sdk.ModelInput.from_ints(ids), loss_fn_inputs={"target_tokens": ids})
        for ids in ([5, 6, 7, 8], [9, 3], [4, 4, 4, 1, 2])
    ]
    tasks = [Task("create", RUN, OpKind.CREATE_MODEL, {"lora": {"rank": 4, "alpha": 8.0, "seed": 1}})]
    for i in range(2):
        tasks.append(Task(f"pass{i}", RUN, OpKind.FORWARD_BACKWARD, {}, sdk_body(data), PROTOBUF, 1 << 20))
        tasks.append(Task(f"step{i}", RUN, OpKind.OPTIM_STEP, {"adam": {"learning_rate": 1e-2}}))
    return tasks


def losses(outcomes: list[Outcome]) -> list[float]:
    assert [outcome.error for outcome in outcomes if outcome.category] == []
    return [deserialize_forward_backward_output(outcomes[i].result).metrics["loss:sum"] for i in (1, 3)]
