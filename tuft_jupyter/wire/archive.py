"""Files of a checkpoint as streams: one file, or the adapter as a tar archive.

What leaves is a plain PEFT directory: optimizer and manifest stay here. Nothing is kept in memory but the chunk under
way, the disk is read off the event loop, and the length is known before the first byte. Files are opened at once, so a
checkpoint that is deleted meanwhile is still sent whole.
"""

from __future__ import annotations

import asyncio
import os
import tarfile
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tuft_jupyter.core.errors import NotFound

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
COMPLETE = "checkpoint_complete"
"""An empty file at the end of an archive: SDKs before 0.36 take its absence for a broken download."""

CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class Stream:
    """``size`` bytes, in chunks of at most :data:`CHUNK`; None where the end is not known before it is there."""

    size: int | None
    chunks: AsyncGenerator[bytes, None]


async def one_file(path: Path) -> Stream:
    file, size = await asyncio.to_thread(_open, path)
    return Stream(size, _read(file, size))


async def tar(directory: Path, names: Sequence[str], modified: float) -> Stream:
    """An uncompressed archive (weights do not compress) of the named files and the empty file at its end."""
    opened = [(name, *await asyncio.to_thread(_open, directory / name)) for name in names]
    heads = [_head(name, size, modified) for name, _, size in opened]
    end = _head(COMPLETE, 0, modified) + bytes(2 * tarfile.BLOCKSIZE)
    size = sum(len(head) + _padded(size) for head, (_, _, size) in zip(heads, opened, strict=True)) + len(end)

    async def chunks() -> AsyncGenerator[bytes, None]:
        for head, (_, file, size) in zip(heads, opened, strict=True):
            yield head
            async for chunk in _read(file, size):
                yield chunk
            yield bytes(_padded(size) - size)
        yield end

    return Stream(size, chunks())


def _open(path: Path) -> tuple[BinaryIO, int]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise NotFound(
            f"the checkpoint has no file {path.name!r}: it was deleted, or never written; save it again"
        ) from None
    return file, os.fstat(file.fileno()).st_size


async def _read(file: BinaryIO, size: int) -> AsyncGenerator[bytes, None]:
    with file:
        while size:
            chunk = await asyncio.to_thread(file.read, min(CHUNK, size))
            if not chunk:
                raise OSError(f"{file.name} became shorter while it was sent")
            size -= len(chunk)
            yield chunk


def _head(name: str, size: int, modified: float) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, int(modified), 0o644
    return info.tobuf(tarfile.GNU_FORMAT)  # no limit on sizes, unlike ustar


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
