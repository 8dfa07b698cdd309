"""The journal of operations: the only truth, kept in memory or in one SQLite file.

A journal numbers records, makes them durable, and then hands each to ``sink`` on the event loop, in order and before
the ``append`` that wrote it returns. It knows nothing of what the records mean. Promises: a record whose ``append``
returned survives the death of the process (SQLite: also of the machine, WAL with full sync); appends that wait
together share one commit; an append that failed left nothing behind; two processes never write one file.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import queue
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

from tuft_jupyter.core.errors import Overloaded, ServerError
from tuft_jupyter.core.types import Record

Sink = Callable[[Record], None]


class Journal(Protocol):
    """Where records go. ``description`` says in words what survives what."""

    description: str

    async def open(self, sink: Sink) -> None:
        """Take the journal over and hand every record it holds to ``sink`` (without blobs), oldest first."""

    async def append(self, record: Record) -> Record:
        """Number and keep a record; returns it once ``sink`` saw it (without blob). Overloaded if it cannot be kept."""

    async def read(self, n: int) -> Record | None:
        """Record ``n`` with its blob (None where it had none or it was dropped)."""

    async def drop_blobs(self, numbers: Iterable[int]) -> None:
        """Forget blobs that no replay and no client needs any more."""

    async def close(self) -> None: ...


class MemoryJournal:
    """Keeps everything in this process; all is lost when it ends (``persistence: disabled``)."""

    description = "in memory only: everything is lost when the server stops"

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._n = 0
        self._records: dict[int, Record] = {}
        self._sink: Sink = lambda record: None

    async def open(self, sink: Sink) -> None:
        self._sink = sink

    async def append(self, record: Record) -> Record:
        self._n += 1
        numbered = replace(record, n=self._n, time=record.time or self._clock())
        if record.blob is not None:
            self._records[self._n] = numbered
        self._sink(replace(numbered, blob=None))
        return numbered

    async def read(self, n: int) -> Record | None:
        return self._records.get(n)

    async def drop_blobs(self, numbers: Iterable[int]) -> None:
        for n in numbers:
            self._records.pop(n, None)

    async def close(self) -> None:
        self._records.clear()


_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    n INTEGER PRIMARY KEY, kind TEXT NOT NULL, tenant TEXT NOT NULL, time REAL NOT NULL, data TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS blobs (n INTEGER PRIMARY KEY, blob BLOB NOT NULL);
"""

_Job = Callable[[sqlite3.Connection], Any]


@dataclass(frozen=True, slots=True)
class _Line:
    """A record with its data as JSON text, ready to be written."""

    record: Record
    text: str


class SqliteJournal:
    """One SQLite file in WAL mode with full sync, written by one thread that commits whatever waits together."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self.description = f"file {path}: survives a crash of the server, the notebook and the machine"
        self._clock = clock
        self._n = 0
        self._jobs: queue.SimpleQueue[tuple[_Line | _Job, asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._lock: IO[str] | None = None
        self._thread: threading.Thread | None = None
        self._sink: Sink = lambda record: None

    async def open(self, sink: Sink) -> None:
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.path)
        self._thread = threading.Thread(target=self._write, name="tuft-journal", daemon=True)
        self._thread.start()
        for record in await self._ask(_read_all):
            sink(record)
            self._n = record.n

    async def append(self, record: Record) -> Record:
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
        if keys:
            await self._ask(lambda db: db.executemany("DELETE FROM blobs WHERE n = ?", keys))

    async def close(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join)
            self._thread = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _ask(self, job: _Line | _Job) -> asyncio.Future[Any]:
        if self._thread is None:
            raise ServerError("the journal is closed: the server is shutting down")
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._jobs.put((job, answer))
        return answer

    def _write(self) -> None:
        """The writer thread: everything that waits goes into one transaction, one sync, one hop back."""
        db = sqlite3.connect(self.path, isolation_level=None)
        db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;" + _SCHEMA)
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
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.close()

    def _commit(self, db: sqlite3.Connection, jobs: Sequence[_Line | _Job]) -> list[Any]:
        answers: list[Any] = []
        n = self._n
        try:
            db.execute("BEGIN IMMEDIATE")
            for job in jobs:
                if isinstance(job, _Line):
                    n += 1
                    _insert(db, n, job)
                    answers.append(replace(job.record, n=n, blob=None))
                else:
                    answers.append(job(db))
            db.execute("COMMIT")
        except sqlite3.Error as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            reason = Overloaded(
                f"the journal {self.path} cannot be written ({error}): the request was not accepted; "
                "free disk space, then try again",
                retry_after=2.0,
            )
            return [reason for _ in jobs]
        self._n = n
        return answers

    def _deliver(
        self, jobs: Sequence[tuple[_Line | _Job, asyncio.Future[Any]]], answers: Sequence[Any]
    ) -> None:
        for (job, future), answer in zip(jobs, answers, strict=True):
            failed = isinstance(answer, Exception)
            if isinstance(job, _Line) and not failed:
                self._sink(answer)
            if future.done():  # the one who asked went away; what was written stays written
                continue
            if failed:
                future.set_exception(answer)
            else:
                future.set_result(answer)


def _insert(db: sqlite3.Connection, n: int, line: _Line) -> None:
    record = line.record
    row = (n, record.kind, record.tenant, record.time, line.text)
    db.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?)", row)
    if record.blob is not None:
        db.execute("INSERT INTO blobs VALUES (?, ?)", (n, record.blob))


def _read_all(db: sqlite3.Connection) -> list[Record]:
    rows = db.execute("SELECT n, kind, tenant, time, data FROM records ORDER BY n")
    return [Record(kind, tenant, json.loads(data), at, n) for n, kind, tenant, at, data in rows]


def _read_one(db: sqlite3.Connection, n: int) -> Record | None:
    row = db.execute(
        "SELECT kind, tenant, data, time, blob FROM records LEFT JOIN blobs USING (n) WHERE n = ?", (n,)
    ).fetchone()
    if row is None:
        return None
    kind, tenant, data, at, blob = row
    return Record(kind, tenant, json.loads(data), at, n, blob)


def _take_lock(path: Path) -> IO[str]:
    """Hold ``<path>.lock`` for the life of the process; the kernel lets it go however the process ends."""
    lock = path.with_name(path.name + ".lock").open("a+")  # held open on purpose
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise ServerError(
            f"the journal {path} is in use by {holder}: stop that server, connect to it, or choose another "
            "file (persistence.file_path) or TUFT_HOME"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock
