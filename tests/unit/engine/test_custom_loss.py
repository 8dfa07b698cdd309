"""Losses that users wrote: the numbers, and what becomes of a run whose loss goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker.lib.public_interfaces.custom_loss import run_loss_handle

from tests.support.datums import ask, make_datum
from tests.support.losses import IDS, LOSSES, Fn, P, around, custom, graph_of, handle_of, node
from tuft_jupyter.core.errors import DatumError, UserError
from tuft_jupyter.core.loss_graph import from_id
from tuft_jupyter.core.types import AdamParams, Datum, ForwardBackwardResult, LoraSpec
from tuft_jupyter.engine.trainer import PeftTrainer

SPEC = LoraSpec(rank=4, alpha=8, seed=1, train_unembed=False)


def datums(ranks: dict[str, int], lengths: tuple[int, ...] = (9, 17, 5)) -> list[Datum]:
    rng, made = np.random.default_rng(4), []
    for seed, n in enumerate(lengths):
        shapes: dict[int, tuple[int, ...]] = {0: (1,), 1: (n,), 2: (n, 3)}
        more: dict[str, Any] = {
            name: -3 + rng.normal(size=shapes[rank]).astype(np.float32) for name, rank in ranks.items()
        }
        more.pop("logprobs")
        if ranks["logprobs"] == 2:
            more["target_tokens"] = rng.integers(0, 320, (n, 3))
        made.append(make_datum(n, seed=seed, **more))
    return made


def client_side(
    fn: Fn, ranks: dict[str, int], data: list[Datum], logprobs: Any
) -> tuple[float, Any, list[Any]]:
    """(loss, metrics, slopes) as the SDK computes them in the kernel."""
    given = []
    for datum in data:
        inputs = {
            name: tinker.TensorData.from_torch(
                torch.from_numpy(value if ranks.get(name) != 0 else value.reshape(()))
            )
            for name, value in datum.inputs.items()
        }
        given.append(
            tinker.Datum(
                model_input=tinker.ModelInput.from_ints(datum.tokens.tolist()), loss_fn_inputs=inputs
            )
        )
    leaves = [torch.from_numpy(one.copy()).requires_grad_() for one in logprobs]
    loss, metrics = run_loss_handle(handle_of(fn, ranks), given, leaves)
    loss.backward()
    return float(loss.detach()), metrics, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(("fn", "ranks"), LOSSES, ids=IDS)
@pytest.mark.parametrize("budget", [16, 1024])
def test_gradients_loss_and_metrics_are_those_of_the_loss_on_the_clients_side(
    qwen3: Path, fn: Fn, ranks: dict[str, int], budget: int
) -> None:
    """H9, S1-34: fp32, packed with others or alone, against the SDK's own run and its linearised second pass."""
    trainer = PeftTrainer(qwen3, custom_loss=True, micro_batch_tokens=budget)
    trainer.create("here", SPEC)
    trainer.create("there", SPEC)
    data, graph = datums(ranks), graph_of(fn, ranks)
    asked = custom(graph, data)
    trainer.check(asked)
    result = trainer.forward_backward([("here", asked), ("there", ask([make_datum(6)]))])[0]
    trainer.optim_step([("there", AdamParams(learning_rate=0.0))])
    assert isinstance(result, ForwardBackwardResult), result
    loss, metrics, slopes = client_side(fn, ranks, data, result.logprobs)
    assert result.loss_sum == pytest.approx(loss, rel=1e-5)
    assert {name: value for name, value in result.metrics.items() if name != "loss:sum"} == pytest.approx(
        metrics, rel=1e-4, abs=1e-6
    )
    plain = {"target_tokens"}
    linear = [
        Datum(d.tokens, {**{k: v for k, v in d.inputs.items() if k in plain}, "weights": -slope.numpy()})
        for d, slope in zip(data, slopes, strict=True)
    ]
    trainer.forward_backward([("there", ask(linear))])
    ours, theirs = (trainer.bank[run].grads for run in ("here", "there"))
    assert ours is not None
    assert theirs is not None
    assert float(theirs.norm()) > 0
    assert float((ours - theirs).norm()) <= 2e-6 * float(theirs.norm())


def test_an_id_is_the_whole_loss_and_survives_every_restart() -> None:
    """F5: nothing is kept beside the request, so a replay computes the same."""
    for fn, ranks in LOSSES:
        graph = graph_of(fn, ranks)
        assert from_id(graph.id).id == graph.id
        assert len(graph.id) < 2000


def test_what_goes_wrong_while_it_runs_fails_that_request_alone_and_names_its_datum(qwen3: Path) -> None:
    """H9, F12: the run's gradient is as before, and the other run's step is what it is alone."""
    trainer = PeftTrainer(qwen3, custom_loss=True)
    trainer.create("here", SPEC)
    trainer.create("other", SPEC)
    trainer.create("alone", SPEC)
    rooted = around(
        node("call_function", "operator.mul", P, 0, name="a"), node("call_method", "sqrt", {"ref": "a"}, name="b"),
        node("call_method", "sum", {"ref": "b"}, name="c"), loss="c",
    )  # fmt: skip
    index = around(
        node("call_function", "operator.getitem", P, [40]), node("call_method", "sum", {"ref": "x"}, name="c"),
        loss="c",
    )  # fmt: skip
    constant = around(node("call_function", "torch.ones", 3, name="a"),
                      node("call_method", "sum", {"ref": "a"}, name="c"), loss="c")  # fmt: skip
    good = ask([make_datum(6)])
    trainer.forward_backward([("alone", good)])
    for graph, words in ((rooted, "slope"), (index, "out of"), (constant, "does not depend on logprobs")):
        asked = custom(graph, [make_datum(6), make_datum(8)])
        try:
            trainer.check(asked)
        except UserError as error:
            assert words in error.message  # noqa: PT017 - an index is refused here or there, by torch's version
            continue
        refused, beside = trainer.forward_backward([("here", asked), ("other", good)])
        assert isinstance(refused, DatumError), refused
        assert words in refused.message
        assert refused.datum in (0, 1)
        assert isinstance(beside, ForwardBackwardResult)
        ours, alone, none = (trainer.bank[run].grads for run in ("other", "alone", "here"))
        assert ours is not None
        assert alone is not None
        assert none is not None
        assert torch.equal(ours, alone)
        assert not none.any()
        trainer._runs["other"].dirty = False
        ours.zero_()


def test_a_metric_may_be_infinite_and_the_loss_is_learnt_from_all_the_same(qwen3: Path) -> None:
    """H9: as at the client, where infinities of both signs add up to no number."""

    def divided(logprobs: Any, w: Any) -> Any:
        return -logprobs.sum(), {"custom/ratio:sum": w.sum() / (w.sum() - w.sum())}

    trainer = PeftTrainer(qwen3, custom_loss=True)
    trainer.create("run", SPEC)
    data = [make_datum(4, w=np.full(4, sign, np.float32)) for sign in (1, -1)]
    (result,) = trainer.forward_backward([("run", custom(graph_of(divided, {"logprobs": 1, "w": 1}), data))])
    assert isinstance(result, ForwardBackwardResult), result
    assert np.isnan(result.metrics["custom/ratio:sum"])
