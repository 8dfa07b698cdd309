"""What a forward or forward_backward request must be before any of it is run.

Knows shapes, numbers and limits, not models. Every refusal names the datum, the field, the limit and how to
mend it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.loss_graph import LOGPROBS
from tuft_jupyter.core.loss_names import check_loss
from tuft_jupyter.core.types import AdamParams, Datum, ForwardBackward
from tuft_jupyter.engine.custom_loss import Program
from tuft_jupyter.engine.losses import Loss, resolve


def check_request(
    request: ForwardBackward, *, vocab_size: int, max_length: int, custom_loss: bool = False
) -> None:
    """UserError unless every datum can be run and the loss is known and rightly configured.

    ``custom_loss``: whether losses that users wrote are computed here.
    """
    check_loss(request.loss_fn, custom_loss=custom_loss)
    loss, _ = resolve(request.loss_fn, request.loss_config)
    if not request.data:
        raise UserError("data: the batch is empty; send at least one datum")
    for i, datum in enumerate(request.data):
        _check_datum(f"datum {i}", datum, loss, vocab_size, max_length)


def _check_datum(where: str, datum: Datum, loss: Loss, vocab_size: int, max_length: int) -> None:
    length = len(datum.tokens)
    if length == 0:
        raise UserError(f"{where}: model_input has no tokens; drop it or give it at least one")
    if length > max_length:
        raise UserError(
            f"{where}: model_input has {length} tokens, the model takes at most {max_length}; "
            "shorten or split it"
        )
    _check_ids(f"{where}: model_input", datum.tokens, vocab_size)
    targets = datum.inputs.get("target_tokens")
    if targets is None:
        raise UserError(f'{where}: loss_fn "{loss.name}" needs target_tokens; add one target per token')
    if targets.dtype.kind not in "iu":
        raise UserError(f"{where}: target_tokens must be integers (int64), not {targets.dtype}")
    shapes, ranks = ("[N] or [N, K]", (1, 2)) if loss.many_targets else ("[N]", (1,))
    if loss.program is not None and loss.program.logprobs_rank == 2:
        shapes, ranks = "[N, K]", (2,)
    if targets.ndim not in ranks or 0 in targets.shape:
        raise UserError(
            f'{where}: target_tokens has shape {list(targets.shape)}; "{loss.name}" takes {shapes}, '
            "N the number of tokens"
        )
    _check_length(f"{where}: target_tokens", targets, length)
    _check_ids(f"{where}: target_tokens", targets, vocab_size)
    if loss.program is not None:
        _check_program(where, datum, loss.program, targets)
        return
    for name in loss.inputs:
        value = datum.inputs.get(name)
        if value is None:
            if name in loss.required:
                raise UserError(f'{where}: loss_fn "{loss.name}" needs {name}; add one number per token')
        else:
            _check_numbers(f"{where}: {name}", value, targets)
    extra = datum.inputs.get("weights")
    if extra is not None and "weights" not in loss.inputs and not np.all(extra == 1):
        raise UserError(
            f'{where}: weights: loss_fn "{loss.name}" has no weights; multiply the advantages by them instead'
        )


def _check_program(where: str, datum: Datum, program: Program, targets: NDArray[Any]) -> None:
    """The inputs that a user's own loss takes, and what it would make of them."""
    shapes = {LOGPROBS: (targets.shape, torch.float32)}
    for name, rank in program.ranks.items():
        value = datum.inputs.get(name)
        if value is None:
            raise UserError(f"{where}: the loss takes {name}; add it, or leave it out of the loss")
        if value.dtype.kind not in "fiu":
            raise UserError(f"{where}: {name} must be numbers (float32), not {value.dtype}")
        if value.size != 1 if rank == 0 else value.ndim != rank:
            shape = ("one number", "[N]", "[N, K]")[rank]
            raise UserError(f"{where}: {name} has shape {list(value.shape)}; the loss takes {shape}")
        if rank:
            _check_length(f"{where}: {name}", value, len(targets))
        _check_finite(f"{where}: {name}", value)
        shapes[name] = (() if rank == 0 else value.shape, torch.from_numpy(value[:0]).dtype)
    try:
        program.check(shapes)
    except UserError as error:
        raise UserError(f"{where}: {error.message}") from None


def _check_ids(where: str, ids: NDArray[Any], vocab_size: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise UserError(
            f"{where}: token id {bad} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1}); "
            "use the tokenizer of this base model"
        )


def _check_length(where: str, values: NDArray[Any], length: int) -> None:
    if len(values) != length:
        raise UserError(
            f"{where} has {len(values)} rows for {length} tokens; give one per token of model_input"
        )


def _check_numbers(where: str, values: NDArray[Any], targets: NDArray[Any]) -> None:
    if values.dtype.kind not in "fiu":
        raise UserError(f"{where} must be numbers (float32), not {values.dtype}")
    if values.shape != targets.shape:
        raise UserError(
            f"{where} has shape {list(values.shape)}, target_tokens {list(targets.shape)}; make them equal"
        )
    remedy = "use 0 to leave it out"
    if where.endswith(": weights"):  # the SDK sends the gradients of a loss that ran at the client as weights
        remedy += (
            ". With forward_backward_custom these are the gradients of your loss in the log-probabilities of this "
            "datum, negated: keep its terms away from 0/0, log(0) and sqrt(0)"
        )
    _check_finite(where, values, remedy)


def _check_finite(where: str, values: NDArray[Any], remedy: str = "use 0 to leave it out") -> None:
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values.reshape(-1)))[0])
        raise UserError(f"{where} is not finite at element {at} ({values.reshape(-1)[at]}); {remedy}")


def check_adam(params: AdamParams) -> None:
    """UserError naming the field of ``adam_params`` that no step can be taken with."""
    for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
        value = getattr(params, name)
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"adam_params: {name} must be a finite number of at least 0, not {value}")
    if np.float32(params.eps) == 0:  # the first gradient of A is 0: 0 / (sqrt(0) + 0)
        raise UserError(f"adam_params: eps must be above 0, not {params.eps}; the default is 1e-12")
    for name in ("beta1", "beta2"):
        value = getattr(params, name)
        if not 0 <= value < 1:
            raise UserError(f"adam_params: {name} must be in [0, 1), not {value}")
