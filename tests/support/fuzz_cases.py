"""Hostile JSON requests: valid ones of every route, and what a careless or malicious client makes of them.

Everything follows from one random generator, so a case is known by its seed and number.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from tuft_jupyter.core.types import JSON, PROTOBUF
from tuft_jupyter.wire.openapi import TABLES
from tuft_jupyter.wire.routes import Route

DEEP = (300, 20_000)
"""Levels of nesting, beyond what any parser of ours may recurse into."""


NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, -(2**31) - 1, 2**63, 2**64, 10**400, -1e308, 1e-320, 0.5,
    float("nan"), float("inf"), float("-inf"), "", " ", "\x00", "a" * 4096, "\ud800", "💥", "NaN", "1", "null",
    "../../etc/passwd", "..%2f..%2fetc", "%00", "tinker://", "tinker://../../x/weights/y",
    "tinker://a:train:0/weights/../..", "http://169.254.169.254/latest", "file:///etc/passwd", "/etc/passwd",
    "CON", "a/b", "a\\b", "a:train:0", "a:sample:0", [], {}, [[]], [None], [1] * 2000, [""] * 200, {"": ""},
    {"a": {"b": {"c": 1}}}, [2**70], [-1], [1.5], ["x"], {"type": "x"},
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One request; ``verb`` is what the table calls it."""

    method: str
    path: str
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    verb: str = ""


@dataclass(slots=True)
class World:
    """Ids that exist, for bodies that are nearly right."""

    ids: dict[str, str]
    seq: int = 100

    def body(self, verb: str) -> Any:
        """A valid body for a verb that reads JSON."""
        make = BODIES.get(verb)
        self.seq += 1
        return {} if make is None else make(self)


def _prompt(*tokens: int) -> dict[str, Any]:
    return {"chunks": [{"type": "encoded_text", "tokens": list(tokens)}]}


def _passed(world: World) -> dict[str, Any]:
    tensor = {"data": [5, 6, 7], "dtype": "int64", "shape": [3]}
    datum = {"model_input": _prompt(4, 5, 6), "loss_fn_inputs": {"target_tokens": tensor}}
    request = {"data": [datum, copy.deepcopy(datum)], "loss_fn": "cross_entropy", "loss_fn_config": None}
    return {
        "model_id": world.ids["run"],
        "seq_id": world.seq,
        "forward_backward_input": request,
        "forward_input": request,
    }


def _sample(world: World) -> dict[str, Any]:
    return {
        "sampling_session_id": world.ids["sampler"],
        "seq_id": world.seq,
        "num_samples": 2,
        "prompt": _prompt(4, 5, 6, 7),
        "sampling_params": {
            "max_tokens": 3, "seed": 1, "stop": ["\n"], "temperature": 0.7, "top_k": 5, "top_p": 0.9,
        },
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 2,
        "topk_sample_logprobs": 1,
        "prompt_alt_tokens_k": 1,
        "prompt_logprobs_last_n": 2,
        "target_prompt_logprobs": {"data": [1, -1, 3], "dtype": "int64", "shape": [3, 1]},
        "record_stability_info": False,
        "type": "sample",
    }  # fmt: skip


LORA = {"rank": 4, "seed": 1, "train_unembed": True, "train_mlp": True, "train_attn": True}
ADAM = {
    "learning_rate": 1e-4,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-12,
    "weight_decay": 0.0,
    "grad_clip_norm": 0.0,
}
LOSS: Any = {
    "inputs": [{"name": "logprobs", "rank": 1}],
    "graph": {
        "nodes": [
            {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
            {
                "op": "call_function", "name": "clamp", "target": "torch.clamp",
                "args": [{"ref": "logprobs"}], "kwargs": {"min": {"float": "-inf"}, "max": 0.5},
            },
            {"op": "call_method", "name": "sum_1", "target": "sum", "args": [{"ref": "clamp"}]},
            {
                "op": "output", "name": "output", "target": "output",
                "args": [{"tuple": [{"ref": "sum_1"}, {"dict": {"custom/x:sum": {"ref": "sum_1"}}}]}],
            },
        ]
    },
}  # fmt: skip
"""A loss of one's own, as the newest SDK traces it."""

BODIES: dict[str, Callable[[World], Any]] = {
    "client_config": lambda w: {"sdk_version": "0.38.0"},
    "create_session": lambda w: {"tags": ["a"], "user_metadata": {"a": "b"}, "project_id": "p"},
    "heartbeat": lambda w: {"session_id": w.ids["session"]},
    "search_sessions": lambda w: {
        "display_name": "x", "limit": 5, "owner": {"type": "own"}, "statuses": [{"type": "active"}],
        "cursor": {"last_created_at": "2026-01-01T00:00:00Z", "last_session_id": "s"},
    },
    "finish_session": lambda w: {"reason": {"type": "success"}, "detail": "done"},
    "assign_project": lambda w: {"project_id": "p"},
    "telemetry": lambda w: {"events": [{"event": "SESSION_START", "severity": "INFO"}], "platform": "x"},
    "create_model": lambda w: {
        "session_id": w.ids["session"], "model_seq_id": w.seq, "base_model": "tuft/demo", "lora_config": LORA,
        "optimizer_config": {"type": "adamw"}, "user_metadata": {"a": "b"},
    },
    "get_info": lambda w: {"model_id": w.ids["run"]},
    "unload_model": lambda w: {"model_id": w.ids["spare"]},
    "forward": _passed,
    "forward_backward": _passed,
    "create_custom_loss": lambda w: {"session_id": w.ids["session"], **copy.deepcopy(LOSS)},
    "optim_step": lambda w: {"model_id": w.ids["run"], "seq_id": w.seq, "adam_params": ADAM},
    "save_weights": lambda w: {"model_id": w.ids["run"], "seq_id": w.seq, "path": f"n{w.seq}", "ttl_seconds": 60},
    "save_weights_for_sampler": lambda w: {
        "model_id": w.ids["run"], "seq_id": w.seq, "path": f"s{w.seq}", "kind": "snapshot", "user_metadata": {},
    },
    "save_weights_external": lambda w: {
        "model_id": w.ids["run"], "seq_id": w.seq, "path": f"e{w.seq}", "age_encryption_recipients": [],
    },
    "load_weights": lambda w: {
        "model_id": w.ids["run"], "seq_id": w.seq, "path": w.ids["checkpoint"], "optimizer": True,
    },
    "create_sampling_session": lambda w: {
        "session_id": w.ids["session"], "sampling_session_seq_id": w.seq, "model_path": w.ids["checkpoint"],
    },
    "join_sampling_session": lambda w: {"sampling_session_id": w.ids["sampler"]},
    "asample": _sample,
    "retrieve_future": lambda w: {"request_id": w.ids["request"], "allow_metadata_only": True},
    "retrieve_futures": lambda w: {
        "target": {"type": "sampling_session", "sampling_session_id": w.ids["sampler"], "cloned_sampler_id": 0},
        "prev_cursor": 0, "timeout": 0, "retrieved_request_ids": [],
    },
    "cancel_future": lambda w: {"request_id": w.ids["request"]},
    "set_ttl": lambda w: {"ttl_seconds": 4000},
    "copy_weights": lambda w: {"source_path": w.ids["checkpoint"], "ttl_seconds": 60},
    "weights_info": lambda w: {"tinker_path": w.ids["checkpoint"]},
    "add_model": lambda w: {"model": "tuft/demo"},
    "create_key": lambda w: {"tenant": "carol", "name": "n", "ttl_seconds": 60, "admin": False},
    "resume": lambda w: {"session_id": w.ids["session"]},
    "oai_completions": lambda w: {
        "model": w.ids["checkpoint"], "prompt": "once", "max_tokens": 2, "n": 1, "stop": ["x"], "logprobs": 1,
        "echo": True, "seed": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "stream": False,
    },
    "oai_chat": lambda w: {
        "model": w.ids["run"], "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}, "logprobs": True,
        "top_logprobs": 1, "tools": [],
    },
}  # fmt: skip
"""What a well-meaning client sends, by verb."""

ROUTES: tuple[tuple[str, Route], ...] = tuple((root, route) for root, table in TABLES for route in table)


RARELY = ("revoke_key", "drop_key", "finish_session", "unload_model", "delete_checkpoint", "unpublish")
"""Verbs that end what other cases live on."""

# ---- JSON


WRONGS = (
    "leaf",
    "leaf",
    "leaf",
    "drop",
    "bytes",
    "whole",
    "text",
    "deep",
    "path",
    "query",
    "headers",
    "none",
)


def json_case(rng: random.Random, world: World) -> Case:
    """One request to a random route, with something wrong in body, path, query or headers (or nothing)."""
    root, route = rng.choice(ROUTES)
    if route.endpoint in RARELY or route.method not in ("POST", "PUT"):
        root, route = rng.choice(ROUTES)
    kind = rng.choice(WRONGS)
    parts = dict(world.ids)
    if kind == "path":
        parts[rng.choice(list(parts))] = str(rng.choice(NASTY))
    query = ""
    if kind == "query":
        query = "?" + "&".join(f"{rng.choice(PARAMETERS)}={_quoted(rng.choice(NASTY))}" for _ in range(2))
    if route.endpoint == "feed":  # it goes on for ever by itself
        query += f"{'&' if query else '?'}wait=0"
    headers = {"Content-Type": JSON, **(rng.choice(HEADERS) if kind == "headers" else {})}
    value = world.body(route.endpoint)
    body = _json_body(rng, value, kind) if route.method in ("POST", "PUT") else None
    path = route.path
    for name, part in parts.items():
        path = path.replace("{" + name + "}", _quoted(part))
    return Case(route.method, root + path + query, body, headers, route.endpoint)


PARAMETERS = (
    "limit", "offset", "day", "starting_on", "ending_before", "start", "seen", "model", "project_id", "base_model",
    "name", "ttl_seconds", "access_scope", "event_type",
)  # fmt: skip
HEADERS: tuple[dict[str, str], ...] = (
    {"Content-Type": "x" * 2000}, {"Content-Type": PROTOBUF}, {"Content-Encoding": "zstd"},
    {"Content-Encoding": "gzip"}, {"Accept": "application/x-protobuf"}, {"Accept": ";;,,/"},
    {"Content-Type": "multipart/form-data"}, {"Content-Type": "application/x-www-form-urlencoded"},
)  # fmt: skip


def _json_body(rng: random.Random, value: Any, kind: str) -> bytes:
    if kind == "deep":
        return rng.choice((b"[", b'{"a":')) * rng.choice(DEEP) + (b"]" if rng.random() < 0.5 else b"")
    if kind == "leaf":
        for _ in range(rng.choice((1, 1, 2, 5))):
            value = _replaced(rng, value, rng.choice(NASTY))
    elif kind == "drop":
        value = _dropped(rng, value)
    elif kind == "whole":
        value = rng.choice(NASTY)
    body = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if kind == "bytes":
        return mutated(rng, body)
    return _mangled(rng, body) if kind == "text" else body


def _quoted(part: Any) -> str:
    return quote(str(part).encode("utf-8", "surrogatepass"), safe=":") or "-"


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, one in inner for place in _places(one, (*at, key)))]


def _replaced(rng: random.Random, value: Any, nasty: Any) -> Any:
    return _at(value, rng.choice(_places(value)), lambda holder, key: holder.__setitem__(key, nasty), nasty)


def _dropped(rng: random.Random, value: Any) -> Any:
    return _at(value, rng.choice(_places(value)), lambda holder, key: holder.__delitem__(key), {})


def _at(value: Any, place: tuple[Any, ...], change: Callable[[Any, Any], None], top: Any) -> Any:
    if not place:
        return top
    value = copy.deepcopy(value)
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    change(holder, place[-1])
    return value


def _mangled(rng: random.Random, body: bytes) -> bytes:
    """JSON with something that is no JSON, or that two parsers would read in two ways."""
    return rng.choice((
        body[:-1] + b', "seq_id": 1, "seq_id": 2}', body + body, b"\xef\xbb\xbf" + body, body.replace(b'"', b"'"),
        body[:-1], b"", b" " * 1000, body.decode("utf-8", "replace").encode("utf-16"), body.replace(b"1", b"NaN"),
        body.replace(b":", b": -"), b"\x00" + body, body.replace(b"0", b"1e999"), b'"' + body[:500] + b'"',
    ))  # fmt: skip


def mutated(rng: random.Random, body: bytes) -> bytes:
    """Some bytes flipped, cut out, doubled, or replaced by what parsers trip over."""
    data = bytearray(body)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randrange(1, 9)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randrange(1, 64)]
        elif kind == 3:
            data[at:at] = rng.choice(
                (b"\xff" * 10, b"\x80" * 12, b"\x00" * 8, struct.pack("<q", -1), b"\x0a\xff\xff\xff\xff\x0f")
            )
        else:
            del data[at:]
    return bytes(data)
