"""Offloading: vectors of idle adapters, kept in host memory and, when that is full, on disk.

Vectors go in and come back with the same bits. The disk is one file without a name, so that nothing of it is left
when the process ends, however it ends; room in it is used again. Knows nothing of adapters or runs.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Handle = int


class OffloadStore:
    """Keeps lists of fp32 vectors; ``host_bytes`` of them in memory, those put in last.

    ``directory`` is where the file lies, by default where temporary files do. Where the disk is full, memory is used.
    """

    def __init__(self, host_bytes: int, directory: Path | None = None) -> None:
        self._room = host_bytes
        self._directory = directory
        self._serial = 0
        self._in_memory: OrderedDict[Handle, list[Tensor]] = OrderedDict()
        self._on_disk: dict[Handle, tuple[int, list[int]]] = {}  # where it begins, elements of each vector
        self._file: int | None = None
        self._end = 0
        self._free: dict[int, list[int]] = {}  # by size in bytes, where

    def put(self, vectors: Sequence[Tensor]) -> Handle:
        """Keep these vectors; the memory they are in may be used for something else."""
        self._serial += 1
        kept = [vector.detach().to("cpu", copy=True) for vector in vectors]
        self._in_memory[self._serial] = kept
        self._room -= _size(kept)
        while self._room < 0 and self._in_memory:
            handle, oldest = next(iter(self._in_memory.items()))
            try:
                self._on_disk[handle] = self._write(oldest)
            except OSError as error:
                log.warning("idle adapters stay in memory: %s", error)
                break
            del self._in_memory[handle]
            self._room += _size(oldest)
        return self._serial

    def take(self, handle: Handle) -> list[Tensor]:
        """The vectors, on the CPU, and their place is free again."""
        if handle in self._in_memory:
            kept = self._in_memory.pop(handle)
            self._room += _size(kept)
            return kept
        start, lengths = self._on_disk.pop(handle)
        vectors, at = [torch.empty(n) for n in lengths], start
        assert self._file is not None
        for vector in vectors:
            at += _all(os.preadv, self._file, vector.numpy().data.cast("B"), at)
        self._free.setdefault(at - start, []).append(start)
        return vectors

    def in_memory(self, handle: Handle) -> int:
        """Bytes of host memory that the vectors take: none if they lie on disk."""
        return _size(self._in_memory.get(handle, ()))

    def drop(self, handle: Handle) -> None:
        """Forget the vectors."""
        if handle in self._in_memory:
            self._room += _size(self._in_memory.pop(handle))
        else:
            start, lengths = self._on_disk.pop(handle)
            self._free.setdefault(4 * sum(lengths), []).append(start)

    def _write(self, vectors: list[Tensor]) -> tuple[int, list[int]]:
        if self._file is None:
            with tempfile.TemporaryFile(dir=self._directory, buffering=0) as file:
                self._file = os.dup(file.fileno())
        places, size = self._free.get(_size(vectors)), _size(vectors)
        start = places[-1] if places else self._end
        at = start
        for vector in vectors:
            at += _all(os.pwritev, self._file, vector.numpy().data.cast("B"), at)
        if places:
            places.pop()
        else:
            self._end = start + size
        return start, [len(vector) for vector in vectors]

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


def _size(vectors: Sequence[Tensor]) -> int:
    return sum(vector.nbytes for vector in vectors)


def _all(call: Callable[[int, list[memoryview], int], int], file: int, data: memoryview, at: int) -> int:
    """Read or write all of ``data`` at a place in the file; its size."""
    done = 0
    while done < len(data):
        moved = call(file, [data[done:]], at + done)
        if moved == 0:
            raise OSError("the file ends too early")
        done += moved
    return done
