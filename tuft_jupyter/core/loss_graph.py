"""A loss of a user's own as a graph of operations: plain data, of which nothing runs before all of it is checked.

The SDK traces a loss with torch.fx and sends its nodes. :func:`checked` holds them against the lists of this module:
which functions, methods and attributes may be called, how many nodes there may be, what an argument may be. It knows
names, not torch; what the names mean, and what a graph may cost, is :mod:`tuft_jupyter.engine.custom_loss`'s to say.

A graph is its own id (:attr:`LossGraph.id`), so it travels in every request that uses it. Nothing has to be kept,
looked up or protected from other tenants, a replay is exact, and an id is checked like any other stranger's input.

What is left out is left out on purpose: what draws random numbers (a replay would differ), what writes in place, what
leaves torch, integer division and matrix products (one value, no bound on the work), and whatever makes a value
whose size depends on numbers (``x[mask]``: multiply by the mask instead).

Source: tinker 0.38, ``types/custom_loss_graph.py`` and ``lib/public_interfaces/custom_loss.py``.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tuft_jupyter.core.errors import UserError

MAX_NODES = 256
MAX_INPUTS = 16
MAX_BYTES = 64 * 2**10
"""Of a graph as JSON."""
MAX_DEPTH = 4
"""Of lists, tuples and dicts within one argument."""
MAX_INTEGER = 2**53
MAX_NAME = 64

LOGPROBS = "logprobs"
RANKS = (0, 1, 2)
"""A number, [T], [T, K]."""

_PREFIX = "graph1."
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_INPUT = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")

_POINTWISE = (
    "abs add addcdiv addcmul atan clamp clamp_max clamp_min clip cos erf exp exp2 expm1 lerp log log10 log1p log2 "
    "maximum minimum mul multiply nan_to_num neg negative pow reciprocal relu rsqrt sigmoid sign sin sqrt square sub "
    "subtract tan tanh true_divide where eq ne lt le gt ge isfinite isinf isnan logical_and logical_not logical_or "
    "logical_xor"
)
_REDUCING = (
    "all amax amin any argmax argmin cumsum log_softmax logcumsumexp logsumexp max mean median min norm prod "
    "softmax std sum var"
)
_SHAPING = (
    "cat concat detach dot flatten flip full_like gather ones_like reshape roll sort squeeze stack transpose "
    "tril triu unsqueeze zeros_like"
)
_PICKED = "arange full ones zeros"
_METHODS_ONLY = (
    "bool contiguous dim double expand expand_as float half int long masked_fill new_full new_ones new_zeros numel "
    "permute size t to type_as view view_as clone bfloat16"
)
_FUNCTIONAL = (
    "binary_cross_entropy_with_logits elu huber_loss kl_div l1_loss leaky_relu log_softmax logsigmoid mse_loss relu "
    "sigmoid silu smooth_l1_loss softmax softplus softmin tanh"
)
_OPERATORS = "abs add and_ eq ge getitem gt inv invert le lt mul ne neg or_ pos pow sub truediv xor"
_MATH = "ceil cos exp expm1 fabs floor isfinite isinf isnan log log10 log1p log2 sin sqrt tanh"

METHODS = frozenset(f"{_POINTWISE} {_REDUCING} {_SHAPING} {_METHODS_ONLY}".split()) - {
    "cat", "concat", "full_like", "ones_like", "stack", "zeros_like",
}  # fmt: skip
FUNCTIONS = frozenset(
    [f"torch.{name}" for name in f"{_POINTWISE} {_REDUCING} {_SHAPING} {_PICKED}".split()]
    + [f"torch.nn.functional.{name}" for name in _FUNCTIONAL.split()]
    + ["torch._C._nn.softplus", "torch._C._nn.log_sigmoid", "torch._C._nn.gelu"]
    + [f"torch._C._special.special_{name}" for name in ("expit", "log_softmax", "logsumexp", "softmax")]
    + [f"operator.{name}" for name in _OPERATORS.split()]
    + [f"math.{name}" for name in _MATH.split()]
    + ["getattr"]
)
ATTRIBUTES = frozenset(("T", "device", "dtype", "indices", "mT", "ndim", "shape", "values"))
DTYPES = frozenset(
    ("bfloat16", "bool", "float", "float16", "float32", "float64", "int", "int32", "int64", "long")
)
_KEYWORDS = frozenset(
    (
        "alpha approximate beta copy correction delta descending device diagonal dim dim0 dim1 dims dtype end end_dim "
        "exponent fill_value index indices inplace input keepdim log_target max memory_format min nan negative_slope "
        "neginf non_blocking ord other p pos_weight posinf reduce reduction requires_grad shape shifts size "
        "size_average sparse_grad stable start start_dim step target tensor1 tensor2 tensors threshold unbiased value "
        "weight _stacklevel"
    ).split()
)
_WORDS = frozenset(("none", "mean", "sum", "batchmean", "tanh"))
"""Strings an argument may be."""


@dataclass(frozen=True, slots=True)
class Node:
    """One operation: ``op`` is placeholder, call_function, call_method or output.

    ``args`` and ``kwargs`` are as on the wire: JSON values, and objects of one key for what JSON has no word for.
    """

    op: str
    name: str
    target: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class LossGraph:
    """A checked graph. ``inputs`` are (name, rank) in order, ``logprobs`` first; the last node is the output."""

    inputs: tuple[tuple[str, int], ...]
    nodes: tuple[Node, ...]

    @property
    def id(self) -> str:
        """The graph itself, as text that a request carries."""
        return _PREFIX + base64.urlsafe_b64encode(zlib.compress(_plain(self.inputs, self.nodes), 9)).decode()


@lru_cache(maxsize=32)
def from_id(text: str) -> LossGraph:
    """The graph that an id is; UserError for anything else."""
    if not text.startswith(_PREFIX) or len(text) > 2 * MAX_BYTES:
        raise _not_an_id()
    try:
        packed = base64.b64decode(text.removeprefix(_PREFIX), altchars=b"-_", validate=True)
        inflate = zlib.decompressobj()
        plain = inflate.decompress(packed, MAX_BYTES + 1)
        if len(plain) > MAX_BYTES or not inflate.eof:
            raise _not_an_id()
        inputs, nodes = json.loads(plain)
        read = [Node(op, name, target, args, kwargs) for op, name, target, args, kwargs in nodes]
        return checked([(name, rank) for name, rank in inputs], read)
    except (binascii.Error, zlib.error, ValueError, TypeError, RecursionError):
        raise _not_an_id() from None


def _not_an_id() -> UserError:
    return UserError(
        'loss_fn_config: "loss_id" is not the id of a loss of this server; use what create_custom_loss() gave'
    )


def _plain(inputs: Sequence[tuple[str, int]], nodes: Sequence[Node]) -> bytes:
    rows = [[node.op, node.name, node.target, node.args, node.kwargs or {}] for node in nodes]
    return json.dumps([inputs, rows], separators=(",", ":")).encode()


def checked(inputs: Sequence[tuple[str, int]], nodes: Sequence[Node]) -> LossGraph:
    """The graph, if every part of it is allowed; UserError names the node, what is wrong and the way out."""
    _check_inputs(inputs)
    if not 1 <= len(nodes) <= MAX_NODES:
        raise UserError(f"graph.nodes: {len(nodes)} nodes; a loss may have 1 to {MAX_NODES}: simplify it")
    known: set[str] = set()
    for at, node in enumerate(nodes):
        where = f"graph.nodes[{at}]"
        if not (isinstance(node.name, str) and _NAME.fullmatch(node.name)):
            raise UserError(f"{where}: its name is not a word of at most {MAX_NAME} letters and digits")
        where = f"{where} ({node.name})"
        if node.name in known:
            raise UserError(f"{where}: the name is taken by an earlier node")
        if (node.op == "placeholder") != (at < len(inputs)):
            raise UserError(f"{where}: the graph must begin with one placeholder for each of its inputs")
        if (node.op == "output") != (at == len(nodes) - 1):
            raise UserError(f"{where}: the graph must end with its one output")
        if node.op == "placeholder":
            if node.target != inputs[at][0]:
                raise UserError(f"{where}: this placeholder must be {inputs[at][0]!r}, as in inputs[{at}]")
        elif node.op == "output":
            _check_output(where, node, known)
        else:
            _check_call(where, node, known)
        known.add(node.name)
    size = len(_plain(inputs, nodes))
    if size > MAX_BYTES:
        raise UserError(f"graph: {size} bytes; a loss may have at most {MAX_BYTES}: simplify it")
    return LossGraph(tuple((name, rank) for name, rank in inputs), tuple(nodes))


def _check_inputs(inputs: Sequence[tuple[str, int]]) -> None:
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise UserError(f"inputs: {len(inputs)} inputs; a loss takes 1 to {MAX_INPUTS}, logprobs included")
    for at, (name, rank) in enumerate(inputs):
        if not (isinstance(name, str) and _INPUT.fullmatch(name)):
            raise UserError(f"inputs[{at}].name: not a lowercase word of at most {MAX_NAME} characters")
        if rank not in RANKS or (at == 0 and rank == 0):
            raise UserError(f"inputs[{at}].rank: 1 is [T], 2 is [T, K], and 0 a number (not for logprobs)")
    names = [name for name, _ in inputs]
    if names[0] != LOGPROBS or len(set(names)) != len(names):
        raise UserError("inputs: the first must be logprobs, and each name may occur once")


def _check_call(where: str, node: Node, known: set[str]) -> None:
    lists = {"call_function": FUNCTIONS, "call_method": METHODS}
    if node.op not in lists:
        raise UserError(f"{where}: a loss may call functions and methods, not {str(node.op)[:MAX_NAME]!r}")
    if node.target not in lists[node.op]:
        raise UserError(
            f"{where}: {str(node.target)[:MAX_NAME]!r} may not be called in a loss on this server. Give "
            "forward_backward_custom() the function itself, and it is computed on your side"
        )
    args: Sequence[Any] = node.args
    if not isinstance(args, list | tuple) or not isinstance(node.kwargs or {}, dict):
        raise UserError(f"{where}: args must be a list and kwargs an object")
    if node.target == "getattr":
        if len(args) != 2 or node.kwargs or not _is_one_of(ATTRIBUTES, args[1]):
            raise UserError(f"{where}: attributes a loss may read: {', '.join(sorted(ATTRIBUTES))}")
        args = args[:1]
    for arg in args:
        _check_argument(where, arg, known)
    for key, arg in (node.kwargs or {}).items():
        if key not in _KEYWORDS or (key == "inplace" and arg is not False):
            raise UserError(f"{where}: argument {str(key)[:MAX_NAME]!r} may not be given in a loss")
        _check_argument(where, arg, known)


def _check_argument(where: str, arg: Any, known: set[str], depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise UserError(f"{where}: an argument is nested deeper than {MAX_DEPTH} levels")
    if arg is None or isinstance(arg, bool):
        return
    if isinstance(arg, int | float):
        if not abs(arg) <= MAX_INTEGER and isinstance(arg, int):
            raise UserError(f"{where}: a whole number is beyond 2^53")
        if isinstance(arg, float) and not math.isfinite(arg):
            raise UserError(f"{where}: a number that is not finite is written as an object")
    elif isinstance(arg, str):
        if arg not in _WORDS:
            raise UserError(f"{where}: the string {arg[:MAX_NAME]!r} is no argument of a loss")
    elif isinstance(arg, list):
        for part in arg:
            _check_argument(where, part, known, depth + 1)
    elif isinstance(arg, dict) and len(arg) == 1:
        _check_object(where, *next(iter(arg.items())), known, depth)
    else:
        raise UserError(f"{where}: an argument is neither a JSON value nor an object with one key")


def _check_object(where: str, kind: str, value: Any, known: set[str], depth: int) -> None:
    match kind:
        case "ref":
            if not isinstance(value, str) or value not in known:
                raise UserError(f"{where}: refers to {str(value)[:MAX_NAME]!r}, which is no earlier node")
        case "tuple" if isinstance(value, list):
            _check_argument(where, value, known, depth)
        case "slice" if isinstance(value, list) and len(value) == 3:
            _check_argument(where, value, known, depth)
        case "ellipsis" if value is True:
            pass
        case "float" if value in ("inf", "-inf", "nan"):
            pass
        case "dtype" if _is_one_of(DTYPES, value):
            pass
        case "device" | "memory_format":
            pass  # a loss is computed where the server computes it
        case _:
            raise UserError(f"{where}: an argument of kind {kind[:MAX_NAME]!r} is not one a loss may have")


def _is_one_of(names: frozenset[str], value: Any) -> bool:
    """A request may hold anything in the place of a name, also what has no hash."""
    return isinstance(value, str) and value in names


def _check_output(where: str, node: Node, known: set[str]) -> None:
    """``(loss, metrics)``: a node, and nodes by names that say how each combines over datums."""
    try:
        (pair,) = node.args
        loss, metrics = pair["tuple"] if isinstance(pair, dict) else pair
        named = dict(metrics["dict"])
        refs = [loss["ref"], *(value["ref"] for value in named.values())]
    except (TypeError, ValueError, KeyError):
        raise UserError(f"{where}: a loss must return (loss, metrics), tensors of the graph") from None
    for ref in refs:
        _check_object(where, "ref", ref, known, 0)
    for key in named:
        if not _METRIC.fullmatch(key):
            raise UserError(
                f"{where}: metric {key[:MAX_NAME]!r} must be called custom/<name>:sum or custom/<name>:mean"
            )
