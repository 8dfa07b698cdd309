"""The route table: every route of the Tinker API that this server answers.

From it come the Tornado handlers, the API reference, and the tests of access, documentation and error shape. Paths are
below ``<base url>/tuft/api/v1`` in a notebook server and below ``/api/v1`` in a daemon. ``{name}`` matches one path
segment (which may hold colons). Order matters: the first match wins.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from tuft_jupyter.wire import messages as m
from tuft_jupyter.wire import openai

MIB = 2**20


class Access(StrEnum):
    """Who is answered.

    OPEN needs nothing. KEY needs a valid key; what is fetched by id must in addition be the caller's own. SIGNED needs
    no header: the path itself holds a signed permission that expires.
    """

    OPEN = "open"
    KEY = "key"
    SIGNED = "signed"


class Dialect(StrEnum):
    """Whose API a route belongs to: how its refusals are written."""

    TINKER = "tinker"
    OPENAI = "openai"


def pattern_of(path: str) -> str:
    """``/a/{b}`` as an anchored regular expression with named groups."""
    return re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path) + "$"


@dataclass(frozen=True, slots=True)
class Route:
    """``endpoint`` is the method of :class:`~tuft_jupyter.wire.api.Api`; ``message`` what the body is read as."""

    method: str
    path: str
    endpoint: str
    doc: str
    message: type[m.Message] | None = None
    access: Access = Access.KEY
    max_body: int = 1 * MIB
    dialect: Dialect = Dialect.TINKER
    upload: bool = False
    """the body goes into a file, and the limit is that of uploads"""
    rest: bool = False
    """the last part of the path may hold slashes, as the names of models do"""

    @property
    def pattern(self) -> str:
        found = pattern_of(self.path)
        return found.removesuffix("[^/]+)$") + ".+)$" if self.rest else found


BULK = 64 * MIB
"""Bodies that carry training data or prompts; the server's configuration may set it lower."""

UPLOAD = 2**30
"""Adapters that are uploaded, unless the server's configuration says otherwise."""

ROUTES: tuple[Route, ...] = (
    Route("GET", "/healthz", "healthz", "Liveness: the server answers.", access=Access.OPEN),
    Route(
        "GET", "/readyz", "readyz", "Readiness: 200 once requests are answered, else 503.", access=Access.OPEN
    ),
    Route("GET", "/openapi.json", "openapi", "This table, for programs.", access=Access.OPEN),
    Route("POST", "/client/config", "client_config", "Flags that steer the SDK.", m.ClientConfig),
    Route(
        "POST",
        "/client/dynamic_config",
        "dynamic_config",
        "Flags the SDK fetches again and again.",
        m.Nothing,
    ),
    Route("GET", "/get_server_capabilities", "capabilities", "The base models offered."),
    Route("POST", "/create_session", "create_session", "Open a session.", m.CreateSession),
    Route("POST", "/session_heartbeat", "heartbeat", "Keep a session alive.", m.SessionOnly),
    Route("GET", "/sessions", "list_sessions", "Ids of the caller's sessions, newest first."),
    Route(
        "POST",
        "/sessions/search",
        "search_sessions",
        "The caller's sessions by what is known of them.",
        m.SearchSessions,
    ),
    Route("GET", "/sessions/{session}", "get_session", "A session with its runs and samplers."),
    Route("POST", "/sessions/{session}/finish", "finish_session", "End a session.", m.FinishSession),
    Route(
        "PUT", "/sessions/{session}/project", "assign_project", "Name the project of a session.", m.Project
    ),
    Route(
        "GET", "/sessions/{session}/trace_export", "trace_export", "Says that this server keeps no traces."
    ),
    Route("POST", "/telemetry", "telemetry", "Counted by kind, and not kept.", m.Telemetry, max_body=2 * MIB),
    Route("POST", "/create_model", "create_model", "Start a run with a fresh LoRA adapter.", m.CreateModel),
    Route("POST", "/get_info", "get_info", "What a run is: base model, rank, tokenizer.", m.ModelOnly),
    Route("POST", "/unload_model", "unload_model", "End a run and free its memory.", m.ModelOnly),
    Route(
        "POST", "/forward", "forward", "Log-probabilities without gradients (SDK before 0.25).", max_body=BULK
    ),
    Route(
        "POST",
        "/forward_backward",
        "forward_backward",
        "Loss and gradients of a batch, added to the run's accumulator.",
        max_body=BULK,
    ),
    Route(
        "POST",
        "/create_custom_loss",
        "create_custom_loss",
        "Have a loss of one's own computed here, where the operator allows it (`custom_loss_server_side`).",
        m.CreateCustomLoss,
    ),
    Route("POST", "/optim_step", "optim_step", "One AdamW step with the accumulated gradient.", m.OptimStep),
    Route("POST", "/save_weights", "save_weights", "Save a run with its optimizer.", m.SaveWeights),
    Route(
        "POST",
        "/save_weights_for_sampler",
        "save_weights_for_sampler",
        "Save a run's weights for sampling, by name or straight into a sampler.",
        m.SaveWeightsForSampler,
    ),
    Route(
        "POST",
        "/save_weights_external",
        "save_weights_external",
        "Export a run's adapter for download, encrypted with age where recipients are given.",
        m.SaveWeightsExternal,
    ),
    Route(
        "POST",
        "/load_weights",
        "load_weights",
        "Load a checkpoint into a run, or as a new run.",
        m.LoadWeights,
    ),
    Route(
        "POST",
        "/create_sampling_session",
        "create_sampling_session",
        "Pin a base model or a checkpoint for sampling.",
        m.CreateSamplingSession,
    ),
    Route(
        "POST",
        "/join_sampling_session",
        "join_sampling_session",
        "Number one more client of a sampler.",
        m.SamplingSessionOnly,
    ),
    Route("GET", "/samplers/{sampler}", "get_sampler", "What a sampler samples from."),
    Route("POST", "/asample", "asample", "Draw tokens.", m.SampleEnvelope, max_body=8 * MIB),
    Route("POST", "/retrieve_future", "retrieve_future", "Wait for a promise.", m.RetrieveFuture),
    Route(
        "POST",
        "/retrieve_futures",
        "retrieve_futures",
        "Which requests of a sampler ended: one poll for many samples.",
        m.RetrieveFutures,
    ),
    Route("POST", "/cancel_future", "cancel_future", "Stop drawing for a sample request.", m.RequestOnly),
    Route("GET", "/training_runs", "list_runs", "The caller's runs, newest first (?project_id=)."),
    Route("GET", "/training_runs/{run}", "get_run", "One run."),
    Route("GET", "/training_runs/{run}/checkpoints", "list_run_checkpoints", "A run's checkpoints."),
    Route("GET", "/checkpoints", "list_checkpoints", "The caller's checkpoints, newest first."),
    Route(
        "PUT",
        "/training_runs/{run}/checkpoints/{kind}/{name}/ttl",
        "set_ttl",
        "Let a checkpoint expire, or keep it.",
        m.SetTtl,
    ),
    Route(
        "POST",
        "/training_runs/{run}/checkpoints/{kind}/{name}/publish",
        "publish",
        "Let every tenant load it.",
    ),
    Route(
        "DELETE",
        "/training_runs/{run}/checkpoints/{kind}/{name}/publish",
        "unpublish",
        "Make it private again.",
    ),
    Route(
        "DELETE",
        "/training_runs/{run}/checkpoints/{kind}/{name}",
        "delete_checkpoint",
        "Delete a checkpoint.",
    ),
    Route(
        "GET",
        "/training_runs/{run}/checkpoints/{kind}/{name}/archive",
        "archive",
        "An address, good for an hour, of the adapter as a tar archive: a plain PEFT directory.",
    ),
    Route(
        "POST",
        "/copy_weights",
        "copy_weights",
        "Copy an own or published checkpoint; a run that cannot be trained on holds the copy.",
        m.CopyWeights,
    ),
    Route("POST", "/weights_info", "weights_info", "What a checkpoint was trained on.", m.TinkerPath),
    Route(
        "GET",
        "/training_runs/{run}/checkpoints/{kind}/{name}/external_weights_urls",
        "external_weights_urls",
        "An address, good for an hour, of each file of an export.",
    ),
    Route(
        "GET",
        "/tuft/files/{ticket}",
        "download",
        "What such an address leads to: the bytes themselves.",
        access=Access.SIGNED,
    ),
    Route(
        "POST",
        "/auth/token",
        "auth_token",
        "A token that stands for the caller's key for an hour.",
        m.Nothing,
    ),
    Route("GET", "/auth/apikey/me", "key_info", "What the caller's key is called."),
    Route("DELETE", "/auth/apikey/me", "revoke_key", "Give the caller's key up, for good."),
    Route("GET", "/audit", "audit", "What the caller created on one UTC day (?day=, ?event_type=)."),
    Route(
        "GET",
        "/billing/usage/events",
        "usage_events",
        "Tokens trained and sampled, and checkpoints saved, per hour (?starting_on=, ?ending_before=).",
    ),
    Route(
        "GET",
        "/billing/usage/checkpoints/current",
        "usage_checkpoints",
        "Number and size of the checkpoints kept (?project_id=).",
    ),
    Route("GET", "/tuft/status", "status", "Readiness: what is loaded, and what the server waits for."),
    Route(
        "GET",
        "/tuft/applications",
        "applications",
        "The applications of the configuration file, and their states; one alone at its route_prefix.",
    ),
    Route("POST", "/tuft/models", "add_model", "Offer one more base model and load it.", m.AddModel),
    Route(
        "GET",
        "/tuft/state",
        "show_state",
        "What the lab shows: sessions, runs, samplers, checkpoints (?tenant=NAME, or * for all: admins only).",
    ),
    Route(
        "GET",
        "/tuft/feed",
        "feed",
        "What happens from now on, as server-sent events (?tenant= as above, ?since=RECORD, ?wait= seconds at most).",
    ),
    Route("GET", "/tuft/keys", "list_keys", "The caller's keys without the keys; for an admin, everybody's."),
    Route("POST", "/tuft/keys", "create_key", "Make a key for a tenant (admins only).", m.CreateKey),
    Route("PUT", "/tuft/keys/{key}", "expire_key", "Give a key an end, or none (admins only).", m.SetTtl),
    Route("DELETE", "/tuft/keys/{key}", "drop_key", "Revoke a key, at once and for good."),
    Route(
        "GET",
        "/tuft/outlook",
        "outlook",
        "How the caller's work stands (?tenant= as above); with ?seen=VERSION, once it has changed (?wait= seconds).",
    ),
    Route("GET", "/tuft/runs/{run}/curve", "curve", "A run's points from number ?start= on."),
    Route(
        "GET",
        "/tuft/runs/{run}/samples",
        "samples",
        "What a run's weights answered to the caller at ?step= or the step before it that has samples.",
    ),
    Route(
        "POST",
        "/tuft/runs/{run}/resume",
        "resume",
        "Let another session go on with a live run; says the number of its next request.",
        m.SessionOnly,
    ),
    Route("GET", "/tuft/ray", "ray", "Nodes and GPUs of Ray, and what is placed where (admins only)."),
    Route("GET", "/tuft/gauges", "gauges", "What the machine does: processors, memory, workers."),
    Route(
        "POST",
        "/tuft/adapters",
        "upload_adapter",
        "Keep an adapter made elsewhere: a tar archive of a PEFT directory (?base_model=, ?name=, ?ttl_seconds=).",
        max_body=UPLOAD,
        upload=True,
    ),
    Route("GET", "/tuft/metrics", "metrics", "Numbers for Prometheus (admins only)."),
    Route("GET", "/tuft/tokenizer", "tokenizer", "A base model's tokenizer files (?model=NAME), as text."),
)

OPENAI_ROUTES: tuple[Route, ...] = (
    Route(
        "GET",
        "/models",
        "oai_models",
        "The base models and the caller's checkpoints.",
        dialect=Dialect.OPENAI,
    ),
    Route("GET", "/models/{model}", "oai_model", "One model.", dialect=Dialect.OPENAI, rest=True),
    Route(
        "POST",
        "/completions",
        "oai_completions",
        "Continue a prompt.",
        openai.Completion,
        max_body=8 * MIB,
        dialect=Dialect.OPENAI,
    ),
    Route(
        "POST",
        "/chat/completions",
        "oai_chat",
        "Answer a conversation.",
        openai.ChatCompletion,
        max_body=8 * MIB,
        dialect=Dialect.OPENAI,
    ),
)
"""OpenAI-compatible inference, below ``<base url>/tuft/oai/api/v1`` (``/oai/api/v1`` in a daemon)."""
