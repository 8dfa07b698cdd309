"""What SQLite does not say about a write-ahead log: how much of it was thrown away when it was opened.

SQLite reads a log up to its last whole transaction and is silent about the rest. The rest is a torn tail, of a commit
that was never acknowledged; or something was acknowledged behind a page that rotted, which must not go unnoticed.
Format: https://www.sqlite.org/fileformat2.html#the_write_ahead_log
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

HEADER, FRAME = 32, 24


@dataclass(frozen=True, slots=True)
class Lost:
    """``words`` is empty if nothing was thrown away; ``rotten`` if it must have been acknowledged once."""

    words: str = ""
    rotten: bool = False


def frames(database: Path) -> list[bool]:
    """The frames in the log beside a database, before it is opened: for each, whether a transaction ends with it."""
    try:
        content = database.with_name(database.name + "-wal").read_bytes()
    except FileNotFoundError:
        return []
    if len(content) < HEADER + FRAME:
        return []
    if not _header_is_whole(content):
        return [True, True]  # every frame hangs on the header, which is synced before the first of them
    step = FRAME + struct.unpack_from(">I", content, 8)[0]
    starts = range(HEADER, len(content) - FRAME + 1, step)
    current = [content[at + 8 : at + 16] == content[16:24] for at in starts]
    if True not in current:
        return []
    last = len(current) - current[::-1].index(
        True
    )  # behind it: frames of the log before, which are done with
    return [struct.unpack_from(">I", content, at + 4)[0] != 0 for at in starts[:last]]


def lost(before: list[bool], whole: int) -> Lost:
    """What opening threw away of the frames that were there, ``whole`` of which SQLite took over."""
    behind = before[max(whole, 0) :]
    if not behind:
        return Lost()
    words = f"{len(behind)} pages of a commit were incomplete"
    # Each commit is synced before the next begins: whatever follows a commit proves that it was acknowledged.
    return Lost(words, rotten=True in behind[:-1])


def _header_is_whole(content: bytes) -> bool:
    magic = struct.unpack_from(">I", content)[0]
    order = ">" if magic & 1 else "<"
    words = struct.unpack_from(f"{order}6I", content)
    one = two = 0
    for first, second in zip(words[::2], words[1::2], strict=True):
        one = (one + first + two) & 0xFFFFFFFF
        two = (two + second + one) & 0xFFFFFFFF
    return (one, two) == struct.unpack_from(">2I", content, 24)
