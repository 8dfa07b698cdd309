"""State is a fold of records: sessions, runs, samplers and checkpoints as the journal tells them.

:func:`apply` is the only way to change a :class:`State`. Recovery calls it for every record of the journal, the
running service for every record it appends, and the lab's ``model.ts`` does the same in the browser; both are tested
on the golden files in ``tests/golden``. The module knows neither how records are stored nor who may see what.

Record kinds and their ``data``:

========================  =====================================================================================
``session_opened``        ``session``, ``tags``, ``user_metadata``, ``sdk_version``, ``display_name``, ``project_id``
``session_finished``      ``session``, ``reason``, ``detail``
``op_accepted``           ``request_id``, ``run``, ``seq``, ``op``, ``tokens``, ``digest``, ``args`` (blob: the body)
``op_done``               ``request_id``, ``run``, ``seq``, ``op``, ``facts``, ``content_type`` (blob: the result)
``op_failed``             ``request_id``, ``run``, ``seq``, ``op``, ``category``, ``error``
``op_begun_again``        ``request_id``, ``run``, ``seq``, ``op``: by a later server than the one that accepted it
``sampler_opened``        ``sampler``, ``session``, ``base_model``, ``model_path``, ``directory``
``checkpoint_changed``    ``path`` and any of ``expires``, ``public``, ``deleted``
``files_removed``         ``directories`` of checkpoints that are gone from disk
``run_snapshot``          ``run``, ``directory``, ``covers`` (the highest record whose op the snapshot contains)
``run_closed``            ``run``, ``reason``
``run_resumed``           ``run``, ``session``: the session that trains it from now on
``session_changed``       ``session``, ``project_id``
``sampler_joined``        ``sampler``, ``client`` (the number of the client that joined; the first one is 0)
``sampled``               ``session``, ``base_model``, ``hour``, ``prompt_tokens``, ``tokens``: since the one before
``weights_copied``        ``run`` (a closed one), ``args``, ``step``, ``facts``, ``source`` (a path, or "upload")
``key_created``           ``id``, ``digest``, ``name``, ``admin``, ``expires``: a key of the record's tenant
``key_changed``           ``id``, ``digest``, ``expires``
``key_revoked``           ``id``, ``digest``
``model_offered``         ``name``, ``path``: a base model added while the server ran
``forgotten``             ``runs``, ``samplers``, ``sessions``: ids of what leaves the record; what it used stays
========================  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tuft_jupyter.core.objects import (
    CURVE_COLUMNS,
    Checkpoint,
    IssuedKey,
    Past,
    Run,
    Sampled,
    Sampler,
    Session,
    State,
)
from tuft_jupyter.core.types import OpKind, Record

__all__ = [
    "CREATES_RUN", "CURVE_COLUMNS", "ENDED", "SAVES",
    "Checkpoint", "IssuedKey", "Run", "Sampler", "Session", "State",
    "apply", "fold",
]  # fmt: skip

CREATES_RUN = {OpKind.CREATE_MODEL, OpKind.LOAD_WEIGHTS}
ENDED = {"closed", "failed"}
"""The ``status`` of a run of which nothing can be asked any more."""
HOUR = 3600.0
"""Seconds of the spans in which usage is told."""
SAVES = {OpKind.SAVE_WEIGHTS, OpKind.SAVE_WEIGHTS_FOR_SAMPLER}


def fold(records: Iterable[Record]) -> State:
    state = State()
    for record in records:
        apply(state, record)
    return state


def apply(state: State, record: Record) -> None:
    """Fold one record in. Records of kinds this version does not know change nothing but ``n``."""
    handler = _HANDLERS.get(record.kind)
    if handler is not None:
        handler(state, record, record.data)
    state.n = max(state.n, record.n)


def _session_opened(state: State, record: Record, data: Mapping[str, Any]) -> None:
    state.sessions[data["session"]] = Session(
        id=data["session"],
        tenant=record.tenant,
        created=record.time,
        sdk_version=data.get("sdk_version") or "",
        display_name=data.get("display_name"),
        project_id=data.get("project_id"),
        tags=list(data.get("tags") or ()),
        user_metadata=dict(data.get("user_metadata") or {}),
    )


def _session_finished(state: State, record: Record, data: Mapping[str, Any]) -> None:
    session = state.sessions.get(data["session"])
    if session is not None and session.finished is None:
        session.finished = data["reason"]


def _op_accepted(state: State, record: Record, data: Mapping[str, Any]) -> None:
    args = data["args"]
    if data["op"] in CREATES_RUN and data["run"] not in state.runs:
        state.runs[data["run"]] = Run(
            id=data["run"],
            session=args["session"],
            tenant=record.tenant,
            base_model=args["base_model"],
            created=record.time,
            lora=dict(args["lora"]),
            user_metadata=dict(args.get("user_metadata") or {}),
        )
    run = state.runs[data["run"]]
    run.pending += 1
    run.last_request = record.time
    if data["op"] == OpKind.LOAD_WEIGHTS:
        run.sources.append(args["directory"])
    state.accepted[data["request_id"]] = record.n


def _settled(state: State, request_id: str) -> int:
    """The op has an outcome; returns the record that accepted it."""
    state.begun_again.pop(request_id, None)
    return state.accepted.pop(request_id, 0)


def _op_done(state: State, record: Record, data: Mapping[str, Any]) -> None:
    run = state.runs[data["run"]]
    accepted = _settled(state, data["request_id"])
    run.pending -= 1
    run.last_error = None
    facts = data.get("facts") or {}
    run.engine_ms += facts.get("engine_ms", 0.0)
    kind = OpKind(data["op"])
    if kind in CREATES_RUN:
        run.status = "ready"
        run.step = facts.get("step", run.step)
        _forget_gradients(run)
        run.replay = [accepted]
    elif kind is OpKind.FORWARD_BACKWARD:
        run.loss_sum += facts.get("loss_sum", 0.0)
        run.weight_sum += facts.get("weight_sum", 0.0)
        run.kl_sum += facts.get("kl_sum", 0.0)
        run.kl_tokens += facts.get("kl_tokens", 0)
        run.step_tokens += facts.get("tokens", 0)
        run.passes += 1
        run.tokens += facts.get("tokens", 0)
        run.replay.append(accepted)
    elif kind is OpKind.OPTIM_STEP:
        _step(run, record.time, facts)
        run.replay.append(accepted)
    elif kind in SAVES:
        if "checkpoint" in facts:
            _saved(state, run, record, facts)
        if "sampler" in facts:  # an ephemeral save opens its sampler in one record: no crash parts them
            _sampler_opened(state, record, {**facts["sampler"], "run": run.id, "step": run.step})
    elif kind is OpKind.UNLOAD_MODEL:
        run.status = "closed"
        run.replay.clear()
        run.sources.clear()


def _forget_gradients(run: Run) -> None:
    run.loss_sum = run.weight_sum = run.kl_sum = 0.0
    run.kl_tokens = run.step_tokens = run.passes = 0


def _step(run: Run, time: float, facts: Mapping[str, Any]) -> None:
    run.step += 1
    loss = run.loss_sum / run.weight_sum if run.passes and run.weight_sum > 0 else None
    point = {
        "step": run.step,
        "time": time,
        "loss": loss,
        "tokens": run.step_tokens,
        "grad_norm": facts.get("grad_norm"),
        "learning_rate": facts.get("learning_rate"),
        "kl": run.kl_sum / run.kl_tokens if run.kl_tokens else None,
    }
    for name in CURVE_COLUMNS:
        run.curve[name].append(point[name])
    _forget_gradients(run)


def _saved(state: State, run: Run, record: Record, facts: Mapping[str, Any]) -> None:
    saved = facts["checkpoint"]
    overwritten = state.checkpoints.get(saved["path"])
    if overwritten is not None and overwritten.directory != saved["directory"]:
        state.garbage.add(overwritten.directory)
    state.checkpoints[saved["path"]] = Checkpoint(
        path=saved["path"],
        run=run.id,
        tenant=run.tenant,
        kind=saved["kind"],
        name=saved["name"],
        base_model=run.base_model,
        created=record.time,
        directory=saved["directory"],
        size_bytes=facts.get("size_bytes", 0),
        lora=dict(run.lora),
        user_metadata=dict(saved.get("user_metadata") or run.user_metadata),
        expires=saved.get("expires"),
        step=run.step,
        recipients=list(saved.get("recipients") or ()),
    )


def _op_begun_again(state: State, record: Record, data: Mapping[str, Any]) -> None:
    if (request_id := data["request_id"]) in state.accepted:
        state.begun_again[request_id] = state.begun_again.get(request_id, 0) + 1


def _op_failed(state: State, record: Record, data: Mapping[str, Any]) -> None:
    run = state.runs[data["run"]]
    _settled(state, data["request_id"])
    run.pending -= 1
    run.last_error = data["error"]
    if data["op"] in CREATES_RUN and run.status == "creating":
        run.status = "failed"
        run.error = data["error"]


def _sampler_opened(state: State, record: Record, data: Mapping[str, Any]) -> None:
    saved = state.checkpoints.get(data.get("model_path") or "")
    run, step = (saved.run, saved.step) if saved is not None else (data.get("run"), data.get("step"))
    state.samplers[data["sampler"]] = Sampler(
        id=data["sampler"],
        session=data["session"],
        tenant=record.tenant,
        base_model=data["base_model"],
        created=record.time,
        model_path=data.get("model_path"),
        directory=data.get("directory"),
        run=run,
        step=step,
    )


def _checkpoint_changed(state: State, record: Record, data: Mapping[str, Any]) -> None:
    checkpoint = state.checkpoints.get(data["path"])
    if checkpoint is None:
        return
    if data.get("deleted"):
        state.garbage.add(checkpoint.directory)
        del state.checkpoints[data["path"]]
        return
    if "expires" in data:
        checkpoint.expires = data["expires"]
    if "public" in data:
        checkpoint.public = data["public"]


def _files_removed(state: State, record: Record, data: Mapping[str, Any]) -> None:
    state.garbage.difference_update(data["directories"])


def _run_snapshot(state: State, record: Record, data: Mapping[str, Any]) -> None:
    run = state.runs[data["run"]]
    run.snapshot = data["directory"]
    run.covers = data["covers"]
    run.replay = [n for n in run.replay if n > data["covers"]]
    if not run.pending:
        run.sources.clear()


def _run_closed(state: State, record: Record, data: Mapping[str, Any]) -> None:
    run = state.runs.get(data["run"])
    if run is not None:
        run.status = "closed"


def _run_resumed(state: State, record: Record, data: Mapping[str, Any]) -> None:
    run = state.runs.get(data["run"])
    if run is not None:
        run.session = data["session"]


def _model_offered(state: State, record: Record, data: Mapping[str, Any]) -> None:
    state.models[data["name"]] = data["path"]


def _session_changed(state: State, record: Record, data: Mapping[str, Any]) -> None:
    session = state.sessions.get(data["session"])
    if session is not None:
        session.project_id = data["project_id"]


def _sampler_joined(state: State, record: Record, data: Mapping[str, Any]) -> None:
    sampler = state.samplers.get(data["sampler"])
    if sampler is not None:
        sampler.clients = max(sampler.clients, data["client"] + 1)


def _sampled(state: State, record: Record, data: Mapping[str, Any]) -> None:
    sums = _sums(state, record.tenant, data["session"], data["base_model"], data["hour"])
    sums.prompt_tokens += data["prompt_tokens"]
    sums.tokens += data["tokens"]


def _sums(state: State, tenant: str, session: str, base_model: str, hour: float) -> Sampled:
    key = f"{tenant} {session} {base_model} {hour:.0f}"
    return state.sampled.setdefault(key, Sampled(tenant, session, base_model, hour))


def _forgotten(state: State, record: Record, data: Mapping[str, Any]) -> None:
    for name in data["runs"]:
        run = state.runs.pop(name, None)
        if run is None:
            continue
        past = state.past.setdefault(run.tenant, Past())
        past.tokens += run.tokens
        past.engine_ms += run.engine_ms
        for time, tokens in zip(run.curve["time"], run.curve["tokens"], strict=True):
            hour = (time or 0.0) // HOUR * HOUR
            _sums(state, run.tenant, run.session, run.base_model, hour).trained += int(tokens or 0)
    for name in data["samplers"]:
        state.samplers.pop(name, None)
    gone = set(data["sessions"])
    for name in gone:
        state.sessions.pop(name, None)
    for key in [key for key, sums in state.sampled.items() if sums.session in gone]:
        sums = state.sampled.pop(key)
        kept = _sums(state, sums.tenant, "", sums.base_model, sums.hour)
        kept.prompt_tokens += sums.prompt_tokens
        kept.tokens += sums.tokens
        kept.trained += sums.trained


def _weights_copied(state: State, record: Record, data: Mapping[str, Any]) -> None:
    args = data["args"]
    run = Run(
        id=data["run"],
        session=args["session"],
        tenant=record.tenant,
        base_model=args["base_model"],
        created=record.time,
        lora=dict(args["lora"]),
        status="closed",
        last_request=record.time,
        step=data["step"],
    )
    state.runs[run.id] = run
    _saved(state, run, record, data["facts"])


def _key_created(state: State, record: Record, data: Mapping[str, Any]) -> None:
    state.keys[data["digest"]] = IssuedKey(
        record.tenant, record.time, data["name"], data["admin"], data["expires"]
    )


def _key_changed(state: State, record: Record, data: Mapping[str, Any]) -> None:
    state.keys[data["digest"]].expires = data["expires"]


def _key_revoked(state: State, record: Record, data: Mapping[str, Any]) -> None:
    state.revoked.add(data["digest"])


_HANDLERS = {
    "session_changed": _session_changed,
    "sampler_joined": _sampler_joined,
    "sampled": _sampled,
    "weights_copied": _weights_copied,
    "key_created": _key_created,
    "key_changed": _key_changed,
    "key_revoked": _key_revoked,
    "model_offered": _model_offered,
    "forgotten": _forgotten,
    "session_opened": _session_opened,
    "session_finished": _session_finished,
    "op_accepted": _op_accepted,
    "op_done": _op_done,
    "op_failed": _op_failed,
    "op_begun_again": _op_begun_again,
    "sampler_opened": _sampler_opened,
    "checkpoint_changed": _checkpoint_changed,
    "files_removed": _files_removed,
    "run_snapshot": _run_snapshot,
    "run_closed": _run_closed,
    "run_resumed": _run_resumed,
}
