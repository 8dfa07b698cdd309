"""One tensor of a request: bytes or lists, dense or CSR, to a numpy array of the shape it claims.

Nothing is allocated on the word of a shape alone: a dense tensor must bring the bytes its shape asks for, and
the cells that a sparse one leaves out are counted against a :class:`Room` that the whole request shares.

It does not know what a tensor means; ``where`` is only the name that errors carry
(``data[3].loss_fn_inputs['weights']``). The widths of the public wire collapse: int32 becomes int64, bfloat16
becomes float32 (SDK ``response_conv``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuft_jupyter.core.errors import TooLarge, UserError
from tuft_jupyter.wire import tuft_wire_pb2 as pb

MAX_SPARSE_CELLS = 1 << 24
"""Cells that all sparse tensors of one request may have when written out: 128 MiB of int64."""

_ITEM_BYTES: dict[int, int] = {
    pb.DTYPE_FLOAT32: 4,
    pb.DTYPE_INT64: 8,
    pb.DTYPE_INT32: 4,
    pb.DTYPE_BFLOAT16: 2,
}
_MAX_DIMS = 2


class Room:
    """How many sparse cells the rest of a request may still be written out to."""

    __slots__ = ("cells",)

    def __init__(self, cells: int = MAX_SPARSE_CELLS) -> None:
        self.cells = cells

    def take(self, where: str, cells: int) -> None:
        self.cells -= cells
        if self.cells < 0:
            raise TooLarge(
                f"{where}: the sparse tensors of one call may stand for {MAX_SPARSE_CELLS} cells in all; "
                "send fewer datums in one call"
            )


def tensor_array(tensor: pb.Tensor, where: str, room: Room) -> NDArray[Any]:
    """Decode a protobuf tensor: float32 or int64, 1-D or 2-D, writable, owning its memory."""
    shape = check_shape(tensor.shape, where)
    if tensor.WhichOneof("encoding") == "sparse_csr":
        csr = tensor.sparse_csr
        return densify(
            _values(csr.values, tensor.dtype, f"{where}.values"),
            _values(csr.crow_indices, pb.DTYPE_INT64, f"{where}.crow_indices"),
            _values(csr.col_indices, pb.DTYPE_INT64, f"{where}.col_indices"),
            shape,
            where,
            room,
        )
    flat = _values(tensor.dense, tensor.dtype, where)
    return reshape(flat, shape or (flat.size,), where)


def reshape(flat: NDArray[Any], shape: tuple[int, ...], where: str) -> NDArray[Any]:
    """``flat`` in the shape it claims; UserError if the two disagree."""
    if math.prod(shape) != flat.size:
        raise UserError(
            f"{where}: shape {list(shape)} asks for {math.prod(shape)} numbers, but {flat.size} were sent"
        )
    return flat.reshape(shape)


def densify(
    values: NDArray[Any],
    crow: NDArray[np.int64],
    col: NDArray[np.int64],
    shape: tuple[int, ...],
    where: str,
    room: Room,
) -> NDArray[Any]:
    """Write out a CSR matrix; cells that are not listed are 0."""
    cell_rows = csr_rows(values, crow, col, shape, where)
    rows, columns = shape
    room.take(where, rows * columns)
    dense = np.zeros(shape, dtype=values.dtype)
    dense[cell_rows, col] = values
    return dense


def csr_rows(
    values: NDArray[Any],
    crow: NDArray[np.int64],
    col: NDArray[np.int64],
    shape: Sequence[int],
    where: str,
) -> NDArray[np.int64]:
    """The row of each listed cell of a CSR matrix; UserError if its parts do not fit together."""
    if len(shape) != 2:
        raise UserError(f"{where}: a sparse tensor needs a shape of two dimensions, got {list(shape)}")
    rows, columns = shape
    fits = crow.size == rows + 1 and crow[0] == 0 and crow[-1] == col.size
    # The ends alone do not do: differences of numbers near 2**63 wrap around, and np.repeat then writes past its array
    if not fits or bool(((crow < 0) | (crow > col.size)).any()) or bool((np.diff(crow) < 0).any()):
        raise UserError(
            f"{where}.crow_indices must be {rows + 1} numbers (rows + 1) that rise from 0 to the number of "
            f"col_indices ({col.size})"
        )
    if values.size != col.size:
        raise UserError(f"{where}: {values.size} values for {col.size} col_indices")
    if col.size and not (0 <= int(col.min()) and int(col.max()) < columns):
        raise UserError(f"{where}.col_indices must lie in 0..{columns - 1}")
    return np.repeat(np.arange(rows), np.diff(crow))


def check_shape(shape: Sequence[int], where: str) -> tuple[int, ...]:
    """``shape`` as a tuple of one or two sizes that numpy can hold (none at all: a flat tensor)."""
    if len(shape) > _MAX_DIMS:
        raise UserError(f"{where}: a loss input has one or two dimensions, got {len(shape)}")
    if any(not 0 <= size < 1 << 31 for size in shape):
        raise UserError(f"{where}: shape {list(shape)} has a size that is negative or beyond 2**31")
    return tuple(shape)


def _values(data: bytes, dtype: int, where: str) -> NDArray[Any]:
    """A flat copy of packed little-endian numbers, widened to float32 or int64."""
    width = _ITEM_BYTES.get(dtype)
    if width is None:
        raise UserError(f"{where}: dtype {dtype} is not one of float32, int64, int32, bfloat16")
    if len(data) % width:
        raise UserError(f"{where}: {len(data)} bytes are not a whole number of {width}-byte numbers")
    if dtype == pb.DTYPE_FLOAT32:
        return np.frombuffer(data, "<f4").astype(np.float32)
    if dtype == pb.DTYPE_INT64:
        return np.frombuffer(data, "<i8").astype(np.int64)
    if dtype == pb.DTYPE_INT32:
        return np.frombuffer(data, "<i4").astype(np.int64)
    # A bfloat16 is the upper half of a float32.
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
