"""The vocabulary of tuft-jupyter: eight nouns and the values that operations carry.

Everything else imports this module; it imports nothing of ours. The nouns are **Tenant** (a string: who),
**Session** (a connected client), **Run** (an adapter in training; its id is the Tinker model id),
**Sampler** (weights pinned for sampling), **Checkpoint** (saved weights), **Op** (one request in a lane),
**Lane** (the ordered ops of one run) and **Record** (one line of the journal, which is also one live event).

Arrays are numpy and their shapes are given as ``[N]`` (tokens of one datum) or ``[N, K]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
FloatArray = NDArray[np.float32]

JSON = "application/json"
PROTOBUF = "application/x-protobuf"
SAMPLED = f'{PROTOBUF}; messageType="SampleResponse"'
"""A sample, which says so: SDKs before 0.18 read it in JSON only (protocol section 7)."""

RUN_INFIX = ":train:"
SAMPLER_INFIX = ":sample:"


class OpKind(StrEnum):
    """What an op asks for. The values are the words of the Tinker protocol."""

    CREATE_MODEL = "create_model"
    LOAD_WEIGHTS = "load_weights"
    FORWARD = "forward"
    FORWARD_BACKWARD = "forward_backward"
    OPTIM_STEP = "optim_step"
    SAVE_WEIGHTS = "save_weights"
    SAVE_WEIGHTS_FOR_SAMPLER = "save_weights_for_sampler"
    UNLOAD_MODEL = "unload_model"


class CheckpointKind(StrEnum):
    """Where a checkpoint stands in ``tinker://{run}/{kind}/{name}``."""

    TRAINING = "weights"
    SAMPLER = "sampler_weights"
    EXTERNAL = "external_weights"


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """The geometry of one adapter.

    ``rank`` is at least 1; ``alpha`` is the LoRA numerator (the update is scaled by ``alpha / rank``);
    ``seed`` makes the initial A matrices reproducible. The three flags choose the target modules:
    attention projections, MLP projections, and the unembedding (``lm_head``).
    """

    rank: int
    alpha: float
    seed: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


@dataclass(frozen=True, slots=True)
class AdamParams:
    """One AdamW step (decoupled weight decay, Loshchilov & Hutter 2019).

    ``grad_clip_norm`` is the global L2 norm over the adapter's gradients; 0 means no clipping.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, slots=True)
class Datum:
    """One training example: ``tokens`` int32 [N], and loss inputs of N rows each ([N] or [N, K])."""

    tokens: Int32Array
    inputs: Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class ForwardBackward:
    """A decoded forward or forward_backward request."""

    data: Sequence[Datum]
    loss_fn: str
    loss_config: Mapping[str, float | str] = field(default_factory=dict)
    backward: bool = True

    @property
    def tokens(self) -> int:
        """Input tokens of all datums together."""
        return sum(len(datum.tokens) for datum in self.data)


@dataclass(frozen=True, slots=True)
class ForwardBackwardResult:
    """What a pass over some datums gives.

    ``logprobs``: one float32 array per datum, in order, shaped as that datum's ``target_tokens``.
    ``loss_sum``: the sum of the loss over all datums (nats; Tinker losses are sums, never means).
    ``weight_sum``: what to divide ``loss_sum`` by for a loss per token: the sum of ``|weights|`` for
    cross_entropy, the number of positions with a non-zero advantage for the policy losses.
    ``metrics``: further numbers, keys in the SDK's ``name:reduction`` form.
    """

    logprobs: Sequence[FloatArray]
    loss_sum: float
    weight_sum: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw tokens.

    ``max_tokens`` None is as far as the context goes. ``temperature`` 0 is greedy; ``top_k`` -1 and ``top_p`` 1.0 are
    off. ``stop_tokens`` ends a sequence after that token, ``stop_strings`` as soon as the decoded text contains one;
    the stop token stays in the result. ``None`` for ``stop_tokens`` means the model's own end-of-sequence tokens, an
    empty tuple means never.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    stop_tokens: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TargetIds:
    """Token ids to be scored at places of a prompt, a matrix of ``shape`` [P - 1, K] given cell by cell.

    Cell c stands in row ``rows[c]`` and asks for ``ids[c]`` at prompt position ``rows[c] + 1``; -1 asks for nothing.
    ``columns`` None is a dense matrix, row by row; else the columns of a sparse one, its cells in the order of CSR.
    """

    ids: NDArray[np.int64]
    rows: NDArray[np.int64]
    shape: tuple[int, int]
    columns: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A decoded sample request: ``prompt`` is int32 [P], ``num_samples`` sequences are drawn from it.

    What is asked of the prompt: the log-probabilities of its own tokens, and of the ``topk`` likeliest in their
    places (both only of the last ``prompt_logprobs_last_n`` positions if that is given), those of ``targets``, and
    ``prompt_alt_tokens_k`` tokens drawn at the request's temperature in each place after the first.
    Requests with different ``salt`` do not share cached prompts.
    """

    prompt: Int32Array
    num_samples: int
    params: SamplingParams
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    targets: TargetIds | None = None
    prompt_alt_tokens_k: int = 0
    salt: str = ""


class StopReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """``tokens`` int32 [T] and ``logprobs`` float32 [T]: of each token under the untempered model (T=1).

    ``topk_ids`` int32 [T, k] and ``topk_logprobs`` float32 [T, k] are the likeliest tokens at each place, best first.
    """

    tokens: Int32Array
    logprobs: FloatArray
    stop_reason: StopReason
    topk_ids: Int32Array | None = None
    topk_logprobs: FloatArray | None = None


NO_TOKEN = -99999.0
"""The protocol's log-probability of a token that cannot be drawn, or is none."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token of sample ``index``, as soon as it is there; ``stop_reason`` comes with the last one.

    ``top`` are the likeliest (token, logprob) at its place, best first, where they were asked for.
    """

    index: int
    token: int
    logprob: float
    top: Sequence[tuple[int, float]] = ()
    stop_reason: StopReason | None = None


@dataclass(frozen=True, slots=True)
class SampleResult:
    """Exactly ``num_samples`` sequences.

    ``prompt_logprobs`` float32 [P] with NaN at 0. ``topk_prompt_ids`` int32 [P, k] and
    ``topk_prompt_logprobs`` float32 [P, k]; row 0 is id 0 and -99999.0 (nothing predicts the first token).
    ``target_prompt_logprobs`` float32 has one number for each cell of ``targets``, 0 where nothing was asked.
    ``alt_tokens`` int64 and ``alt_logprobs`` float32 are [P - 1, k]; row i stands for position i + 1.
    """

    sequences: Sequence[SampledSequence]
    prompt_logprobs: FloatArray | None = None
    topk_prompt_ids: Int32Array | None = None
    topk_prompt_logprobs: FloatArray | None = None
    targets: TargetIds | None = None
    target_prompt_logprobs: FloatArray | None = None
    alt_tokens: NDArray[np.int64] | None = None
    alt_logprobs: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class Op:
    """One accepted request of a lane: a value that can be journaled, executed, and executed again.

    ``body`` is the request as it arrived (decompressed) for forward and forward_backward, and empty for the
    others, whose meaning is whole in ``args``: the checked fields of the request with what the server
    decided about it (directories, seeds, ids), as plain JSON. ``tokens`` is the cost used for fairness.
    """

    request_id: str
    run: str
    seq: int
    kind: OpKind
    tenant: str
    tokens: int = 0
    args: Mapping[str, Any] = field(default_factory=dict)
    body: bytes = b""
    content_type: str = JSON


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the journal and one live event.

    ``n`` numbers records from 1 without holes (0: not yet appended); ``time`` is seconds since the epoch.
    ``data`` is plain JSON. ``blob`` is an op's body or result; it is never shown in the feed.
    """

    kind: str
    tenant: str
    data: Mapping[str, Any]
    time: float = 0.0
    n: int = 0
    blob: bytes | None = None


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A base model that can be asked for: ``name`` on the wire, ``path`` on the server's disk.

    ``max_rank`` is the highest LoRA rank the configuration allows on it; 0 leaves it to the server. ``trainable`` and
    ``sampleable`` say whether the server has anybody who does that.
    """

    name: str
    path: str
    max_context_length: int
    vocab_size: int
    arch: str
    max_rank: int = 0
    trainable: bool = True
    sampleable: bool = True


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request speaks for. ``admin`` may see and stop what belongs to others."""

    tenant: str
    admin: bool = False


def run_id(session: str, number: int) -> str:
    """``{session}:train:{n}``; the SDK computes this id by itself (tinker_wire, create-via-load)."""
    return f"{session}{RUN_INFIX}{number}"


def sampler_id(session: str, number: int) -> str:
    return f"{session}{SAMPLER_INFIX}{number}"


def checkpoint_path(run: str, kind: CheckpointKind, name: str) -> str:
    return f"tinker://{run}/{kind.value}/{name}"
