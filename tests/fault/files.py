"""Files that were torn, rotted or had no room: the SQLite journal as a crash, a bad disk and a full one leave it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from tests.fault.bench import Fault, Trial
from tests.support.world import ALICE, SnapshotRule, World, world
from tuft_jupyter.core.errors import Overloaded, TuftError
from tuft_jupyter.core.journal_sqlite import SqliteJournal
from tuft_jupyter.core.types import CheckpointKind, Record

RECORDS = 12
NAME = "journal.sqlite"


def line(i: int) -> Record:
    return Record(
        "kind", "alice", {"i": i, "text": "x" * (i * 97 % 700)}, time=1.0 + i, blob=bytes([i]) * (i * 211)
    )


async def read(path: Path) -> tuple[list[int], str]:
    """The records of a journal, checked against what was written; and what is wrong with it, in its own words."""
    journal = SqliteJournal(path)
    told: list[Record] = []
    await journal.open(told.append)
    try:
        for record in told:
            i = record.data["i"]
            assert (record.kind, record.data, record.time) == ("kind", line(i).data, 1.0 + i), record
            with contextlib.suppress(TuftError):  # it says that it is damaged
                found = await journal.read(record.n)
                assert found is None or found.blob == line(i).blob, (
                    f"another body than was written for {record.n}"
                )
        found_numbers = [record.data["i"] for record in told]
        if journal.problem:
            with contextlib.suppress(Overloaded):
                await journal.append(line(0))
                raise AssertionError("a damaged journal was written on")
        else:
            assert (await journal.append(line(RECORDS))).n == len(found_numbers) + 1
        return found_numbers, journal.problem
    finally:
        await journal.close()


@contextlib.contextmanager
def written(home: Path) -> Iterator[Path]:
    """A directory with a journal in the state of a crash: nothing was closed, everything is in the log."""
    live, crashed = home / "live", home / "crashed"
    live.mkdir()

    async def write() -> None:
        journal = SqliteJournal(live / NAME)
        await journal.open(lambda record: None)
        for i in range(RECORDS):
            await journal.append(line(i))
        shutil.copytree(live, crashed)
        await journal.close()

    asyncio.run(write())
    yield crashed


def damaged(crashed: Path, target: Path, name: str, change: Callable[[bytearray], object]) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(crashed, target)
    content = bytearray((target / name).read_bytes())
    change(content)
    (target / name).write_bytes(content)
    return target / NAME


def commits(log: bytes) -> list[int]:
    """Where each transaction of a write-ahead log ends, in bytes."""
    step = 24 + int.from_bytes(log[8:12], "big")
    return [at + step for at in range(32, len(log), step) if any(log[at + 4 : at + 8])]


@contextlib.contextmanager
def torn(home: Path) -> Iterator[Trial]:
    with written(home) as crashed:
        log = (crashed / f"{NAME}-wal").read_bytes()
        before, end = commits(log)[-2:]

        def trial(rng: Random) -> str:
            at = rng.randrange(before, end)

            def tear(content: bytearray) -> None:
                if rng.random() < 0.5:
                    del content[at:]
                else:
                    content[at:] = rng.randbytes(len(content) - at)

            told, problem = asyncio.run(read(damaged(crashed, home / "torn", f"{NAME}-wal", tear)))
            assert told in (list(range(RECORDS - 1)), list(range(RECORDS))), told
            assert not problem, problem
            return ""

        yield trial


@contextlib.contextmanager
def rotten(home: Path) -> Iterator[Trial]:
    with written(home) as crashed:
        closed = home / "closed"
        shutil.copytree(crashed, closed)
        asyncio.run(read(closed / NAME))
        log = (crashed / f"{NAME}-wal").read_bytes()
        synced = commits(log)[-2]

        def trial(rng: Random) -> str:
            source, name, size = rng.choice(
                [(crashed, f"{NAME}-wal", synced), (closed, NAME, (closed / NAME).stat().st_size)]
            )
            at, bit = rng.randrange(size), 1 << rng.randrange(8)

            def rot(content: bytearray) -> None:
                content[at] ^= bit

            path = damaged(source, home / "rotten", name, rot)
            whole = list(range(RECORDS + (source is closed)))
            told, problem = asyncio.run(read(path))
            assert told == whole[: len(told)], told
            assert problem or told == whole, (
                f"{len(told)} records and not a word: bit {bit} of byte {at} of {name}"
            )
            if problem:
                again, still = asyncio.run(read(path))
                assert (again, still) == (told, problem), "a restart forgot the damage"
            return ""

        yield trial


# ---- a full disk ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full(home: Path) -> Iterator[Trial]:
    """A small file system of its own, filled up at a random moment."""
    disk = home / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)

    def trial(rng: Random) -> str:
        shutil.rmtree(disk / "home", ignore_errors=True)
        (disk / "home").mkdir()
        asyncio.run(asyncio.wait_for(_fill_up(disk / "home", rng, home / "copy"), 60))
        return ""

    try:
        yield trial
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


async def _fill_up(home: Path, rng: Random, copy: Path) -> None:
    filler = home / "filler"
    acknowledged: list[str] = []
    async with world(home, journal=SqliteJournal(home / NAME), rule=SnapshotRule(3, 1e9)) as w:
        run = await w.connect()
        await w.train(run, rng.randrange(1, 5))
        _occupy(filler, rng.randrange(1, 12) * 4096)
        refused = await _until_refused(w, run, rng, acknowledged)
        assert "full" in refused, refused
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(home, copy)
        await _check_a_crash_now(copy, acknowledged)
        assert all((each / "run.json").is_file() for each in (home / "snapshots").glob("*/*"))
        filler.unlink()
        await w.train(run, 3)  # without a restart
        for request_id in acknowledged:
            assert not (await w.answer(request_id)).category or "space" in (await w.answer(request_id)).error
        trained = list(w.trained)
        assert len(trained) == len(set(trained) - {"step"}) + trained.count("step"), "applied twice"
        state = w.service.state.runs[run]
        assert trained.count("step") == state.step


async def _until_refused(w: World, run: str, rng: Random, acknowledged: list[str]) -> str:
    for i in range(400):
        try:
            kind = rng.random()
            if kind < 0.6:
                acknowledged.append(await w.forward_backward(run, text=f"{'y' * rng.randrange(3000)}:8"))
            elif kind < 0.9:
                acknowledged.append(await w.optim_step(run))
            else:
                w.seq += 1
                training = CheckpointKind.TRAINING
                saved = w.service.runs.save_weights(ALICE, run, w.seq, f"c{i}", training, b"save %d" % i)
                acknowledged.append(await saved)
        except Overloaded as full:
            return full.message
        await asyncio.sleep(0)
    return "never refused"


async def _check_a_crash_now(copy: Path, acknowledged: list[str]) -> None:
    """Whatever was acknowledged while the disk filled up is in the file."""
    (copy / "filler").unlink()
    known = set()
    journal = SqliteJournal(copy / NAME)
    await journal.open(lambda record: known.add(record.data.get("request_id")))
    await journal.close()
    assert not set(acknowledged) - known


def _occupy(filler: Path, leave: int) -> None:
    """Leave that many bytes of the file system free."""
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(b"\0" * 4096)
            file.flush()
    size = filler.stat().st_size
    os.truncate(filler, max(0, size - leave))


# ---- kill -9 while it writes -------------------------------------------------------------------------------------

WRITER = """
import asyncio, sys
from pathlib import Path
from tuft_jupyter.core.journal_sqlite import SqliteJournal
from tuft_jupyter.core.types import Record
async def main():
    journal = SqliteJournal(Path(sys.argv[1]))
    await journal.open(lambda record: None)
    while True:
        record = await journal.append(Record("k", "t", {"i": 1}, blob=bytes(3000)))
        print(record.n, flush=True)
        if record.n % 40 == 0:
            await journal.compact(record.n - 5, '{"image": 1}', [record.n - 6])
asyncio.run(main())
"""


@contextlib.contextmanager
def killed_writers(home: Path) -> Iterator[Trial]:
    path = home / NAME

    def trial(rng: Random) -> str:
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            for _ in range(rng.randrange(1, 100)):
                writer.stdout.readline()
            writer.kill()
            last = int((writer.stdout.read().split() or ["0"])[-1])
        told: list[int] = []

        async def look() -> str:
            journal = SqliteJournal(path)
            await journal.open(lambda record: told.append(record.n))
            await journal.close()
            return journal.problem

        assert asyncio.run(look()) == ""
        assert told[-1] >= last
        db = sqlite3.connect(path)
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        db.close()
        return ""

    yield trial


FAULTS = [
    Fault("F4", "the tail of the log torn off or overwritten, at any byte", "recovers to the last whole record", torn),
    Fault("F5", "one bit flipped, anywhere in file or log", "all is there, or it is read-only and says why", rotten),
    Fault("F6", "disk full (tmpfs) mid-append, mid-snapshot, mid-checkpoint",
          "nothing acknowledged is missing; goes on when there is room, without a restart", full),
    Fault("S1-53", "kill -9 of a process that writes the file", "the file is whole, with every acknowledged record",
          killed_writers),
]  # fmt: skip
