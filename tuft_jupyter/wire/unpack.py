"""A tar archive from a stranger, read member by member: the files that are wanted, and nothing else.

Headers are parsed by the standard library; what to do with a member is decided here. Regular files with plain relative
names are read, directories and metadata are passed over, and everything else (links, devices, sparse files, names that
climb) is refused by name. Nothing is ever created under a name from the archive, sizes are bounded before a byte is
read, and compression is not undone.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import BinaryIO

from tuft_jupyter.core.errors import UserError

MEMBERS = 1000
METADATA_BYTES = 2**16
CHUNK = 2**20

_METADATA = {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"PK": "zip", b"(\xb5": "zstd"}


def files(archive: BinaryIO, limits: Mapping[str, int]) -> Iterator[tuple[str, Iterator[bytes]]]:
    """The wanted files in the archive's order, each as chunks; ``limits`` bounds their bytes by name.

    A member's chunks must be read before the next one is asked for. UserError names the member that is refused.
    """
    size = archive.seek(0, 2)
    archive.seek(0)
    seen: set[str] = set()
    for _ in range(MEMBERS):
        member = _header(archive)
        if member is None:
            return
        start, end = archive.tell(), archive.tell() + _padded(member.size)
        if member.size < 0 or end > size:
            raise UserError(f"archive: {member.name[:200]!r} claims {member.size} bytes, more than were sent")
        if member.type in _METADATA:
            if member.size > METADATA_BYTES:
                raise UserError(f"archive: metadata of {member.size} bytes; the limit is {METADATA_BYTES}")
        elif name := _wanted(member, limits):
            if name in seen:
                raise UserError(f"archive: {name} is in it twice")
            if member.size > limits[name]:
                raise UserError(f"archive: {name} has {member.size} bytes; the limit is {limits[name]}")
            seen.add(name)
            archive.seek(start)
            yield name, _chunks(archive, member.size)
        archive.seek(end)
    raise UserError(f"archive: it has more than {MEMBERS} members")


def _header(archive: BinaryIO) -> tarfile.TarInfo | None:
    """The next header; None at the end of the archive."""
    block = archive.read(tarfile.BLOCKSIZE)
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return None
    except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
        raise UserError("archive: it breaks off; send an uncompressed tar archive (tar cf)") from None
    except tarfile.HeaderError as error:
        kind = _COMPRESSED.get(block[:2])
        what = f"it is compressed with {kind}" if kind else f"it cannot be read: {error}"
        raise UserError(f"archive: {what}; send an uncompressed tar archive (tar cf)") from None


def _wanted(member: tarfile.TarInfo, limits: Mapping[str, int]) -> str | None:
    """The name of a file that is wanted; UserError for what no archive of ours holds."""
    path = PurePosixPath(member.name)
    if member.type == tarfile.DIRTYPE:
        return None
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise UserError(
            f"archive: {member.name[:200]!r} is a link, a device or a sparse file; send plain files"
        )
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"archive: {member.name[:200]!r} leads out of the archive; send relative names")
    return path.name if path.name in limits else None


def _chunks(archive: BinaryIO, left: int) -> Iterator[bytes]:
    while left:
        chunk = archive.read(min(CHUNK, left))
        left -= len(chunk)
        yield chunk


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
