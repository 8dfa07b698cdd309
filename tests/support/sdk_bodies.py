"""Bodies as the tinker SDK posts them, made by the SDK's own code."""

from __future__ import annotations

from typing import Any

from tinker import types as sdk
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

RUN = "112dd27d:train:0"


def sdk_datum(n: int = 5, **inputs: Any) -> sdk.Datum:
    tokens = list(range(10, 10 + n))
    return sdk.Datum(
        model_input=sdk.ModelInput.from_ints(tokens), loss_fn_inputs=inputs or {"target_tokens": tokens}
    )


def sdk_body(
    data: list[sdk.Datum], loss_fn: str = "cross_entropy", config: Any = None, *, forward_only: bool = False
) -> bytes:
    """The bytes that the SDK would post."""
    message = forward_backward_request_to_proto(
        ForwardBackwardRequest(
            model_id=RUN,
            seq_id=7,
            forward_backward_input=ForwardBackwardInput(data=data, loss_fn=loss_fn, loss_fn_config=config),
        )
    )
    message.forward_only = forward_only
    return message.SerializeToString()
