"""The names of the losses, and the refusal of any other name: known before a request is accepted.

Formulas, inputs and settings are :mod:`tuft_jupyter.engine.losses`' to say; a test holds the names against it.
"""

from __future__ import annotations

from tuft_jupyter.core.errors import UserError

BUILT_IN = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo")

CUSTOM = "custom"
"""The name of every loss that a user wrote; ``loss_fn_config["loss_id"]`` says which."""

CUSTOM_LOSS_IS_OFF = (
    "losses of one's own are not computed on this server: its operator has not set custom_loss_server_side. Give "
    "forward_backward_custom() the function itself, and it is computed on your side"
)

_NOT_HERE = {
    "stable_reinforce": (
        "its formula is not public",
        'Use loss_fn="importance_sampling" (or "ppo" for off-policy data).',
    ),
}


def check_loss(name: str, *, custom_loss: bool) -> None:
    """UserError, with the losses that exist, unless ``name`` is one; ``custom_loss``: whether users' own are taken."""
    if name in BUILT_IN or (name == CUSTOM and custom_loss):
        return
    if name == CUSTOM:
        raise UserError(f'loss_fn "{CUSTOM}": {CUSTOM_LOSS_IS_OFF}')
    reason, advice = _NOT_HERE.get(name, ("it is not known", ""))
    shown = name if len(name) <= 64 else f"{name[:64]}..."
    text = f'loss_fn "{shown}" is not available on this server: {reason}. Available: {", ".join(BUILT_IN)}.'
    raise UserError(f"{text} {advice}".rstrip())
