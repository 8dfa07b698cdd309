"""What the core asks of engines, and of whoever makes them.

Engines have two layers. :class:`Trainer` and :class:`Sampler` compute: plain, synchronous, over decoded values,
without Ray and without HTTP. :class:`TrainingEngine` and :class:`SamplingEngine` are how the service reaches them from
the event loop: asynchronous, over bytes, wherever they live. A worker (``engine/worker``) joins the two: it decodes
requests, cuts them into parts, calls, and encodes the results, so the notebook's process only ever moves bytes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tuft_jupyter.core.errors import TuftError
from tuft_jupyter.core.types import (
    AdamParams,
    Drawn,
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
    ModelCard,
    OpKind,
    SampleRequest,
    SampleResult,
)

Listener = Callable[[Drawn], None]
"""Called with every token as it is drawn, in the sampler's own thread: it must return at once."""


@dataclass(frozen=True, slots=True)
class RunMemory:
    """Bytes that a run in training takes in memory: on the ``model``'s device, or ``idle`` in host memory."""

    model: int = 0
    idle: int = 0


class Trainer(Protocol):
    """Trains many adapters over one frozen base model. Runs are named by their id.

    A batch holds the work of several runs; the answer to each run equals what it would be alone. A refusal
    of one item never touches the others: it is returned in that item's place, not raised.
    """

    def create(self, run: str, lora: LoraSpec) -> None:
        """Add a fresh adapter (B = 0, A from ``lora.seed``). UserError if the geometry is impossible."""

    def load(self, run: str, source: Path, *, optimizer: bool) -> LoraSpec:
        """Replace (or create) the run's adapter by a checkpoint directory; gradients are cleared.

        ``optimizer`` restores the Adam moments and step count too; without it they start cold.
        UserError names what does not fit (base model, rank, target modules, a missing or corrupt file), before
        anything is touched.
        """

    def check(self, request: ForwardBackward) -> None:
        """UserError naming the datum, the field and the limit if any part of the request cannot be run."""

    def forward_backward(
        self, batch: Sequence[tuple[str, ForwardBackward]]
    ) -> list[ForwardBackwardResult | TuftError]:
        """One pass over the datums of several runs; gradients of sums are added to each run's accumulator.

        Every request was accepted by :meth:`check`. Items with ``backward=False`` leave no gradient.
        """

    def optim_step(self, batch: Sequence[tuple[str, AdamParams]]) -> list[Mapping[str, float] | TuftError]:
        """AdamW on each run's accumulated gradient, then clear it. Returns ``grad_norm`` and such."""

    def save(self, run: str, target: Path, *, optimizer: bool, durable: bool = True) -> int:
        """Write a plain PEFT directory atomically; returns its size in bytes.

        Without ``durable`` it need not survive a power failure, and is there sooner.
        """

    def remove(self, run: str) -> None:
        """Forget the adapter and its optimizer; unknown runs are ignored."""

    def memory(self) -> Mapping[str, RunMemory]:
        """What each run takes in memory now: weights, gradients and optimizer; nothing if it lies on disk."""


class Sampler(Protocol):
    """Draws tokens for many adapters in one decode batch.

    ``submit`` may be called from any thread; ``step`` from one thread only. A request is identified by ``key``.
    """

    def check(self, request: SampleRequest) -> None:
        """UserError if the prompt, the counts or the parameters are out of bounds."""

    def submit(
        self, key: str, adapter: Path | None, request: SampleRequest, on_token: Listener | None = None
    ) -> None:
        """Queue a request for the base model (None) or for the adapter saved in that directory."""

    def step(self) -> list[tuple[str, SampleResult | TuftError]]:
        """Admit what fits, decode one token for every live sequence; returns the requests that ended."""

    def busy(self) -> bool:
        """True while any request is queued or decoding."""

    def cancel(self, key: str) -> None:
        """Drop a request between steps; unknown keys are ignored."""

    def waits_for(self, key: str) -> str:
        """In words, why nothing of a request is drawn yet; empty if something is. From any thread."""


@dataclass(frozen=True, slots=True)
class Task:
    """An op, or the next part of it, on its way to a training worker.

    ``grant`` is how many tokens of a forward or forward_backward may be worked on in this step (at least one
    datum always is). An op over its grant comes back unfinished and is sent again, then without ``body``: the
    worker remembers where it stopped.
    """

    request_id: str
    run: str
    kind: OpKind
    args: Mapping[str, Any] = field(default_factory=dict)
    body: bytes = b""
    content_type: str = ""
    grant: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a task, or of a sample request.

    ``finished`` is False while an op has tokens left; then ``facts["tokens"]`` counts those that were processed.
    ``facts`` are the few numbers that the journal keeps beside the bytes (``loss_sum``, ``weight_sum``, ``tokens``,
    ``grad_norm``, ``size_bytes``, ``engine_ms`` ...). ``category`` is "" for success, else "user" or "server" with
    the text in ``error``.
    """

    request_id: str
    finished: bool = True
    result: bytes = b""
    content_type: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    category: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class TextTask:
    """A request in OpenAI's form, on its way to a sampling worker.

    ``adapter`` is the directory of the adapter to sample from, None for the base model; ``chat`` tells which of the two
    forms the JSON ``body`` has. ``input_tokens`` is how many its prompts may have together (0: any number); only the
    worker can count them. What is remembered of a prompt is shared within a ``tenant`` only.
    """

    request_id: str
    adapter: str | None
    body: bytes
    chat: bool
    tenant: str = ""
    input_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """The next chunks of the answer to a :class:`TextTask`; the last part has the ``facts`` of the whole answer.

    ``category`` is "" unless it failed, as ``error`` says; then it has ended.
    """

    chunks: Sequence[bytes] = ()
    ended: bool = False
    category: str = ""
    error: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


class EngineDied(Exception):
    """The worker is gone and with it every adapter it held; a new one can be started."""


class TrainingEngine(Protocol):
    """One base model's training worker, reached from the event loop."""

    on_progress: Callable[[str], None]
    """Called during a start with what is being done; set by whoever starts the engine."""

    @property
    def part_tokens(self) -> int:
        """Once it has started: into parts of how many tokens large passes are best cut, so that tenants take turns.

        0 where that is not known: then :class:`~tuft_jupyter.core.quotas.Limits` decide.
        """

    async def start(self) -> None:
        """Bring up a (new) worker with the model loaded; TuftError says why it cannot be."""

    async def step(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Run one batch; one outcome per task, in order. EngineDied if the worker went away.

        A second call may be made before the first has answered: batches run in the order of the calls. A step
        whose run still has datums left of a pass comes back unfinished.
        """

    async def stop(self) -> None: ...


class SamplingEngine(Protocol):
    """One base model's sampling worker, reached from the event loop."""

    on_progress: Callable[[str], None]

    async def start(self) -> None: ...

    async def sample(self, request_id: str, adapter: str | None, body: bytes, *, tenant: str = "") -> Outcome:
        """Sample from the base model or from the adapter in a directory; the body is the JSON request.

        What is remembered of a prompt is shared within a ``tenant`` only.
        """

    def complete(self, task: TextTask) -> AsyncGenerator[Part, None]:
        """The answer in parts, as its tokens are drawn. Closing the iterator stops the drawing."""

    async def cancel(self, request_id: str) -> None: ...

    async def waits_for(self, request_id: str) -> str:
        """In words, what the worker has a request wait for; empty if it draws."""

    async def stop(self) -> None: ...


class Catalog(Protocol):
    """The base models this server offers."""

    def cards(self) -> list[ModelCard]:
        """The models offered, in the order of the configuration."""

    def resolve(self, name: str) -> ModelCard:
        """The card of an offered model by name or path; UserError names what is offered."""

    def find(self, name: str) -> ModelCard:
        """The card of any model on this machine, offered or not; UserError says what was looked for."""


class Engines(Protocol):
    """Makes the engines of a base model (not started yet)."""

    def training(self, card: ModelCard) -> TrainingEngine: ...

    def sampling(self, card: ModelCard) -> SamplingEngine: ...
