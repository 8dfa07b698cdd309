"""Graphs of losses that would do more than arithmetic, or more of it than is allowed, are refused."""

from __future__ import annotations

import base64
import json
import random
import time
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.support.datums import make_datum
from tests.support.losses import LOSSES, P, around, custom, graph_of, neg_ll, node
from tuft_jupyter.core import loss_graph
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.loss_graph import LossGraph, Node, checked
from tuft_jupyter.engine.custom_loss import _TABLE, Program, allowance
from tuft_jupyter.engine.trainer import PeftTrainer


@pytest.fixture(scope="module")
def taking(qwen3: Path) -> PeftTrainer:
    """A trainer that computes such losses, for requests that never get as far."""
    return PeftTrainer(qwen3, custom_loss=True, max_length=2048)


def test_the_switch_is_off_and_the_refusal_names_it(qwen3: Path) -> None:
    """H9."""
    trainer = PeftTrainer(qwen3)
    ranks = {"logprobs": 1, "weights": 1}
    with pytest.raises(UserError, match="custom_loss_server_side"):
        trainer.check(custom(graph_of(neg_ll, ranks), [make_datum(9)]))


def test_every_allowed_name_is_a_function_and_none_of_them_leaves_torch() -> None:
    """H9: what could read a file, draw a number, write in place or run code is in no list."""
    assert set(_TABLE) == set(loss_graph.FUNCTIONS)
    assert all(callable(function) for function in _TABLE.values())
    assert all(callable(getattr(torch.Tensor, name)) for name in loss_graph.METHODS)
    for name in loss_graph.METHODS | {one.rpartition(".")[2] for one in loss_graph.FUNCTIONS}:
        assert not (name.endswith("_") and name not in ("and_", "or_")), name
    banned = {
        "load",
        "save",
        "from_file",
        "eval",
        "exec",
        "compile",
        "import_module",
        "item",
        "numpy",
        "tolist",
    }
    banned |= {
        "rand",
        "randn",
        "bernoulli",
        "dropout",
        "masked_select",
        "nonzero",
        "unique",
        "as_strided",
        "set_",
    }
    banned |= {
        "apply_",
        "map_",
        "register_hook",
        "backward",
        "requires_grad_",
        "cuda",
        "share_memory_",
        "matmul",
    }
    named = {one.rpartition(".")[2] for one in loss_graph.FUNCTIONS}
    assert not banned & (loss_graph.METHODS | named)


def test_the_frame_of_the_hostile_graphs_is_a_good_one(taking: PeftTrainer) -> None:
    taking.check(custom(around(), [make_datum(6)]))


REFUSED_BY_NAME: list[tuple[list[dict[str, Any]], str]] = [
    ([node("call_function", "os.system", "id")], "'os.system' may not be called"),
    ([node("call_function", "builtins.eval", "1")], "'builtins.eval' may not be called"),
    ([node("call_function", "torch.load", "/etc/passwd")], "'torch.load' may not be called"),
    ([node("call_function", "torch.ops.aten.sum", P)], "may not be called"),
    ([node("call_function", "torch.Tensor.__class__", P)], "may not be called"),
    ([node("call_function", "torch.rand_like", P)], "'torch.rand_like' may not be called"),
    ([node("call_method", "__reduce__", P)], "'__reduce__' may not be called"),
    ([node("call_method", "tofile", P)], "'tofile' may not be called"),
    ([node("call_method", "add_", P, 1)], "'add_' may not be called"),
    ([node("call_method", "apply_", P, 1)], "'apply_' may not be called"),
    ([node("call_module", "linear", P)], "'call_module'"),
    ([node("get_attr", "weight")], "'get_attr'"),
    ([node("call_function", "getattr", P, "__class__")], "attributes a loss may read"),
    ([node("call_function", "getattr", P, "grad_fn")], "attributes a loss may read"),
    ([node("call_function", "getattr", P, {"ref": "logprobs"})], "attributes a loss may read"),
    ([node("call_function", "torch.exp", P, out={"ref": "logprobs"})], "argument 'out'"),
    ([node("call_function", "torch.nn.functional.relu", P, inplace=True)], "argument 'inplace'"),
    ([node("call_function", "torch.true_divide", P, 2, rounding_mode="floor")], "argument 'rounding_mode'"),
    ([node("call_method", "to", P, "cuda:0")], "string 'cuda:0'"),
    ([node("call_function", "torch.exp", {"ref": "later"})], "'later', which is no earlier node"),
    ([node("call_function", "torch.exp", {"object": "x"})], "kind 'object'"),
    ([node("call_function", "torch.exp", {"dtype": "complex64"})], "kind 'dtype'"),
    ([node("call_function", "torch.exp", {"dtype": ["float32"]})], "kind 'dtype'"),
    ([node("call_function", "torch.exp", {"float": {}})], "kind 'float'"),
    ([node("call_function", "torch.exp", {"ref": []})], "no earlier node"),
    ([node("call_function", "torch.exp", 2**60)], "beyond 2"),
    ([node("call_function", "torch.exp", P, name="logprobs")], "taken"),
    ([node("call_function", "torch.exp", P, name="a.b")], "not a word"),
    ([node("call_function", "torch.stack", [[[[[[P]]]]]])], "nested deeper"),
    ([node("placeholder", "more", name="more")], "placeholder for each"),
    ([node("output", "output", {"tuple": [P, {"dict": {}}]}, name="o1")], "its one output"),
    ([node("call_method", "exp", P, name=f"n{i}") for i in range(300)], "1 to 256"),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "words"), REFUSED_BY_NAME, ids=[w for _, w in REFUSED_BY_NAME])
def test_a_graph_that_would_do_more_than_arithmetic_is_refused_with_its_node(
    nodes: list[dict[str, Any]], words: str
) -> None:
    """H9."""
    with pytest.raises(UserError) as refusal:
        around(*nodes)
    assert words in refusal.value.message
    assert "graph.nodes" in refusal.value.message


COSTLY: list[tuple[list[dict[str, Any]], str]] = [
    ([node("call_function", "torch.zeros", 10**14)], "grow beyond"),
    ([node("call_function", "torch.arange", 0, 10**12)], "grow beyond"),
    ([node("call_method", "expand", P, 10**9, 6)], "grow beyond"),
    ([node("call_function", "torch.full", [10**5, 10**5], 1.0)], "grow beyond"),
    ([node("call_function", "operator.pow", 9, 999999999)], "too large|out of range"),
    ([node("call_function", "operator.mul", 2**52, 2**52)], "beyond 2"),
    ([node("call_function", "operator.mul", [1], 10**9)], "list is neither"),
    ([node("call_function", "operator.mul", {"tuple": [1]}, 10**9)], "tuple is neither"),
    ([node("call_function", "operator.getitem", [1], 0)], "only a tensor"),
    ([node("call_function", "operator.gt", P, 0, name="m"),
      node("call_function", "operator.getitem", P, {"ref": "m"})], "node x"),
    ([node("call_function", "torch.where", P)], "node x"),
    ([node("call_function", "getattr", P, "values")], "no use for"),
    ([node("call_method", "exp", 3)], "something else"),
    ([node("call_function", "torch.add", P, [1, 2, 3])], "node x"),
    ([node("call_function", "math.exp", 1000)], "node x.*range"),
    ([node("call_function", "operator.getitem", P, 99)], "node x"),
    ([node("call_method", "reshape", P, 7, 7)], "node x"),
    ([node("call_method", "unsqueeze", P, 0, name="a"), node("call_function", "torch.add", P, {"ref": "a"}, name="b")]
     + [node("call_function", "torch.cat", [{"ref": "b" if not i else f"c{i - 1}"}] * 100, name=f"c{i}")
        for i in range(8)], "grow beyond"),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "words"), COSTLY, ids=range(len(COSTLY)))
def test_a_graph_that_grows_is_refused_before_anything_is_allocated(
    taking: PeftTrainer, nodes: list[dict[str, Any]], words: str
) -> None:
    """H9, H4: names the datum, the node and the limit."""
    asked = custom(around(*nodes), [make_datum(6)])
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    with pytest.raises(UserError, match=words) as refusal:
        taking.check(asked)
    assert time.perf_counter() - began < 2.0
    assert psutil.Process().memory_info().rss - before < 64 * 2**20
    assert refusal.value.message.startswith("datum 0: custom loss, node ")


def test_the_work_a_graph_may_ask_for_is_bounded_by_what_is_trained_on(taking: PeftTrainer) -> None:
    """Deep but small passes; the same depth over every pair of positions does not."""
    chain = [
        node("call_method", "tanh", P if not i else {"ref": f"n{i - 1}"}, name=f"n{i}") for i in range(250)
    ]
    taking.check(custom(around(*chain), [make_datum(256)]))
    column = {"tuple": [{"slice": [None, None, None]}, None]}
    wide = [
        node("call_function", "operator.getitem", P, column, name="a"),
        node("call_function", "operator.sub", {"ref": "a"}, P, name="n0"),
        *({**each, "args": [{"ref": f"n{i}"}], "name": f"n{i + 1}"} for i, each in enumerate(chain[:240])),
    ]
    with pytest.raises(UserError, match=f"grow beyond {allowance(256)} elements, the limit for 256"):
        taking.check(custom(around(*wide), [make_datum(256)]))


WRONG_DATUMS: list[tuple[dict[str, Any], str]] = [
    ({}, "the loss takes weights; add it"),
    ({"weights": np.ones((9, 2), np.float32)}, r"weights has shape \[9, 2\]; the loss takes \[N\]"),
    ({"weights": np.ones(7, np.float32)}, "weights has 7 rows for 9 tokens"),
    ({"weights": np.full(9, np.nan, np.float32)}, "weights is not finite at element 0"),
    (
        {"weights": np.ones(9, np.float32), "target_tokens": np.ones((9, 2), np.int64)},
        "target_tokens has shape",
    ),
]


@pytest.mark.parametrize(("inputs", "words"), WRONG_DATUMS)
def test_a_datum_that_does_not_fit_the_loss_is_named(
    taking: PeftTrainer, inputs: dict[str, Any], words: str
) -> None:
    graph = graph_of(neg_ll, {"logprobs": 1, "weights": 1})
    right = make_datum(5, weights=np.ones(5, np.float32))
    with pytest.raises(UserError, match=f"^datum 1: .*{words}"):
        taking.check(custom(graph, [right, make_datum(9, **inputs)]))


def at_random(chance: random.Random) -> LossGraph:
    """A few allowed calls on whatever there is; UserError for what no graph may say."""
    inputs = [("logprobs", 1), ("floats", 1), ("integers", 1), ("matrix", 2), ("number", 0)]
    nodes = [Node("placeholder", name, name) for name, _ in inputs]
    plain: list[Any] = [0, 1, -1, 3, 2**31, -(2**53), 0.5, 1e308, True, None, {"float": "nan"}, {"ellipsis": True},
                        {"dtype": "int64"}, {"dtype": "bfloat16"}, {"slice": [None, -1, 2]}, "mean"]  # fmt: skip

    def value() -> Any:
        some: Any = {"ref": chance.choice(nodes).name} if chance.random() < 0.5 else chance.choice(plain)
        return some if chance.random() < 0.8 else chance.choice([[some], {"tuple": [some, 1]}])

    for i in range(chance.randint(1, 4)):
        named = {"call_function": sorted(loss_graph.FUNCTIONS), "call_method": sorted(loss_graph.METHODS)}
        op = chance.choice(list(named))
        target = chance.choice(named[op])
        first = {"ref": chance.choice(nodes).name}
        args = [first, chance.choice(sorted(loss_graph.ATTRIBUTES))] if target == "getattr" else [first]
        args += [] if target == "getattr" else [value() for _ in range(chance.choice([0, 0, 1, 1, 2, 3]))]
        nodes.append(Node(op, f"n{i}", target, args))
    nodes.append(Node("call_method", "one", "sum", [{"ref": nodes[-1].name}]))
    nodes.append(Node("call_method", "other", "sum", [P]))
    nodes.append(Node("call_function", "loss", "operator.add", [{"ref": "one"}, {"ref": "other"}]))
    nodes.append(Node("output", "output", "output", [{"tuple": [{"ref": "loss"}, {"dict": {}}]}]))
    return checked(inputs, nodes)


def test_graphs_at_random_end_in_numbers_or_in_a_users_error() -> None:
    """H9: whatever allowed functions are called with, the worker goes on."""
    ran = 0
    given = {
        "floats": torch.randn(6),
        "integers": torch.tensor([0, -1, 2**63 - 1, -(2**63), 3, 5]),
        "matrix": torch.randn(6, 3),
        "number": torch.tensor(2.0),
    }
    logprobs = -torch.rand(6)
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in given.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has much to say of such calls
        for seed in range(1500):
            try:
                program = Program(at_random(random.Random(seed)))
                program.check({"logprobs": ((6,), torch.float32), **shapes})
                program.evaluate(logprobs, given)
            except UserError:
                continue
            ran += 1
    assert ran > 30


def _id(plain: bytes) -> str:
    return "graph1." + base64.urlsafe_b64encode(zlib.compress(plain, 9)).decode()


GOOD = graph_of(*LOSSES[0])
NO_IDS = [
    "", "loss-17", "graph1.", "graph1.!!!", "graph1.AAAA", "graph2" + GOOD.id[6:], GOOD.id[:-8], _id(b"[]"),
    _id(b"[" * 60_000), _id(bytes(2**27)), _id(b'[[["logprobs",1]],[[[],[],[],[],[]]]]'), _id(b"null"),
    "graph1." + "A" * 10**6,
    _id(json.dumps([[["logprobs", 1]], [["call_function", "x", "torch.load", ["/x"], {}]]]).encode()),
]  # fmt: skip


@pytest.mark.parametrize("text", NO_IDS, ids=range(len(NO_IDS)))
def test_an_id_that_no_server_gave_is_refused_and_costs_nothing(taking: PeftTrainer, text: str) -> None:
    """H9: an id is a stranger's input like any other; one that unpacks to 128 MiB is not unpacked."""
    asked = replace(custom(GOOD, [make_datum(5)]), loss_config={"loss_id": text})
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    with pytest.raises(UserError):
        taking.check(asked)
    assert time.perf_counter() - began < 1.0
    assert psutil.Process().memory_info().rss - before < 32 * 2**20


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([], "inputs: 0"), ([("weights", 1)], "first must be logprobs"), ([("logprobs", 0)], "rank"),
        ([("logprobs", 3)], "rank"), ([("logprobs", 1), ("logprobs", 1)], "once"), ([("Logprobs", 1)], "lowercase"),
        ([("logprobs", 1)] + [(f"i{n}", 1) for n in range(16)], "inputs: 17"),
    ],
)  # fmt: skip
def test_inputs_that_no_loss_can_take_are_refused(inputs: list[tuple[str, int]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        checked(inputs, [Node("output", "output", "output")])


def test_what_a_loss_returns_must_be_a_scalar_and_metrics_that_say_how_they_combine() -> None:
    out = [{"tuple": [P, {"dict": {"loss:sum": P}}]}]
    with pytest.raises(UserError, match=r"custom/<name>:sum"):
        checked(
            [("logprobs", 1)],
            [Node("placeholder", "logprobs", "logprobs"), Node("output", "o", "output", out)],
        )
    program = Program(around(loss="logprobs"))
    with pytest.raises(UserError, match=r"loss: must be a tensor of one number, not \[6\]"):
        program.check({"logprobs": ((6,), torch.float32)})
