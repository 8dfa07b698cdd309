"""What a training worker promises, on fakes that compute exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinker import types as sdk
from tinker.proto.response_conv import deserialize_forward_backward_output

from tests.support.fake_engine import VOCAB, FakeTrainer, Faults
from tests.support.sdk_bodies import sdk_body
from tuft_jupyter.core.engine import EngineDied, Outcome, Task
from tuft_jupyter.core.errors import DatumError
from tuft_jupyter.core.types import JSON, PROTOBUF, OpKind
from tuft_jupyter.engine.worker import TrainingWorker

LORA = {"rank": 8, "alpha": 8.0, "seed": 1, "train_attn": True, "train_mlp": True, "train_unembed": False}
ADAM = {
    "learning_rate": 0.5,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-12,
    "weight_decay": 0.0,
    "grad_clip_norm": 0.0,
}
ALL = 10**9


def datum(*tokens: int) -> sdk.Datum:
    return sdk.Datum(
        model_input=sdk.ModelInput.from_ints(list(tokens)), loss_fn_inputs={"target_tokens": list(tokens)}
    )


def forward_backward(run: str, *data: sdk.Datum, key: str = "", grant: int = ALL, **options: Any) -> Task:
    body = sdk_body(list(data), **options)
    return Task(key or f"pass-{run}", run, OpKind.FORWARD_BACKWARD, {}, body, PROTOBUF, grant)


def again(task: Task, grant: int = ALL) -> Task:
    return Task(task.request_id, task.run, task.kind, task.args, b"", task.content_type, grant)


def create(run: str) -> Task:
    return Task(f"create-{run}", run, OpKind.CREATE_MODEL, {"lora": LORA})


def optim_step(run: str, key: str = "") -> Task:
    return Task(key or f"step-{run}", run, OpKind.OPTIM_STEP, {"adam": ADAM})


def worker_with(*runs: str, faults: Faults | None = None) -> tuple[TrainingWorker, FakeTrainer]:
    trainer = FakeTrainer(faults)
    worker = TrainingWorker(trainer, trainer.alive)
    assert all(not outcome.category for outcome in worker.step([create(run) for run in runs]))
    trainer.calls.clear()
    return worker, trainer


def output(outcome: Outcome) -> Any:
    assert outcome.category == "", outcome.error
    return deserialize_forward_backward_output(outcome.result)


def test_passes_of_several_runs_are_one_trainer_call() -> None:
    worker, trainer = worker_with("a", "b")
    first, second = worker.step([forward_backward("a", datum(1, 2, 3)), forward_backward("b", datum(63))])
    assert trainer.calls == [("forward_backward", ["a", "b"])]
    assert output(first).metrics["loss:sum"] == 9 / 64
    assert output(second).loss_fn_outputs[0]["logprobs"].data == [-1.0]
    assert first.facts["tokens"] == 3
    assert first.facts["loss_sum"] == 9 / 64
    assert first.facts["weight_sum"] == 3
    assert first.facts["engine_ms"] == pytest.approx(
        3 * second.facts["engine_ms"], rel=0.1, abs=0.002
    )  # its share


def test_tasks_of_a_run_take_effect_in_order_while_runs_share_calls() -> None:
    """S1-38: pipelined pass and step, interleaved over runs, equal each run alone."""
    worker, trainer = worker_with("a", "b")
    tasks = [
        forward_backward("a", datum(63), key="a1"),
        optim_step("a"),
        forward_backward("b", datum(127), key="b1"),
        forward_backward("a", datum(63), key="a2"),
        forward_backward("b", datum(63), key="b2"),
        optim_step("b"),
    ]
    outcomes = worker.step(tasks)
    assert [outcome.request_id for outcome in outcomes] == [task.request_id for task in tasks]
    assert trainer.calls == [
        ("forward_backward", ["a", "b", "b"]),
        ("optim_step", ["a", "b"]),
        ("forward_backward", ["a"]),
    ]
    assert trainer.runs["a"].weight == -0.5
    assert trainer.runs["b"].weight == -0.5 * 3
    assert output(outcomes[3]).metrics["loss:sum"] == 0.5  # after the step


def test_an_op_over_its_grant_is_cut_between_datums_and_joined() -> None:
    data = [datum(1, 2), datum(3, 4, 5), datum(6), datum(7, 8, 9, 10)]
    worker, trainer = worker_with("a")
    whole = worker.step([forward_backward("a", *data)])[0]
    gradient = trainer.runs["a"].grad

    worker, trainer = worker_with("a")
    task = forward_backward("a", *data, grant=5)
    outcomes = worker.step([task])
    assert (outcomes[0].finished, outcomes[0].facts["tokens"]) == (False, 5)
    while not outcomes[-1].finished:
        outcomes += worker.step([again(task, grant=1)])
    assert len(outcomes) == 3  # then one datum each, however small the grant
    assert outcomes[-1].result == whole.result
    assert outcomes[-1].facts["tokens"] == whole.facts["tokens"] == 10
    assert trainer.runs["a"].grad == gradient


def test_what_follows_an_unfinished_op_waits_for_it() -> None:
    worker, trainer = worker_with("a", "b")
    long = forward_backward("a", datum(1), datum(2), key="long", grant=1)
    after = forward_backward("a", datum(3), key="after")
    tasks = [long, after, optim_step("a"), forward_backward("b", datum(4))]
    outcomes = worker.step(tasks)
    assert [outcome.finished for outcome in outcomes] == [False, False, False, True]
    outcomes = worker.step([again(long), again(after), optim_step("a")])
    assert all(outcome.finished and not outcome.category for outcome in outcomes)
    assert trainer.runs["a"].weight == -0.5 * (2 + 3 + 4) / 64


def test_a_later_step_does_not_overtake_an_unfinished_op() -> None:
    """A driver may send the optimizer step before it has heard that the pass is not finished."""
    worker, trainer = worker_with("a", "b")
    task = forward_backward("a", datum(1), datum(2), grant=1)
    (first,) = worker.step([task])
    early, other = worker.step([optim_step("a"), optim_step("b")])
    assert [outcome.finished for outcome in (first, early, other)] == [False, False, True]
    assert trainer.runs["a"].steps == 0
    outcomes = worker.step([again(task), optim_step("a")])
    assert all(outcome.finished for outcome in outcomes)
    assert trainer.runs["a"].weight == -0.5 * 5 / 64


def test_forward_leaves_no_gradient() -> None:
    worker, trainer = worker_with("a")
    worker.step([forward_backward("a", datum(5), forward_only=True)])
    body = sdk_body([datum(5)])
    worker.step([Task("f", "a", OpKind.FORWARD, {}, body, PROTOBUF, ALL)])
    assert trainer.runs["a"].grad == 0


def test_a_json_request_gets_a_json_answer() -> None:
    worker, _ = worker_with("a")
    work = {
        "data": [
            {
                "model_input": {"chunks": [{"tokens": [63], "type": "encoded_text"}]},
                "loss_fn_inputs": {"target_tokens": {"data": [63], "dtype": "int64"}},
            }
        ],
        "loss_fn": "cross_entropy",
    }
    body = json.dumps({"model_id": "a", "seq_id": 1, "forward_backward_input": work}).encode()
    (outcome,) = worker.step([Task("j", "a", OpKind.FORWARD_BACKWARD, {}, body, JSON, ALL)])
    assert outcome.content_type == JSON
    assert json.loads(outcome.result)["metrics"]["loss:sum"] == 1.0


# ---- failures


def test_bad_input_fails_its_own_task_as_the_users_before_anything_runs() -> None:
    worker, trainer = worker_with("a", "b")
    unreadable = Task("x", "a", OpKind.FORWARD_BACKWARD, {}, b"\xff\xff", PROTOBUF, ALL)
    outside = forward_backward("a", datum(1), datum(VOCAB), key="y")
    fine = forward_backward("b", datum(1))
    outcomes = worker.step([unreadable, outside, fine])
    assert [outcome.category for outcome in outcomes] == ["user", "user", ""]
    assert "data[1]" in outcomes[1].error
    assert "dirty" not in outcomes[1].facts
    assert trainer.calls == [("forward_backward", ["b"])]


def test_a_refusal_in_place_leaves_the_others_alone() -> None:
    worker, trainer = worker_with("a", "b", faults=Faults(refuse_on=13))
    first, second = worker.step([forward_backward("a", datum(13)), forward_backward("b", datum(63))])
    assert (first.category, first.error, dict(first.facts)) == ("server", "out of memory", {})
    assert output(second).metrics["loss:sum"] == 1.0
    assert trainer.runs["b"].grad == 1.0


def test_an_op_that_fails_between_its_slices_is_dirty() -> None:
    worker, _ = worker_with("a", faults=Faults(refuse_on=13))
    task = forward_backward("a", datum(1), datum(13), grant=1)
    assert not worker.step([task])[0].finished
    (failed,) = worker.step([again(task)])
    assert (failed.category, failed.facts) == ("server", {"dirty": True})


def test_an_unexpected_failure_is_one_line_and_dirty() -> None:
    worker, _ = worker_with("a", faults=Faults(raise_on=13))
    (failed,) = worker.step([forward_backward("a", datum(13))])
    assert failed.category == "server"
    assert failed.error == (
        "forward_backward failed in the training worker: ZeroDivisionError: out of the blue"
    )
    assert failed.facts == {"dirty": True}


@pytest.mark.parametrize(
    ("kind", "dirty"), [("create", False), ("load", True), ("optim_step", True), ("save", False)]
)
def test_an_unexpected_failure_says_whether_it_may_have_changed_the_run(
    kind: str, dirty: bool, tmp_path: Path
) -> None:
    faults = Faults()
    worker, _ = worker_with("a", faults=faults)
    faults.raise_in = kind
    task = {
        "create": create("b"),
        "load": Task(
            "l", "a", OpKind.LOAD_WEIGHTS, {"directory": str(tmp_path), "optimizer": True, "path": "p"}
        ),
        "optim_step": optim_step("a"),
        "save": Task(
            "s", "a", OpKind.SAVE_WEIGHTS, {"directory": str(tmp_path), "optimizer": True, "path": "p"}
        ),
    }[kind]
    (failed,) = worker.step([task])
    assert (failed.category, failed.facts.get("dirty", False)) == ("server", dirty)
    assert f"RuntimeError: {kind} broke" in failed.error


def test_a_corpse_is_found_at_its_first_failure() -> None:
    """F9: a trainer that can never work again ends the worker instead of failing op after op."""
    faults = Faults()
    worker, _ = worker_with("a", faults=faults)
    faults.corpse = True
    with pytest.raises(EngineDied, match="no device"):
        worker.step([forward_backward("a", datum(1))])


def test_nothing_happens_to_a_dirty_run_before_it_is_rebuilt() -> None:
    """A driver may have sent the step before it hears that the pass failed."""
    worker, trainer = worker_with("a", "b", faults=Faults(refuse_on=13))
    bad = forward_backward("a", datum(1), datum(13), grant=1)
    assert not worker.step([bad])[0].finished
    outcomes = worker.step([again(bad), optim_step("a"), optim_step("b")])
    assert [(outcome.finished, outcome.category) for outcome in outcomes] == [
        (True, "server"),
        (False, ""),
        (True, ""),
    ]
    late = forward_backward("a", datum(5), key="late")
    assert not any(outcome.finished for outcome in worker.step([optim_step("a"), late]))
    outcomes = worker.step([create("a"), late, optim_step("a")])
    assert [outcome.error for outcome in outcomes] == ["", "", ""]
    assert trainer.runs["a"].weight == -0.5 * 6 / 64


def test_a_task_that_the_worker_does_not_hold_fails() -> None:
    worker, _ = worker_with("a")
    (gone,) = worker.step([again(forward_backward("a", datum(1)))])
    assert gone.category == "server"
    assert "does not hold" in gone.error


def test_an_unfinished_op_of_a_rebuilt_run_is_in_the_way_of_no_other_and_begins_anew() -> None:
    worker, trainer = worker_with("a")
    task = forward_backward("a", datum(1), datum(2), grant=1)
    assert not worker.step([task])[0].finished
    worker.step([create("a")])
    assert worker.step([forward_backward("a", datum(0), key="replayed")])[0].finished
    outcomes = [*worker.step([task]), *worker.step([again(task, grant=1)])]
    assert [outcome.finished for outcome in outcomes] == [False, True]
    assert trainer.runs["a"].grad == 6 / 64


# ---- the other kinds


def test_answers_have_the_protocols_form(tmp_path: Path) -> None:
    worker, _ = worker_with()
    (made,) = worker.step([create("a")])
    assert json.loads(made.result) == {"model_id": "a", "type": "create_model"}
    worker.step([forward_backward("a", datum(63))])
    (stepped,) = worker.step([optim_step("a")])
    assert json.loads(stepped.result) == {"metrics": {"grad_norm": 1.0}}  # NaN is not JSON
    assert (stepped.facts["grad_norm"], stepped.facts["learning_rate"]) == (1.0, 0.5)

    directory = str(tmp_path / "one")
    args = {"directory": directory, "optimizer": True, "path": "tinker://a/weights/one"}
    (saved,) = worker.step([Task("s", "a", OpKind.SAVE_WEIGHTS, args)])
    assert json.loads(saved.result) == {"path": "tinker://a/weights/one"}
    assert saved.facts["size_bytes"] > 0

    (loaded,) = worker.step([Task("l", "b", OpKind.LOAD_WEIGHTS, args)])
    answer = {"path": "tinker://a/weights/one", "model_id": "b", "type": "load_weights"}
    assert json.loads(loaded.result) == answer

    for named in ({"path": "tinker://a/sampler_weights/two"}, {"sampling_session_id": "s:sample:0"}):
        args = {"directory": str(tmp_path / next(iter(named))), **named}
        (outcome,) = worker.step([Task("w", "a", OpKind.SAVE_WEIGHTS_FOR_SAMPLER, args)])
        assert json.loads(outcome.result) == named

    (unloaded,) = worker.step([Task("u", "a", OpKind.UNLOAD_MODEL)])
    assert (unloaded.category, json.loads(unloaded.result)["model_id"]) == ("", "a")
    (missing,) = worker.step([optim_step("a")])
    assert missing.category == "user"


def test_optimizer_state_is_saved_for_training_and_not_for_sampling(tmp_path: Path) -> None:
    worker, trainer = worker_with("a")
    worker.step([optim_step("a")])
    args = {"directory": str(tmp_path / "t"), "optimizer": True, "path": "p"}
    worker.step([Task("1", "a", OpKind.SAVE_WEIGHTS, args), Task("2", "b", OpKind.LOAD_WEIGHTS, args)])
    assert trainer.runs["b"].steps == 1
    args = {"directory": str(tmp_path / "s"), "optimizer": True, "path": "p"}
    worker.step(
        [Task("3", "a", OpKind.SAVE_WEIGHTS_FOR_SAMPLER, args), Task("4", "b", OpKind.LOAD_WEIGHTS, args)]
    )
    assert trainer.runs["b"].steps == 0


def test_the_fakes_numbers_are_exact() -> None:
    worker, _ = worker_with("a")
    (outcome,) = worker.step([forward_backward("a", datum(0, 31))])
    logprobs = output(outcome).loss_fn_outputs[0]["logprobs"].data
    assert np.array_equal(logprobs, [-1 / 64, -0.5])


def test_a_refused_datum_is_counted_over_the_whole_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """However an op is cut, its error names the datum that the client sent."""
    worker, trainer = worker_with("a")
    run = trainer.forward_backward

    def refuse(batch: Any) -> list[Any]:
        if any(63 in one.tokens for one in batch[0][1].data):
            index = next(i for i, one in enumerate(batch[0][1].data) if 63 in one.tokens)
            return [DatumError(index, "the loss is nan")]
        return run(batch)

    monkeypatch.setattr(trainer, "forward_backward", refuse)
    task = forward_backward("a", datum(1), datum(2), datum(3), datum(63), grant=2)
    (first,) = worker.step([task])
    assert not first.finished
    (last,) = worker.step([again(task, grant=2)])
    assert last.category == "user"
    assert last.error == "datum 3: the loss is nan"
