"""Losses as users write them, traced by the stock SDK, and graphs written by hand as no SDK would."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss

from tuft_jupyter.core.loss_graph import LossGraph, Node, checked
from tuft_jupyter.core.types import Datum, ForwardBackward

Fn = Callable[..., Any]


def neg_ll(logprobs: Any, weights: Any) -> Any:
    loss = -(logprobs * weights).sum()
    return loss, {"custom/nll:sum": loss, "custom/lowest:mean": logprobs.min()}


def clipped(logprobs: Any, old: Any, advantages: Any, eps: Any) -> Any:
    ratio = torch.exp(logprobs - old)
    held = torch.clamp(ratio, min=0.8, max=1.2) * advantages
    loss = -torch.where(advantages != 0, torch.minimum(ratio * advantages, held), 0.0).sum()
    kl = (torch.expm1(old - logprobs) - (old - logprobs)).mean()
    return loss + eps * kl, {
        "custom/kl:mean": kl,
        "custom/clipped:sum": ((ratio - 1).abs() > 0.2).float().sum(),
    }


def of_every_kind(logprobs: Any, old: Any) -> Any:
    n = logprobs.shape[0]
    place = torch.arange(n) / math.sqrt(n)
    margin = F.softplus(-logprobs) + F.logsigmoid(old) + F.huber_loss(logprobs, old, reduction="none")
    parts = torch.stack([logprobs[1:].mean(), torch.logsumexp(logprobs, dim=0), logprobs.max(dim=0).values])
    return (margin * place)[..., None].squeeze(-1).sum() + parts.sum() + (2**logprobs)[-1], {}


def pairs(logprobs: Any) -> Any:
    """A whole-datum loss: every position against every other."""
    return F.softplus(logprobs[:, None] - logprobs[None, :]).mean(), {}


def soft(logprobs: Any, weights: Any) -> Any:
    return (logprobs.exp() * weights).sum(-1).pow(2).sum(), {"custom/rows:mean": weights.sum()}


LOSSES: list[tuple[Fn, dict[str, int]]] = [
    (neg_ll, {"logprobs": 1, "weights": 1}),
    (clipped, {"logprobs": 1, "old": 1, "advantages": 1, "eps": 0}),
    (of_every_kind, {"logprobs": 1, "old": 1}),
    (pairs, {"logprobs": 1}),
    (soft, {"logprobs": 2, "weights": 2}),
]
IDS = [fn.__name__ for fn, _ in LOSSES]


def handle_of(fn: Fn, ranks: dict[str, int]) -> Any:
    return trace_loss(fn, ranks, "session")


def graph_of(fn: Fn, ranks: dict[str, int]) -> LossGraph:
    """As it comes over the wire."""
    handle = handle_of(fn, ranks)
    nodes = json.loads(encode_graph(handle).model_dump_json())["nodes"]
    return checked(
        [(one.name, one.rank) for one in handle.inputs],
        [Node(n["op"], n["name"], n["target"], n["args"], n["kwargs"]) for n in nodes],
    )


def custom(graph: LossGraph, data: list[Datum]) -> ForwardBackward:
    return ForwardBackward(tuple(data), "custom", {"loss_id": graph.id})


# ---- graphs by hand


def node(op: str, target: str, *args: Any, name: str = "x", **kwargs: Any) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


P = {"ref": "logprobs"}


def around(*middle: dict[str, Any], loss: str = "") -> LossGraph:
    """A graph of these nodes, which ends in the sum of log-probabilities, or in node ``loss``."""
    last = node("call_method", "sum", P, name="total")
    out = node("output", "output", {"tuple": [{"ref": loss or "total"}, {"dict": {}}]}, name="output")
    nodes = [node("placeholder", "logprobs", name="logprobs"), *middle, last, out]
    return checked([("logprobs", 1)], [Node(**one) for one in nodes])
