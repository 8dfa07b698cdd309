"""Whom each route answers, and a request that it answers: the table that the access matrix is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from tests.support.archives import adapter
from tests.support.fuzz_cases import LOSS
from tuft_jupyter.wire import tuft_wire_pb2 as pb

Ids = Mapping[str, str]


class Whose(StrEnum):
    """OWN: what the request names must be the caller's. TENANT: the answer is about the caller alone.
    ADMIN: for the owner of the server and its admins. ANYBODY: no key is needed.
    """

    OWN = "own"
    TENANT = "tenant"
    ADMIN = "admin"
    ANYBODY = "anybody"


@dataclass(frozen=True)
class Rule:
    """``body`` makes the request of the ids it names; ``kind`` is the kind of checkpoint in the path."""

    whose: Whose
    body: Callable[[Ids], Any] = lambda ids: None
    kind: str = "weights"
    query: str = ""


def own(**fields: Any) -> Rule:
    """A body of these fields; a value in capitals stands for an id."""
    return Rule(Whose.OWN, lambda ids: {name: ids.get(value, value) for name, value in fields.items()})


def passes(forward_only: bool) -> Rule:
    def body(ids: Ids) -> bytes:
        datum = pb.Datum(model_input=[pb.Chunk(encoded_text=pb.EncodedTextChunk(tokens=b"\1\0\0\0"))])
        message = pb.ForwardBackwardRequest(
            model_id=ids["RUN"], seq_id=9, loss_fn="cross_entropy", data=[datum]
        )
        message.forward_only = forward_only
        return message.SerializeToString()

    return Rule(Whose.OWN, body)


OF_RUN = Rule(Whose.OWN)
TENANT, ADMIN, ANYBODY = Rule(Whose.TENANT), Rule(Whose.ADMIN), Rule(Whose.ANYBODY)
SAMPLE = {
    "prompt": {"chunks": [{"tokens": [1], "type": "encoded_text"}]},
    "sampling_params": {"max_tokens": 1},
}
NOW = datetime.now(UTC)
TODAY = f"?starting_on={NOW - timedelta(1):%Y-%m-%dT%H:00:00Z}&ending_before={NOW + timedelta(1):%Y-%m-%dT%H:00:00Z}"
CHECKPOINT = "/training_runs/{run}/checkpoints/{kind}/{name}"
RULES: dict[tuple[str, str], Rule] = {
    ("GET", "/healthz"): ANYBODY,
    ("GET", "/readyz"): ANYBODY,
    ("GET", "/openapi.json"): ANYBODY,
    ("GET", "/tuft/files/{ticket}"): ANYBODY,
    ("POST", "/client/config"): TENANT,
    ("POST", "/client/dynamic_config"): TENANT,
    ("GET", "/get_server_capabilities"): TENANT,
    ("POST", "/create_session"): TENANT,
    ("POST", "/session_heartbeat"): own(session_id="SESSION"),
    ("GET", "/sessions"): TENANT,
    ("POST", "/sessions/search"): TENANT,
    ("GET", "/sessions/{session}"): OF_RUN,
    ("POST", "/sessions/{session}/finish"): Rule(Whose.OWN, lambda ids: {"reason": {"type": "success"}}),
    ("PUT", "/sessions/{session}/project"): own(project_id="p"),
    ("GET", "/sessions/{session}/trace_export"): OF_RUN,
    ("POST", "/telemetry"): TENANT,
    ("POST", "/create_model"): Rule(
        Whose.OWN,
        lambda ids: {
            "session_id": ids["SESSION"], "model_seq_id": 7, "base_model": "tuft/demo", "lora_config": {"rank": 8},
        },
    ),
    ("POST", "/get_info"): own(model_id="RUN"),
    ("POST", "/unload_model"): own(model_id="RUN"),
    ("POST", "/forward"): passes(True),
    ("POST", "/forward_backward"): passes(False),
    ("POST", "/create_custom_loss"): Rule(Whose.OWN, lambda ids: {"session_id": ids["SESSION"], **LOSS}),
    ("POST", "/optim_step"): own(model_id="RUN", seq_id=11),
    ("POST", "/save_weights"): own(model_id="RUN", path="other", seq_id=12),
    ("POST", "/save_weights_for_sampler"): own(model_id="RUN", path="other", seq_id=13),
    ("POST", "/save_weights_external"): own(model_id="RUN", path="other", seq_id=14),
    ("POST", "/load_weights"): own(model_id="RUN", path="PATH", seq_id=15),
    ("POST", "/create_sampling_session"): Rule(
        Whose.OWN,
        lambda ids: {"session_id": ids["SESSION"], "sampling_session_seq_id": 7, "base_model": "tuft/demo"},
    ),
    ("POST", "/join_sampling_session"): own(sampling_session_id="SAMPLER"),
    ("GET", "/samplers/{sampler}"): OF_RUN,
    ("POST", "/asample"): Rule(Whose.OWN, lambda ids: {**SAMPLE, "sampling_session_id": ids["SAMPLER"]}),
    ("POST", "/retrieve_future"): own(request_id="REQUEST"),
    ("POST", "/retrieve_futures"): Rule(
        Whose.OWN,
        lambda ids: {"target": {"type": "sampling_session", "sampling_session_id": ids["SAMPLER"]}, "timeout": 0},
    ),
    ("POST", "/cancel_future"): own(request_id="SAMPLE"),
    ("GET", "/training_runs"): TENANT,
    ("GET", "/training_runs/{run}"): OF_RUN,
    ("GET", "/training_runs/{run}/checkpoints"): OF_RUN,
    ("GET", "/checkpoints"): TENANT,
    ("PUT", f"{CHECKPOINT}/ttl"): Rule(Whose.OWN, lambda ids: {"ttl_seconds": 7200}),
    ("POST", f"{CHECKPOINT}/publish"): OF_RUN,
    ("DELETE", f"{CHECKPOINT}/publish"): OF_RUN,
    ("DELETE", CHECKPOINT): OF_RUN,
    ("GET", f"{CHECKPOINT}/archive"): OF_RUN,
    ("POST", "/copy_weights"): own(source_path="PATH", destination_project_id="p"),
    ("POST", "/weights_info"): own(tinker_path="PATH"),
    ("GET", f"{CHECKPOINT}/external_weights_urls"): Rule(Whose.OWN, kind="external_weights"),
    ("POST", "/auth/token"): TENANT,
    ("GET", "/auth/apikey/me"): TENANT,
    ("DELETE", "/auth/apikey/me"): TENANT,
    ("GET", "/audit"): TENANT,
    ("GET", "/billing/usage/events"): Rule(Whose.TENANT, query=TODAY),
    ("GET", "/billing/usage/checkpoints/current"): TENANT,
    ("GET", "/tuft/status"): TENANT,
    ("POST", "/tuft/models"): Rule(Whose.ADMIN, lambda ids: {"model": "tuft/demo"}),
    ("GET", "/tuft/keys"): TENANT,
    ("GET", "/tuft/state"): TENANT,
    ("GET", "/tuft/metrics"): Rule(Whose.ADMIN, lambda ids: None),
    ("GET", "/tuft/ray"): ADMIN,
    ("POST", "/tuft/keys"): Rule(Whose.ADMIN, lambda ids: {"tenant": "dave"}),
    ("PUT", "/tuft/keys/{key}"): Rule(Whose.ADMIN, lambda ids: {"ttl_seconds": 7200}),
    ("DELETE", "/tuft/keys/{key}"): OF_RUN,
    ("GET", "/tuft/outlook"): TENANT,
    ("GET", "/tuft/runs/{run}/curve"): OF_RUN,
    ("GET", "/tuft/runs/{run}/samples"): OF_RUN,
    ("POST", "/tuft/runs/{run}/resume"): own(session_id="SESSION"),
    ("GET", "/tuft/feed"): Rule(Whose.TENANT, query="?wait=0"),
    ("GET", "/tuft/gauges"): TENANT,
    ("GET", "/tuft/applications"): TENANT,
    ("POST", "/tuft/adapters"): Rule(Whose.TENANT, lambda ids: adapter(), query="?base_model=tuft/demo"),
    ("GET", "/tuft/tokenizer"): Rule(Whose.TENANT, query="?model=tuft/demo"),
    ("GET", "/models"): TENANT,
    ("GET", "/models/{model}"): OF_RUN,
    ("POST", "/completions"): own(model="PATH", prompt="x"),
    ("POST", "/chat/completions"): Rule(
        Whose.OWN, lambda ids: {"model": ids["PATH"], "messages": [{"role": "user", "content": "x"}]}
    ),
}  # fmt: skip
