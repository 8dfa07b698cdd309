"""What a state holds: sessions, runs, samplers, checkpoints and keys, as plain values that JSON can carry.

:mod:`~tuft_jupyter.core.state` makes and changes them from records, and nobody else does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tuft_jupyter.core.curve import CURVE_COLUMNS as CURVE_COLUMNS
from tuft_jupyter.core.curve import Column, new_curve


@dataclass(slots=True)
class Session:
    id: str
    tenant: str
    created: float
    sdk_version: str = ""
    display_name: str | None = None
    project_id: str | None = None
    tags: list[str] = field(default_factory=list)
    user_metadata: dict[str, str] = field(default_factory=dict)
    finished: str | None = None


@dataclass(slots=True)
class Run:
    """An adapter in training. ``curve`` holds one entry per optimizer step in each column.

    ``loss`` of a step is the loss per weighted token (nats) over the passes since the step before, ``kl`` how
    far the learner is from the policy that sampled (nats per token with an advantage; None for losses without one).
    ``pending`` counts accepted ops without an outcome. ``snapshot`` is the directory that replay can start
    from and ``covers`` the record it contains; ops done after it are in ``replay`` (record numbers of their
    acceptance). ``error`` says why a run failed, ``last_error`` why its last op did (None if that one succeeded).
    """

    id: str
    session: str
    tenant: str
    base_model: str
    created: float
    lora: dict[str, Any] = field(default_factory=dict)
    user_metadata: dict[str, str] = field(default_factory=dict)
    status: str = "creating"
    error: str | None = None
    last_error: str | None = None
    last_request: float = 0.0
    step: int = 0
    tokens: int = 0
    engine_ms: float = 0.0
    pending: int = 0
    curve: dict[str, Column] = field(default_factory=new_curve)
    snapshot: str | None = None
    covers: int = 0
    replay: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    """directories of checkpoints that its ops load, until a snapshot makes it independent of them"""
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    kl_sum: float = 0.0
    kl_tokens: int = 0
    step_tokens: int = 0
    passes: int = 0


@dataclass(slots=True)
class Sampler:
    """``run`` and ``step``: whose weights these are, and after which optimizer step; None for a base model."""

    id: str
    session: str
    tenant: str
    base_model: str
    created: float
    model_path: str | None = None
    directory: str | None = None
    clients: int = 1
    run: str | None = None
    step: int | None = None


@dataclass(slots=True)
class Checkpoint:
    path: str
    run: str
    tenant: str
    kind: str
    name: str
    base_model: str
    created: float
    directory: str
    size_bytes: int = 0
    lora: dict[str, Any] = field(default_factory=dict)
    user_metadata: dict[str, str] = field(default_factory=dict)
    expires: float | None = None
    public: bool = False
    step: int = 0
    recipients: list[str] = field(default_factory=list)
    """whom an export is encrypted for; empty: it leaves as it is"""


@dataclass(slots=True)
class IssuedKey:
    """What is kept of a key, by its digest; ``expires`` in seconds since the epoch, None: never."""

    tenant: str
    created: float
    name: str = ""
    admin: bool = False
    expires: float | None = None


@dataclass(slots=True)
class Sampled:
    """Tokens sampled in the hour that began at ``hour``; ``session`` is "" for requests without one.

    ``trained`` are tokens of runs that are not on record any more.
    """

    tenant: str
    session: str
    base_model: str
    hour: float
    prompt_tokens: int = 0
    tokens: int = 0
    trained: int = 0


@dataclass(slots=True)
class Past:
    """What runs of a tenant used that are not on record any more."""

    tokens: int = 0
    engine_ms: float = 0.0


@dataclass(slots=True)
class State:
    """Everything the journal tells, keyed by id. ``n`` is the last record applied."""

    n: int = 0
    sessions: dict[str, Session] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    samplers: dict[str, Sampler] = field(default_factory=dict)
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    """request id -> record that accepted it, while the op has no outcome"""
    begun_again: dict[str, int] = field(default_factory=dict)
    """request id -> servers that began it after the one that accepted it had ended, while it has no outcome"""
    sampled: dict[str, Sampled] = field(default_factory=dict)
    """by tenant, session, base model and hour"""
    past: dict[str, Past] = field(default_factory=dict)
    """by tenant"""
    keys: dict[str, IssuedKey] = field(default_factory=dict)
    revoked: set[str] = field(default_factory=set)
    """digests of keys that are not accepted any more"""
    garbage: set[str] = field(default_factory=set)
    """directories of checkpoints that were deleted or overwritten, until they are gone from disk"""
