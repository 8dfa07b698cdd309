"""The small operations of a decoder, in one pass each where a single CPU core computes, else by torch's own.

Who calls asks :func:`serves` first: with more threads torch's operations are faster, since they share out their rows.
The kernels are in :mod:`~tuft_jupyter.engine.kernels`, imported when first needed: numba takes a third of a second.

Shapes: as in :mod:`~tuft_jupyter.engine.kernels`.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16)


def serves(t: Tensor) -> bool:
    """Whether what is computed from this is computed here."""
    return (
        t.device.type == "cpu"
        and t.dtype in _DTYPES
        and torch.get_num_threads() == 1
        and kernels() is not None
    )


def rms_norm(x_NCE: Tensor, weight_JE: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of the first J heads: ``weight * unit`` and ``unit = x * scale`` [N, J, E], and ``scale`` [N, J]."""
    shape = len(x_NCE), *weight_JE.shape
    y_NJE, unit_NJE = x_NCE.new_empty(shape), x_NCE.new_empty(shape)
    scale_NJ = torch.empty(shape[:2])
    kernels().rms_norm(*_arrays(x_NCE, weight_JE), eps, *_arrays(y_NJE, unit_NJE, scale_NJ))
    return y_NJE, unit_NJE, scale_NJ


def rms_norm_back(dy_NJE: Tensor, weight_JE: Tensor, unit_NJE: Tensor, scale_NJ: Tensor) -> Tensor:
    """The gradient in x, new memory."""
    dx_NJE = torch.empty_like(unit_NJE)
    kernels().rms_norm_back(*_arrays(dy_NJE, weight_JE, unit_NJE, scale_NJ, dx_NJE))
    return dx_NJE


def rotate(x_NCE: Tensor, heads: int, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """``x * cos + roll(x, E / 2) * sin`` of the first ``heads``, [N, J, E]."""
    y_NJE = x_NCE.new_empty(len(x_NCE), heads, x_NCE.shape[2])
    kernels().rotate(*_arrays(x_NCE, cos_NE, sin_NE, y_NJE))
    return y_NJE


def swiglu(gate_up_NX: Tensor) -> Tensor:
    """``silu(gate) * up`` of the halves of each row, [N, F]."""
    y_NF = gate_up_NX.new_empty(len(gate_up_NX), gate_up_NX.shape[1] // 2)
    kernels().swiglu(*_arrays(gate_up_NX, y_NF))
    return y_NF


def swiglu_back(gate_up_NX: Tensor, dy_NF: Tensor) -> Tensor:
    """The gradients in gate and up, side by side."""
    dgate_up_NX = torch.empty_like(gate_up_NX)
    kernels().swiglu_back(*_arrays(gate_up_NX, dy_NF, dgate_up_NX))
    return dgate_up_NX


def attend(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, keys_CGSD: Tensor, values_CGSD: Tensor, rows_C: Tensor,
    lengths_C: Tensor, scaling: float, window: int | None, o_NHD: Tensor,
) -> None:  # fmt: skip
    """Single tokens of sequences attend to their pasts; see the kernel. Writes ``keys``, ``values`` and ``o``."""
    given = (t.contiguous() for t in (q_NHD, k_NGD, v_NGD))
    kernels().attend(
        *_arrays(*given, keys_CGSD, values_CGSD, rows_C, lengths_C),
        np.float32(scaling),
        window or 0,
        *_arrays(o_NHD),
    )


def _arrays(*tensors: Tensor) -> list[Any]:
    """The same memory for numpy, which has no bfloat16: their bits."""
    return [(t.view(torch.int16) if t.dtype == torch.bfloat16 else t).numpy() for t in tensors]


@cache
def kernels() -> Any:
    """The compiled ones, None without numba."""
    if find_spec("numba") is None:
        return None
    from tuft_jupyter.engine import kernels as compiled

    return compiled
