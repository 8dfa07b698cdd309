"""Archives from strangers: what is wanted comes out whole, and nothing hostile gets anywhere."""

from __future__ import annotations

import contextlib
import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tuft_jupyter.core.errors import UserError
from tuft_jupyter.wire import archive, unpack

LIMITS = {"a.json": 100, "b.bin": 10_000}
A, B = b'{"r": 8}', bytes(range(256)) * 9


def tar(*members: tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive of these members; a regular file holds A, or zeros where another size is set."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as writer:
        for member in members:
            content = A if member.size == len(A) else bytes(member.size)
            writer.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return file.getvalue()


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int | None = None
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = (len(A) if kind == tarfile.REGTYPE else 0) if size is None else size
    return info


def read(content: bytes) -> dict[str, bytes]:
    return {name: b"".join(chunks) for name, chunks in unpack.files(io.BytesIO(content), LIMITS)}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./", "my-adapter/"])
def test_the_wanted_files_come_out_of_any_plain_archive(tmp_path: Path, prefix: str, form: int) -> None:
    (tmp_path / "a.json").write_bytes(A)
    (tmp_path / "b.bin").write_bytes(B)
    (tmp_path / "README.md").write_text("not wanted")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as writer:
        writer.add(tmp_path, prefix or ".")
        names = [info.name for info in writer.getmembers()]
    assert len(names) == 4
    assert read(file.getvalue()) == {"a.json": A, "b.bin": B}


def test_what_this_server_sends_it_takes_back(tmp_path: Path) -> None:
    import asyncio

    async def sent() -> bytes:
        for name, content in zip(archive.ADAPTER, (A, B), strict=True):
            (tmp_path / name).write_bytes(content)
        stream = await archive.tar(tmp_path, archive.ADAPTER, 0.0)
        return b"".join([chunk async for chunk in stream.chunks])

    wanted = dict.fromkeys(archive.ADAPTER, 10_000)
    content = io.BytesIO(asyncio.run(sent()))
    assert {name: b"".join(chunks) for name, chunks in unpack.files(content, wanted)} == dict(
        zip(archive.ADAPTER, (A, B), strict=True)
    )


HOSTILE = {
    "symlink": (tar(member("a.json", tarfile.SYMTYPE, "/etc/passwd")), "a.json.*link"),
    "hardlink": (tar(member("a.json", tarfile.LNKTYPE, "/etc/shadow")), "a.json.*link"),
    "device": (tar(member("b.bin", tarfile.CHRTYPE)), "b.bin.*device"),
    "pipe": (tar(member("b.bin", tarfile.FIFOTYPE)), "b.bin.*device"),
    "unwanted link": (tar(member("x", tarfile.SYMTYPE, "a.json")), "'x'.*link"),
    "absolute": (tar(member("/etc/cron.d/a.json")), "leads out"),
    "climbing": (tar(member("../../a.json")), "leads out"),
    "climbing inside": (tar(member("x/../../a.json")), "leads out"),
    "twice": (tar(member("a.json"), member("b/a.json")), "a.json is in it twice"),
    "too large": (tar(member("a.json", size=101)), "101 bytes; the limit is 100"),
    "too many": (tar(*[member(f"f{i}", size=0) for i in range(unpack.MEMBERS + 1)]), "more than 1000"),
    "long metadata": (tar(member("x" * 2**17)), "metadata of"),
    "cut": (tar(member("b.bin", size=5000))[:2048], "more than were sent"),
    "cut at a header": (tar(member("b.bin", size=512))[:1024], "breaks off"),
    "compressed": (gzip.compress(tar(member("a.json"))), "compressed with gzip"),
    "noise": (bytes(range(256)) * 8, "cannot be read"),
    "nothing": (b"", "breaks off"),
}


def sparse() -> bytes:
    content = bytearray(tar(member("b.bin", size=512), form=tarfile.GNU_FORMAT))
    content[156:157] = tarfile.GNUTYPE_SPARSE
    return checked(content)


def negative() -> bytes:
    content = bytearray(tar(member("b.bin", size=512), form=tarfile.GNU_FORMAT))
    content[124:136] = b"\xff" * 11 + b"\x00"  # base 256: -256
    return checked(content)


def huge() -> bytes:
    content = bytearray(tar(member("b.bin", size=512), form=tarfile.GNU_FORMAT))
    content[124:136] = b"\x80" + b"\x00" * 4 + b"\x7f" * 7
    return checked(content)


def checked(content: bytearray) -> bytes:
    """With the right checksum of its first header."""
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    return bytes(content)


LYING: dict[str, Callable[[], bytes]] = {"sparse": sparse, "negative size": negative, "huge size": huge}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_archive_is_refused_by_name(name: str) -> None:
    """H7: links, devices, absolute and climbing names, lying sizes; nothing is ever extracted."""
    content, said = HOSTILE[name]
    with pytest.raises(UserError, match=said):
        read(content)


@pytest.mark.parametrize("name", list(LYING))
def test_a_header_that_lies_is_refused(name: str) -> None:
    """H7."""
    with pytest.raises(UserError, match=r"archive: 'b\.bin' (is a link|claims)"):
        read(LYING[name]())


def test_every_archive_cut_short_or_changed_in_one_byte_is_read_or_refused() -> None:
    """H7: whatever comes, an answer or a refusal, never another exception."""
    whole = tar(member("a.json"), member("d", tarfile.DIRTYPE), member("b.bin", size=600))
    for i in range(0, len(whole), 7):
        for content in (whole[:i], whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :]):
            with contextlib.suppress(UserError):
                assert all(len(found) <= LIMITS[name] for name, found in read(content).items())
