"""The journal in a Redis server: a stream of records, written by the one server that holds the namespace's lease.

Every write is one Lua script, so it happens whole or not at all. It checks that the namespace is the one that was
opened, that the writer's epoch is the newest one (a fencing token: whoever takes the lease over raises it, so a server
that was asleep meanwhile is refused), and that nothing was written since. A write whose answer did not come is undone
before the next one, under a new epoch, so that it cannot land late either.

Keys are ``{namespace}::{type}::{id}``; ``::`` inside an id is written ``__SEP__``:

=====================  =================================================================================
``journal::meta``      hash: ``id`` of this journal, ``epoch`` of the writer, ``n`` of the last record
``journal::records``   stream: entry ``n-0`` is record n, without its blob
``journal::image``     what stands for the records that were compacted away
``journal::ops``       sorted set: numbers of the ops whose bodies are kept
``lease::journal``     who writes, and at which address it answers; expires when the writer falls silent
``op::n``              record n with the body of its op, until no replay needs it
``future::n``          record n with the result of its op, for ``future_ttl_seconds``
=====================  =================================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tuft_jupyter.core import lease
from tuft_jupyter.core.errors import Overloaded, ServerError
from tuft_jupyter.core.journal import FOLDED, Durability, ReadOnly, Sink, Unavailable, hand_over
from tuft_jupyter.core.redis_scripts import ACQUIRE, APPEND, COMPACT, DROP, RELEASE, RENEW
from tuft_jupyter.core.types import Record

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger("tuft_jupyter.journal")

LEASE_SECONDS = 5.0
"""How long a writer may be silent before another server takes the namespace over."""
PATIENCE = 2.0
"""Seconds that Redis may take for one answer."""
PAGE = 1000
NO_CLIENT = (
    "persistence.mode redis_url needs the Redis client, which is not installed here: run "
    'pip install "tuft-jupyter[persistence]" in the server\'s environment and restart, or choose file_redis'
)

_Waiting = tuple[Record, str, "asyncio.Future[Record]"]


class RedisJournal:
    """The journal of ``namespace`` at ``url``. ``markers`` is a directory on this machine that remembers namespaces.

    ``future_ttl`` is how long a result is kept, in seconds (None: for ever).
    """

    def __init__(
        self,
        url: str,
        namespace: str,
        markers: Path,
        future_ttl: int | None = 86400,
        clock: Callable[[], float] = time.time,
    ) -> None:
        parts = urlsplit(url)
        # without the password
        self.place = f"{parts.hostname or 'localhost'}:{parts.port or 6379}{parts.path}"
        self.description = f"Redis {self.place}, namespace {namespace}"
        self.durability = Durability.PROCESS
        self.problem = ""
        self.namespace = namespace
        self.address = self.elsewhere = ""
        self.holder = f"process {os.getpid()} on {socket.gethostname()}"
        self._url = url
        self._marker = markers / f"{uuid.uuid5(uuid.NAMESPACE_URL, f'{self.place}#{namespace}')}.json"
        self._ttl = future_ttl
        self._clock = clock
        self._token = ""
        self._id = ""
        self._epoch = 0
        self._n = self._imaged = 0
        self._weight = (0, 0)
        self._uncertain = False
        self._waiting: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._writing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._redis: Redis | None = None
        self._sink: Sink = lambda record: None

    @property
    def weight(self) -> tuple[int, int]:
        return self._weight

    def key(self, kind: str, name: str) -> str:
        """The name of a key in Redis."""
        return "::".join([self.namespace, kind, name.replace("::", "__SEP__")])

    # ---- life ---------------------------------------------------------------------------------------------------

    async def open(self, sink: Sink) -> None:
        self._sink = sink
        self._token = lease.token(self.holder, self.address)
        self._redis = _client(self._url)
        try:
            await self._acquire()
            self._remember()
            await self._look_at_durability()
            await self._tell_everything(sink)
        except BaseException:
            with contextlib.suppress(Overloaded):
                await self._run(RELEASE, self._token)
            await self._redis.aclose()
            self._redis = None
            raise
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._write()), loop.create_task(self._renew())]

    async def close(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _, _, written in self._waiting:
            if not written.done():
                written.set_exception(ServerError("the journal is closed: the server is shutting down"))
        if self._redis is not None:
            with contextlib.suppress(Overloaded):
                await self._run(RELEASE, self._token)
            await self._redis.aclose()
            self._redis = None

    async def _acquire(self) -> None:
        known = json.loads(self._marker.read_text()) if self._marker.is_file() else {}
        wanted = int(LEASE_SECONDS * 1000), known.get("id", ""), uuid.uuid4().hex
        try:
            answer = await self._run(ACQUIRE, self._token, *wanted)
        except Overloaded as silent:
            reason = silent.__cause__ or silent
            raise Unavailable(
                f"Redis {self.place}, which keeps the journal, does not answer ({type(reason).__name__}: {reason}): "
                "start it, or correct persistence.redis_url"
            ) from None
        where = f"the namespace {self.namespace!r}"
        self.elsewhere = self._other(answer[1]) if answer[0] == b"HELD" else ""
        if answer[0] == b"HELD":
            raise Unavailable(
                f"{where} in Redis {self.place} is written by {lease.holder_of(answer[1])}: connect to that server, "
                "stop it, or choose another persistence.namespace; this one takes over when it is gone"
            )
        if answer[0] == b"VANISHED":
            raise Unavailable(
                f"{where} vanished from Redis {self.place}: this machine knows it since {known['since']}, and it is "
                "empty or another one now. Bring Redis's data back; or, to begin anew without what it held, remove "
                f"{self._marker}"
            )
        self._epoch, self._id, self._n = int(answer[1]), answer[2].decode(), int(answer[3])
        self._imaged, self._uncertain, self.problem = 0, False, ""

    def _remember(self) -> None:
        """Leave a mark on this machine, so that an empty Redis is not taken for a new one."""
        if not self._marker.is_file():
            self._marker.parent.mkdir(parents=True, exist_ok=True)
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._clock()))
            told = {"id": self._id, "redis": self.place, "namespace": self.namespace, "since": since}
            fresh = self._marker.with_suffix(".new")  # an empty mark would end every start
            fresh.write_text(json.dumps(told, indent=2))
            fresh.replace(self._marker)

    async def _look_at_durability(self) -> None:
        """Say how much of what Redis acknowledges it would still have after a crash of its machine."""
        self.durability = Durability.PROCESS
        try:
            told: Any = await self._call(self._ask().config_get("append*", "save", "maxmemory*"))
        except Overloaded:  # hosted servers often refuse the question
            weakness = "it does not say how it keeps its data on disk"
        else:
            evicts = told.get("maxmemory-policy", "")
            if evicts.startswith("allkeys") and told.get("maxmemory") != "0":
                weakness = f"it throws records away when it is full (its maxmemory-policy is {evicts}, not noeviction)"
            elif told.get("appendonly") == "yes" and told.get("appendfsync") == "always":
                self.durability = Durability.MACHINE
                weakness = ""
            elif told.get("appendonly") == "yes" and told.get("appendfsync") == "everysec":
                weakness = "a crash of its machine may lose the last second (its appendfsync is everysec, not always)"
            elif told.get("appendonly") == "yes":
                weakness = (
                    "a crash of its machine may lose the last half minute (its appendfsync is no, not always)"
                )
            elif told.get("save"):
                weakness = "a crash of Redis loses everything since its last dump (its appendonly is no)"
            else:
                weakness = "a restart of Redis loses everything (its appendonly is no, and it makes no dumps)"
        place = f"Redis {self.place}, namespace {self.namespace}"
        if weakness:
            self.description = f"{place}: survives a crash of the server and the notebook, but {weakness}"
            log.warning("the journal is in %s", self.description)
        else:
            self.description = f"{place}: survives a crash of the server, the notebook and the machine"

    async def _tell_everything(self, sink: Sink) -> None:
        last = size = tail = 0
        image: Any = await self._call(self._ask().get(self.key("journal", "image")))
        if image is not None:
            told = json.loads(image)
            self._imaged = last = told["n"]
            size = len(image)
            sink(Record(FOLDED, "", told["data"], n=last))
        while True:
            page: Any = await self._call(
                self._ask().xrange(self.key("journal", "records"), min=f"{last + 1}-0", count=PAGE)
            )
            for at, fields in page:
                n = int(at.partition(b"-")[0])
                if n != last + 1:
                    raise ServerError(f"the journal in {self.description} lacks record {last + 1}")
                sink(_record(n, fields))
                last, tail = n, tail + len(fields[b"data"])
            if len(page) < PAGE:
                break
        if last != self._n:
            raise ServerError(f"the journal in {self.description} ends at record {last}, not {self._n}")
        self._weight = (tail, size)

    # ---- records ------------------------------------------------------------------------------------------------

    async def append(self, record: Record) -> Record:
        if self.problem:
            raise ReadOnly(self.problem, retry_after=30.0)
        if not self._tasks:
            raise ServerError("the journal is closed: the server is shutting down")
        record = replace(record, time=record.time or self._clock())
        text = json.dumps(record.data, separators=(",", ":"), allow_nan=False)  # a bad value fails alone
        written: asyncio.Future[Record] = asyncio.get_running_loop().create_future()
        self._waiting.append((record, text, written))
        self._arrived.set()
        return await written

    async def read(self, n: int) -> Record | None:
        found: Any = await self._call(self._ask().mget(self.key("op", str(n)), self.key("future", str(n))))
        for value in found:
            if value is not None:
                head, _, blob = value.partition(b"\n")
                told = json.loads(head)
                return Record(told["kind"], told["tenant"], told["data"], told["time"], n, blob)
        return None

    async def drop_blobs(self, numbers: Iterable[int]) -> None:
        gone = [str(n) for n in numbers]
        if gone and not self.problem:
            async with self._writing:
                await self._change(DROP, *gone)

    async def compact(self, n: int, image: str, keep: Collection[int]) -> None:
        if self.problem:
            return
        async with self._writing:
            text = f'{{"n":{n},"data":{image}}}'
            await self._change(COMPACT, n, text, *keep)
            share = (self._n - n) / max(1, self._n - self._imaged)  # of the records since the last image
            self._weight, self._imaged = (round(self._weight[0] * share), len(text)), n

    # ---- writing ------------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        """Everything that waits goes into one script, whose answer settles it all."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            async with self._writing:
                batch, self._waiting = self._waiting, []
                if batch:
                    await self._commit(batch)

    async def _commit(self, batch: Sequence[_Waiting]) -> None:
        try:
            arguments: list[Any] = []
            for record, text, _ in batch:
                kept = "" if record.blob is None else "future" if record.kind == "op_done" else "op"
                arguments += [record.kind, record.tenant, repr(record.time), text, kept, record.blob or b""]
            await self._change(APPEND, self._n, -1 if self._ttl is None else self._ttl, *arguments)
        except asyncio.CancelledError:
            self._waiting[:0] = batch  # whoever closes the journal tells them
            raise
        except Overloaded as reason:
            for _, _, written in batch:
                if not written.done():
                    written.set_exception(Overloaded(reason.message, reason.retry_after))
            return
        for record, text, written in batch:
            self._n += 1
            self._weight = (self._weight[0] + len(text), self._weight[1])
            hand_over(self._sink, replace(record, n=self._n, blob=None), written)

    async def _change(self, script: str, *arguments: Any) -> None:
        """Run a script that changes the journal, once it is certain that none before it can land any more."""
        if self._uncertain:
            await self._undo()
        self._uncertain = True
        answer = await self._run(script, self._id, self._epoch, *arguments)
        self._uncertain = False
        self._check(answer)

    async def _undo(self) -> None:
        """Take back what a write may have done whose answer did not come; nobody was told that it was done."""
        ms = int(LEASE_SECONDS * 1000)
        answer = await self._run(RENEW, self._id, self._epoch, self._token, ms, self._n)
        self._check(answer)
        self._epoch, self._uncertain = int(answer[1]), False

    async def _renew(self) -> None:
        """Keep the lease while we live, and notice when somebody else has it."""
        while not self.problem:
            await asyncio.sleep(LEASE_SECONDS / 3)
            with contextlib.suppress(Overloaded):
                async with self._writing:
                    if self._uncertain:
                        await self._undo()
                        continue
                    ms = int(LEASE_SECONDS * 1000)
                    self._check(await self._run(RENEW, self._id, self._epoch, self._token, ms, -1))

    def _check(self, answer: Sequence[Any]) -> None:
        """Overloaded unless the script did its work; what cannot get better by itself stays as ``problem``."""
        if answer[0] == b"OK":
            return
        where = f"the namespace {self.namespace!r} in Redis {self.place}"
        if answer[0] == b"FENCED":
            self.elsewhere = self._other(answer[1])
            heir = lease.holder_of(answer[1])
            what = f"this server was silent too long and {heir} took over {where}: connect to that one"
        elif answer[0] == b"BEHIND":
            what = (
                f"Redis lost what it had acknowledged: {where} ends at record {int(answer[1])}, not {self._n}"
            )
        else:
            what = f"{where} vanished while this server ran: bring Redis's data back"
        self.problem = f"{what}. Nothing more is accepted; restart this server to read the journal anew"
        log.error("%s", self.problem)
        raise ReadOnly(self.problem, retry_after=30.0)

    def _other(self, token: bytes) -> str:
        """Where a lease's holder answers, unless that is here: a server that was killed held it at our address."""
        address = lease.address_of(token)
        return "" if address == self.address else address

    async def _run(self, script: str, *arguments: Any) -> Any:
        """Run one of our scripts; Overloaded if Redis does not do it."""
        return await self._call(self._ask().eval(script, 0, self.namespace, *arguments))

    async def _call(self, asked: Awaitable[Any]) -> Any:
        try:
            return await asked
        except Exception as error:
            raise Overloaded(
                f"the journal in Redis {self.place} does not take anything now ({type(error).__name__}: {error}): "
                "the request was not accepted; try again",
                retry_after=2.0,
            ) from error

    def _ask(self) -> Redis:
        if self._redis is None:
            raise ServerError("the journal is closed: the server is shutting down")
        return self._redis


def _client(url: str) -> Redis:
    try:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError:
        raise ServerError(NO_CLIENT) from None
    return Redis.from_url(
        url,
        socket_timeout=PATIENCE,
        socket_connect_timeout=PATIENCE,
        retry=Retry(NoBackoff(), 0),  # a write is tried again by us, after it was undone
        protocol=2,
    )


def _record(n: int, fields: dict[bytes, bytes]) -> Record:
    return Record(
        fields[b"kind"].decode(),
        fields[b"tenant"].decode(),
        json.loads(fields[b"data"]),
        float(fields[b"time"]),
        n,
    )
