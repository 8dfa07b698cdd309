"""The journal in one SQLite file: WAL mode with full sync, written by one thread that commits what waits together.

SQLite sees to torn writes and recovery; every row also carries a CRC-32, so that a bit that rotted on disk is found
when it is read. A damaged journal is opened as far as it is whole and takes nothing more: ``<file>.damaged`` names
what was found, and whoever removes that file goes on with what is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import queue
import socket
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from tuft_jupyter.core import wal
from tuft_jupyter.core.errors import Overloaded, ServerError, TuftError
from tuft_jupyter.core.journal import FOLDED, Damaged, Durability, ReadOnly, Sink, Unavailable, hand_over
from tuft_jupyter.core.types import Record

log = logging.getLogger("tuft_jupyter.journal")

_SCHEMA = """
PRAGMA auto_vacuum=INCREMENTAL;
PRAGMA journal_mode=WAL;
PRAGMA synchronous=FULL;
CREATE TABLE IF NOT EXISTS records (
    n INTEGER PRIMARY KEY, kind TEXT NOT NULL, tenant TEXT NOT NULL, time REAL NOT NULL, data TEXT NOT NULL, crc INTEGER
);
CREATE TABLE IF NOT EXISTS blobs (n INTEGER PRIMARY KEY, blob BLOB NOT NULL, crc INTEGER);
CREATE TABLE IF NOT EXISTS image (n INTEGER PRIMARY KEY, data TEXT NOT NULL, crc INTEGER NOT NULL);
"""
"""A crc is NULL in rows of version 0.1, which had none."""

_PASSING = {
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR,
}  # fmt: skip
_UNREADABLE = {sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS}
"""Errors of reading and writing that are about what is on the disk."""

_Job = Callable[[sqlite3.Connection], Any]


@dataclass(frozen=True, slots=True)
class _Line:
    """A record with its data as JSON text, ready to be written."""

    record: Record
    text: str


class SqliteJournal:
    """The journal in ``path``. ``problem`` names what is damaged; then it is read-only."""

    durability = Durability.MACHINE
    address = elsewhere = ""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self.description = f"file {path}: survives a crash of the server, the notebook and the machine"
        self.problem = ""
        self._clock = clock
        self._n = 0
        self._weight = (0, 0)
        self._jobs: queue.SimpleQueue[tuple[_Line | _Job, asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._lock: IO[str] | None = None
        self._thread: threading.Thread | None = None
        self._sink: Sink = lambda record: None

    @property
    def weight(self) -> tuple[int, int]:
        return self._weight

    async def open(self, sink: Sink) -> None:
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.path)
        try:
            db = await asyncio.to_thread(self._connect)
        except (OSError, sqlite3.Error, MemoryError) as error:
            self._lock.close()
            raise Unavailable(
                f"the journal {self.path} cannot be opened now ({error}); it is tried again"
            ) from None
        self._thread = threading.Thread(target=self._write, args=(db,), name="tuft-journal", daemon=True)
        self._thread.start()
        for record in await self._ask(self._read_all):
            sink(record)

    async def append(self, record: Record) -> Record:
        if self.problem:
            raise ReadOnly(f"the journal is read-only: {self.problem}", retry_after=30.0)
        record = replace(record, time=record.time or self._clock())
        text = json.dumps(
            record.data, separators=(",", ":"), allow_nan=False
        )  # here, so that a bad value fails alone
        written: Record = await self._ask(_Line(record, text))
        return written

    async def read(self, n: int) -> Record | None:
        found: Record | None = await self._ask(lambda db: _read_one(db, n))
        return found

    async def drop_blobs(self, numbers: Iterable[int]) -> None:
        keys = [(n,) for n in numbers]
        if keys and not self.problem:
            await self._ask(lambda db: db.executemany("DELETE FROM blobs WHERE n = ?", keys))

    async def compact(self, n: int, image: str, keep: Collection[int]) -> None:
        if self.problem:
            return

        def job(db: sqlite3.Connection) -> None:
            db.execute("CREATE TEMP TABLE IF NOT EXISTS keep (n INTEGER PRIMARY KEY)")
            db.execute("DELETE FROM keep")
            db.executemany("INSERT OR IGNORE INTO keep VALUES (?)", ((number,) for number in keep))
            for table in ("records", "blobs"):
                db.execute(f"DELETE FROM {table} WHERE n <= ? AND n NOT IN (SELECT n FROM keep)", (n,))
            db.execute("DELETE FROM image")
            db.execute("INSERT INTO image VALUES (?, ?, ?)", (n, image, _crc(n, image)))
            (left,) = db.execute(
                "SELECT coalesce(sum(length(data)), 0) FROM records WHERE n > ?", (n,)
            ).fetchone()
            self._weight = (left, len(image))

        await self._ask(job)
        await self._ask(lambda db: db.execute("PRAGMA incremental_vacuum").fetchall())

    async def close(self) -> None:
        if self._thread is not None:
            thread, self._thread = (
                self._thread,
                None,
            )  # from now on nothing is taken that would not be written
            self._jobs.put(None)
            await asyncio.to_thread(thread.join)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _ask(self, job: _Line | _Job) -> asyncio.Future[Any]:
        if self._thread is None:
            raise ServerError("the journal is closed: the server is shutting down")
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._jobs.put((job, answer))
        return answer

    # ---- the writer thread --------------------------------------------------------------------------------------

    def _write(self, db: sqlite3.Connection) -> None:
        """Everything that waits goes into one transaction, one sync, one hop back."""
        closing = False
        while not closing:
            batch = [self._jobs.get()]
            while True:
                try:
                    batch.append(self._jobs.get_nowait())
                except queue.Empty:
                    break
            closing = None in batch
            jobs = [item for item in batch if item is not None]
            if jobs:
                answers = self._commit(db, [job for job, _ in jobs])
                self._loop.call_soon_threadsafe(self._deliver, jobs, answers)
        try:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:  # a full disk; the log keeps what it holds
            log.warning("the journal %s was closed without a checkpoint: %s", self.path, error)
        db.close()

    def _connect(self) -> sqlite3.Connection:
        """The database; where it is damaged, ``problem`` says so, and a journal in memory stands in if it must.

        An error if it cannot be opened now, which says nothing of what it holds.
        """
        damaged = self.path.with_name(self.path.name + ".damaged")
        before = wal.frames(self.path)
        # Made here, and from then on used by the writer thread alone.
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            db.executescript(_SCHEMA)
            for table in ("records", "blobs"):
                if "crc" not in [row[1] for row in db.execute(f"PRAGMA table_info({table})")]:
                    db.execute(f"ALTER TABLE {table} ADD COLUMN crc INTEGER")
            if before:
                (_, whole, _) = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                lost = wal.lost(before, whole)
                if lost.rotten:
                    self._damaged(f"its write-ahead log is damaged behind frame {whole}: {lost.words}")
                elif lost.words:
                    log.warning("the journal %s: %s at its end, never acknowledged", self.path, lost.words)
            check = [row[0] for row in db.execute("PRAGMA quick_check(1)")]
            if check != ["ok"]:
                self._damaged(check[0])
        except sqlite3.DatabaseError as error:
            if _passing(error):
                db.close()
                raise
            self._damaged(str(error))
            if not _readable(db):
                db.close()
                db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
                db.executescript(_SCHEMA)
        if damaged.exists() and not self.problem:
            # It may be empty: the disk was full when it was written.
            self.problem = damaged.read_text(encoding="utf-8") or f"{damaged} says that it was found damaged"
        return db

    def _damaged(self, what: str) -> None:
        """Be read-only from now on, also after a restart."""
        self.problem = (
            f"{self.path} is damaged ({' '.join(what.split())}): nothing is accepted. Put a copy of the file back, or "
            f"remove {self.path.name}.damaged and restart to go on with what is left"
        )
        log.error("%s", self.problem)
        try:
            self.path.with_name(self.path.name + ".damaged").write_text(self.problem, encoding="utf-8")
        except OSError as error:
            log.error("%s.damaged cannot be written: %s", self.path, error)

    def _read_all(self, db: sqlite3.Connection) -> list[Record]:
        """The image and every record after it, as far as they are whole."""
        records: list[Record] = []
        n, tail, size = 0, 0, 0
        try:
            for at, text, crc in db.execute("SELECT n, data, crc FROM image ORDER BY n"):
                if crc != _crc(at, text):
                    raise Damaged(f"the image of the records up to {at}")
                n, size = at, len(text)
                records.append(Record(FOLDED, "", json.loads(text), n=at))
            rows = db.execute(
                "SELECT n, kind, tenant, time, data, crc FROM records WHERE n > ? ORDER BY n", (n,)
            )
            for at, kind, tenant, when, data, crc in rows:
                if at != n + 1:
                    raise Damaged(f"record {n + 1} is missing")
                if crc is not None and crc != _crc(at, kind, tenant, when, data):
                    raise Damaged(f"record {at}, {kind}")
                records.append(Record(kind, tenant, json.loads(data), when, at))
                n, tail = at, tail + len(data)
        except Damaged as damage:
            self._damaged(damage.message)
        except (sqlite3.DatabaseError, ValueError, TypeError, OverflowError) as error:
            self._damaged(f"record {n + 1} cannot be read: {error}")
        self._n, self._weight = n, (tail, size)
        return records

    def _commit(self, db: sqlite3.Connection, jobs: Sequence[_Line | _Job]) -> list[Any]:
        answers: list[Any] = []
        count = added = 0
        try:
            db.execute("BEGIN IMMEDIATE")
            for job in jobs:
                if isinstance(job, _Line):
                    count, added = count + 1, added + len(job.text)
                    n = self._n + count
                    _insert(db, n, job)
                    answers.append(replace(job.record, n=n, blob=None))
                else:
                    answers.append(_try(job, db))
            db.execute("COMMIT")
        except Exception as error:  # whatever it is (MemoryError is one): who waits must hear of it
            if not isinstance(error, sqlite3.Error):
                log.exception("the journal %s could not be written", self.path)
            with contextlib.suppress(
                sqlite3.Error, MemoryError
            ):  # then the next BEGIN fails, and rolls it back
                if db.in_transaction:
                    db.execute("ROLLBACK")
            reason = Overloaded(
                f"the journal {self.path} cannot be written ({error}): the request was not accepted; "
                "free disk space, then try again",
                retry_after=2.0,
            )
            return [reason for _ in jobs]
        self._n, self._weight = self._n + count, (self._weight[0] + added, self._weight[1])
        return answers

    def _deliver(
        self, jobs: Sequence[tuple[_Line | _Job, asyncio.Future[Any]]], answers: Sequence[Any]
    ) -> None:
        for (job, future), answer in zip(jobs, answers, strict=True):
            failed = isinstance(answer, Exception)
            if isinstance(job, _Line) and not failed:
                hand_over(self._sink, answer, future)
            elif future.done():
                continue  # the one who asked went away
            elif failed:
                future.set_exception(answer)
            else:
                future.set_result(answer)


def _try(job: _Job, db: sqlite3.Connection) -> Any:
    try:
        return job(db)
    except TuftError as error:
        return error


def _passing(error: sqlite3.Error) -> bool:
    """Whether an error is about the moment (no space, no memory, no access, in use) and not about what was written."""
    code = getattr(error, "sqlite_errorcode", 0)
    return code not in _UNREADABLE and code & 0xFF in _PASSING


def _readable(db: sqlite3.Connection) -> bool:
    try:
        db.execute("SELECT count(*) FROM records, image").fetchone()
    except sqlite3.DatabaseError:
        return False
    return True


def _insert(db: sqlite3.Connection, n: int, line: _Line) -> None:
    r = line.record
    row = (n, r.kind, r.tenant, r.time, line.text, _crc(n, r.kind, r.tenant, r.time, line.text))
    db.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?)", row)
    if r.blob is not None:
        db.execute("INSERT INTO blobs VALUES (?, ?, ?)", (n, r.blob, zlib.crc32(r.blob, n)))


def _crc(*values: object) -> int:
    return zlib.crc32("\0".join(map(str, values)).encode())


def _read_one(db: sqlite3.Connection, n: int) -> Record | None:
    try:
        row = db.execute(
            "SELECT kind, tenant, time, data, records.crc, blob, blobs.crc FROM records LEFT JOIN blobs USING (n) "
            "WHERE n = ?",
            (n,),
        ).fetchone()
    except sqlite3.DatabaseError as error:
        raise Damaged(f"record {n} of the journal cannot be read: {error}") from None
    if row is None:
        return None
    kind, tenant, at, data, crc, blob, blob_crc = row
    if crc is not None and crc != _crc(n, kind, tenant, at, data):
        raise Damaged(f"record {n} of the journal is damaged on disk")
    record = Record(kind, tenant, json.loads(data), at, n, blob)
    if blob is not None and blob_crc is not None and blob_crc != zlib.crc32(blob, n):
        raise Damaged(f"the body of record {n} of the journal is damaged on disk", replace(record, blob=None))
    return record


def _take_lock(path: Path) -> IO[str]:
    """Hold ``<path>.lock`` for the life of the process; the kernel lets it go however the process ends."""
    lock = path.with_name(path.name + ".lock").open("a+")  # held open on purpose
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not isinstance(error, BlockingIOError | PermissionError):
            lock.close()  # a network file system without locks, say
            raise Unavailable(
                f"the journal {path} cannot be locked ({error.strerror}): choose a file on another file system "
                "(persistence.file_path), or another TUFT_HOME"
            ) from None
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise Unavailable(
            f"the journal {path} is in use by {holder}: stop that server, connect to it, or choose another "
            "file (persistence.file_path) or TUFT_HOME"
        ) from None
    with contextlib.suppress(OSError):  # a full disk: then nobody can say who holds it
        os.truncate(lock.fileno(), 0)
        os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    return lock
