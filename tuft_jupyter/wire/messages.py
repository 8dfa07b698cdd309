"""The JSON requests of the Tinker protocol, as we read them.

Each struct names the fields we use; everything else is ignored, because a newer SDK may send more than this version
knows. What would change numbers if it were ignored is named here and refused by the endpoints. Decoding errors name the
field. Nothing here imports the SDK.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Any, TypeVar

import msgspec

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import AdamParams

T = TypeVar("T", bound="Message")

Text = Annotated[str, msgspec.Meta(max_length=1000)]
"""What a client calls something: kept, and shown to whoever sees it."""
Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""What a client counts up from 0 or 1; numbers below are the server's own."""
METADATA = 16_384
"""Characters of one ``user_metadata``, which is kept too."""


class Message(msgspec.Struct, kw_only=True):
    """A request body. Sizes and ranges that need no look at the state are checked while decoding.

    What a body may hold by the hundred thousand is hidden from the garbage collector (``gc=False``), whose rounds would
    keep the event loop five times as long.
    """


class ClientConfig(Message):
    sdk_version: str = ""


class CreateSession(Message):
    tags: Annotated[list[Text], msgspec.Meta(max_length=100)] = []
    user_metadata: dict[str, str] | None = None
    sdk_version: Text = ""
    project_id: Text | None = None
    display_name: Text | None = None


class SessionOnly(Message):
    session_id: str


class FinishReason(Message):
    type: Text


class FinishSession(Message):
    reason: FinishReason
    detail: str | None = None


class Project(Message):
    project_id: Text


class TelemetryEvent(Message, gc=False):
    event: str = ""
    severity: str = ""


class Telemetry(Message):
    events: list[TelemetryEvent] = []


class SearchOwner(Message):
    type: str = "own"
    owner_urns: list[str] = []


class SearchStatus(Message):
    type: str
    reasons: list[str] | None = None


class SearchCursor(Message):
    last_created_at: datetime
    last_session_id: str


class SearchSessions(Message):
    session_id: str | None = None
    display_name: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = {}
    owner: SearchOwner | None = None
    statuses: list[SearchStatus] | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=200)] = 50
    cursor: SearchCursor | None = None


class LoraConfig(Message):
    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(Message):
    type: str = "adamw"


class CreateModel(Message):
    session_id: str
    model_seq_id: Number
    base_model: str
    lora_config: LoraConfig
    user_metadata: dict[str, str] | None = None
    optimizer_config: OptimizerConfig | None = None


class ModelOnly(Message):
    model_id: str


class Adam(Message):
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def checked(self) -> AdamParams:
        """UserError naming the first field that is out of its range."""
        unit = "must be at least 0 and below 1"
        ranges = {
            "learning_rate": (0.0, math.inf, "must be a finite number of at least 0"),
            "beta1": (0.0, 1.0, unit),
            "beta2": (0.0, 1.0, unit),
            "eps": (0.0, math.inf, "must be a finite number of at least 0"),
            "weight_decay": (0.0, math.inf, "must be a finite number of at least 0"),
            "grad_clip_norm": (0.0, math.inf, "must be a finite number of at least 0 (0 means no clipping)"),
        }
        for name, (low, high, rule) in ranges.items():
            value = getattr(self, name)
            if not low <= value < high:
                raise UserError(f"adam_params.{name}: {value} {rule}")
        return AdamParams(
            self.learning_rate, self.beta1, self.beta2, self.eps, self.weight_decay, self.grad_clip_norm
        )


class OptimStep(Message):
    model_id: str
    seq_id: Number = 0
    adam_params: Adam | None = None
    optimizer_params: dict[str, Any] | None = None


class SaveWeights(Message):
    model_id: str
    seq_id: Number = 0
    path: str | None = None
    ttl_seconds: float | None = None
    overwrite: bool = True
    user_metadata: dict[str, str] | None = None


class SaveWeightsForSampler(Message):
    model_id: str
    seq_id: Number = 0
    path: str | None = None
    sampling_session_seq_id: Number | None = None
    ttl_seconds: float | None = None
    user_metadata: dict[str, str] | None = None


class SaveWeightsExternal(Message):
    model_id: str
    path: str
    seq_id: Number = 0
    ttl_seconds: float | None = None
    age_encryption_recipients: list[str] | None = None


class LoadWeights(Message):
    """Into an existing model (``model_id``), or as a new one (``session_id`` and ``model_seq_id``)."""

    path: str
    optimizer: bool = False
    model_id: str | None = None
    seq_id: Number = 0
    session_id: str | None = None
    model_seq_id: Number | None = None
    base_model: str | None = None
    user_metadata: dict[str, str] | None = None
    optimizer_config: OptimizerConfig | None = None


class CreateSamplingSession(Message):
    session_id: str
    sampling_session_seq_id: Number
    base_model: str | None = None
    model_path: str | None = None


class SamplingSessionOnly(Message):
    sampling_session_id: str


class SampleEnvelope(Message):
    """The few fields of a sample request that are needed to route it; the worker decodes the rest."""

    sampling_session_id: str
    seq_id: Number = 0
    num_samples: int = 1


class PromptChunk(Message, gc=False):
    tokens: list[int] | None = None


class SamplePrompt(Message):
    chunks: list[PromptChunk] = []


class SampleSize(Message):
    """As much of a sample request as tells how long its prompt is."""

    prompt: SamplePrompt


class LossInput(Message):
    name: str
    rank: int


class LossNode(Message):
    op: str
    name: str
    target: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


class LossNodes(Message):
    nodes: list[LossNode]
    format: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1


class CreateCustomLoss(Message):
    session_id: str
    inputs: list[LossInput]
    graph: LossNodes


class RetrieveFuture(Message):
    request_id: str


class RequestOnly(Message):
    request_id: str


class PollTarget(Message):
    type: str
    sampling_session_id: str
    cloned_sampler_id: int = 0


class RetrieveFutures(Message):
    target: PollTarget
    prev_cursor: int = 0
    timeout: float | None = None


class TinkerPath(Message):
    tinker_path: str


class CopyWeights(Message):
    """Into a session of the caller's (with a number for the run), or into a new one."""

    source_path: str
    session_id: str | None = None
    model_seq_id: Number | None = None
    destination_project_id: Text | None = None
    ttl_seconds: float | None = None


class SetTtl(Message):
    ttl_seconds: float | None = None


class AddModel(Message):
    model: str


class CreateKey(Message):
    tenant: str
    name: str = ""
    ttl_seconds: float | None = None
    admin: bool = False


class Nothing(Message):
    """A body that is read over."""


_decoders: dict[type[Message], msgspec.json.Decoder[Any]] = {}


def decode(message: type[T], body: bytes) -> T:
    """Read a JSON body; UserError (400) names the field that is missing or has the wrong type."""
    decoder = _decoders.get(message)
    if decoder is None:
        decoder = _decoders[message] = msgspec.json.Decoder(message)
    try:
        found: T = decoder.decode(body or b"{}")
    except msgspec.ValidationError as error:
        raise UserError(f"request body: {_plain(str(error))}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"request body is not JSON: {error}") from None
    notes = getattr(found, "user_metadata", None) or {}
    size = sum(len(name) + len(note) for name, note in notes.items())
    if size > METADATA:
        raise UserError(
            f"user_metadata: {size} characters are more than {METADATA}: keep the rest elsewhere, and note where"
        )
    return found


def _plain(error: str) -> str:
    """msgspec says 'Expected `int`, got `str` - at `$.lora_config.rank`'; drop the JSONPath's dollar."""
    hint = " (the SDK sends NaN and infinity as null)" if "`float`, got `null`" in error else ""
    return error.replace("`$.", "`").replace("`$`", "the whole body") + hint
