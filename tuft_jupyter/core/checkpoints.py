"""Checkpoints: saved weights under ``tinker://{run}/{kind}/{name}``.

A name is metadata only: the files lie in a directory with a random name, so nothing a client sends ever becomes part of
a path on disk. A checkpoint is readable by its owner, or by everybody while it is published.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuft_jupyter.core.access import owned
from tuft_jupyter.core.durable import sync, sync_all
from tuft_jupyter.core.errors import NotFound, Overloaded, UserError
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter.core.quotas import Quotas
from tuft_jupyter.core.state import Checkpoint, Run, Session
from tuft_jupyter.core.types import CheckpointKind, Principal, checkpoint_path

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
PATH = re.compile(r"tinker://[^/]{1,200}/(weights|sampler_weights)/[^/]{1,128}\Z")

CUT_SHORT = re.compile(r"\.[0-9a-f]{32}(\.[0-9a-f]{32}(\.old)?|\.part)\Z")
"""What a directory of weights is called before it is whole, and as it is replaced."""
CUT_SHORT_SECONDS = 86400.0
"""After which nobody writes in one any more."""


@dataclass(slots=True)
class Coming:
    """A checkpoint on its way; ``size`` None: not known yet. ``op`` is the request that saves it, if any."""

    tenant: str
    size: int | None
    op: str = ""


class Checkpoints:
    """``over`` says whether a session's client is gone, at a time in seconds since the epoch."""

    def __init__(
        self, ledger: Ledger, root: Path, over: Callable[[Session, float], bool], quotas: Quotas
    ) -> None:
        self.ledger = ledger
        self.root = root
        self._over = over
        self._quotas = quotas
        self._coming: dict[str, Coming] = {}
        """by the directory of a checkpoint that is not on record yet"""
        self._weighed: dict[str, int] = {}
        """bytes of directories that outlive their checkpoints"""

    @contextlib.contextmanager
    def room(self, tenant: str, directory: str, more: int | None) -> Iterator[Callable[[str], None]]:
        """Hold so many bytes for a checkpoint, so that of many at once only as many pass as fit.

        They are held within the block; or, where the block tells the id of the request that will save it, until that
        has an outcome. UserError if the tenant may not keep so many. ``more`` None: nobody knows yet how many; then it
        is one at a time, and Overloaded while another one is on its way.
        """
        accepted = self.ledger.state.accepted
        self._coming = {at: one for at, one in self._coming.items() if not one.op or one.op in accepted}
        coming = [one.size for one in self._coming.values() if one.tenant == tenant]
        kept = sum(c.size_bytes for c in self.ledger.state.checkpoints.values() if c.tenant == tenant)
        kept += self._outliving(tenant)
        self._quotas.check_storage(tenant, kept + sum(size or 0 for size in coming), more or 0)
        if more is None and None in coming and self._quotas.of(tenant).checkpoint_bytes:
            raise Overloaded(
                "the first checkpoint of this shape is still being saved, and its size decides whether another fits: "
                "try again in a second",
                1.0,
            )
        held = self._coming[directory] = Coming(tenant, more)

        def until(op: str) -> None:
            held.op = op

        try:
            yield until
        finally:
            if not held.op:
                del self._coming[directory]

    def _outliving(self, tenant: str) -> int:
        """Bytes of what was deleted or overwritten, and stays because the tenant samples from it."""
        if not self._quotas.of(tenant).checkpoint_bytes:
            return 0
        outliving = self._sampled(tenant) & self.ledger.state.garbage
        for directory in outliving - self._weighed.keys():
            self._weighed[directory] = sum(f.stat().st_size for f in Path(directory).glob("*"))
        return sum(self._weighed[directory] for directory in outliving)

    def _sampled(self, tenant: str | None = None) -> set[str]:
        """The directories that connected clients sample from, of one tenant or of all."""
        state, now = self.ledger.state, self.ledger.clock()
        return {
            s.directory
            for s in state.samplers.values()
            if s.directory is not None
            and tenant in (None, s.tenant)
            and not self._over(state.sessions[s.session], now)
        }

    def expected(self, run: Run, kind: CheckpointKind) -> int | None:
        """The bytes that a checkpoint of a run will take: those of its tenant's last one of the same shape."""
        shape = (run.tenant, run.base_model, kind, _size_of(run.lora))
        alike = [
            c.size_bytes
            for c in self.ledger.state.checkpoints.values()
            if (c.tenant, c.base_model, c.kind, _size_of(c.lora)) == shape
        ]
        return alike[-1] if alike else None

    def plan(
        self,
        run: str,
        kind: CheckpointKind,
        name: str,
        *,
        ttl: float | None,
        overwrite: bool,
        user_metadata: Mapping[str, str] | None,
        recipients: Sequence[str] = (),
    ) -> dict[str, Any]:
        """What a checkpoint about to be saved will be; UserError if the name is bad or taken."""
        check_name(name)
        path = checkpoint_path(run, kind, name)
        if not overwrite and path in self.ledger.state.checkpoints:
            raise UserError(f"path: {path} exists already: choose another name, or save with overwrite=True")
        return {
            "path": path,
            "kind": kind.value,
            "name": name,
            "directory": str(self.root / uuid.uuid4().hex),
            "expires": None if ttl is None else self.ledger.clock() + ttl,
            "user_metadata": dict(user_metadata or {}),
            "recipients": list(recipients),
        }

    def readable(self, principal: Principal, path: str) -> Checkpoint:
        """A checkpoint by its path: the principal's own, or one its owner published."""
        if not PATH.match(path):
            raise UserError(
                f"path: {path!r} is no checkpoint path: it must look like "
                "tinker://<run>/weights/<name> or tinker://<run>/sampler_weights/<name>"
            )
        return self.find(principal, path)

    def find(self, principal: Principal, path: str) -> Checkpoint:
        """A checkpoint of any kind that the principal may read, also one that was exported."""
        found = self.ledger.state.checkpoints.get(path)
        if found is not None and found.public:
            return found
        return owned(principal, self.ledger.state.checkpoints, path, "checkpoint")

    def mine(self, principal: Principal, run: str | None = None) -> list[Checkpoint]:
        """The principal's checkpoints (of one run), newest first."""
        found = [
            c
            for c in self.ledger.state.checkpoints.values()
            if c.tenant == principal.tenant and (run is None or c.run == run)
        ]
        return sorted(found, key=lambda c: c.created, reverse=True)

    async def copy(self, source: Checkpoint, session: Session, run: str, ttl: float | None) -> str:
        """Give ``session`` a copy under ``run``, a closed run of its own; returns its path. Asking again is harmless.

        The files are linked, not written again, and each copy is deleted by itself.
        """
        path = checkpoint_path(run, CheckpointKind(source.kind), source.name)
        if run in self.ledger.state.runs:
            if path in self.ledger.state.checkpoints:
                return path
            raise UserError(f"model_seq_id: {run} is a model already: choose another number")
        saved = self.plan(
            run,
            CheckpointKind(source.kind),
            source.name,
            ttl=ttl,
            overwrite=False,
            user_metadata=source.user_metadata,
        )
        data = {
            "run": run,
            "step": source.step,
            "args": {"session": session.id, "base_model": source.base_model, "lora": source.lora},
            "facts": {"checkpoint": saved, "size_bytes": source.size_bytes},
            "source": source.path,
        }
        # Whoever asked may hang up meanwhile: what is on record by then keeps its files.
        await asyncio.shield(self._copy(source, Path(saved["directory"]), session.tenant, data))
        return path

    async def _copy(self, source: Checkpoint, directory: Path, tenant: str, data: Mapping[str, Any]) -> None:
        with self.room(tenant, str(directory), source.size_bytes):
            try:
                await asyncio.to_thread(_link, Path(source.directory), directory)
                await self.ledger.record("weights_copied", tenant, data)
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)
                raise

    async def adopt(
        self,
        session: Session,
        run: str,
        name: str,
        base_model: str,
        lora: Mapping[str, Any],
        directory: Path,
        size: int,
        ttl: float | None,
    ) -> str:
        """Keep an adapter made elsewhere under ``run``, a closed run of its own; returns its path.

        ``directory`` lies below the root already, and ``size`` is what its files take, in bytes.
        """
        kind = CheckpointKind.TRAINING
        saved = self.plan(run, kind, name, ttl=ttl, overwrite=False, user_metadata=None)
        data = {
            "run": run,
            "step": 0,
            "args": {"session": session.id, "base_model": base_model, "lora": dict(lora)},
            "facts": {"checkpoint": {**saved, "directory": str(directory)}, "size_bytes": size},
            "source": "upload",
        }
        await self.ledger.record("weights_copied", session.tenant, data)
        return str(saved["path"])

    async def change(self, principal: Principal, path: str, change: Mapping[str, Any]) -> None:
        """Set ``expires`` (seconds since the epoch, or None) or ``public``."""
        found = owned(principal, self.ledger.state.checkpoints, path, "checkpoint")
        await self.ledger.record("checkpoint_changed", found.tenant, {"path": path, **change})

    async def delete(self, principal: Principal, path: str) -> None:
        await self._delete(owned(principal, self.ledger.state.checkpoints, path, "checkpoint"))

    async def expire(self, now: float) -> None:
        """Delete what is past its time to live."""
        for checkpoint in list(self.ledger.state.checkpoints.values()):
            if checkpoint.expires is not None and checkpoint.expires <= now:
                await self._delete(checkpoint)

    async def _delete(self, checkpoint: Checkpoint) -> None:
        data = {"path": checkpoint.path, "deleted": True}
        await self.ledger.record("checkpoint_changed", checkpoint.tenant, data)
        await self.collect()

    async def clear(self, root: Path) -> None:
        """Remove from a directory what saves left there whose worker died; nobody comes back to it."""
        await asyncio.to_thread(_remove_cut_short, root, time.time() - CUT_SHORT_SECONDS)

    async def collect(self) -> None:
        """Remove the files of checkpoints that were deleted or overwritten, once nobody may read them any more."""
        state, used = self.ledger.state, self._sampled()
        used.update(directory for run in state.runs.values() for directory in run.sources)
        spent = sorted(state.garbage - used)
        if spent:
            for directory in spent:
                await asyncio.to_thread(shutil.rmtree, directory, True)
                self._weighed.pop(directory, None)
            await self.ledger.record("files_removed", "", {"directories": spent})


def check_name(name: str) -> None:
    """UserError unless a checkpoint may be called that."""
    if not NAME.match(name):
        raise UserError(
            f"path: {name!r} is not a checkpoint name: use 1 to 128 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit"
        )


def _size_of(lora: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of an adapter's description decides how large it is."""
    return tuple(lora.get(name) for name in ("rank", "train_attn", "train_mlp", "train_unembed"))


def _link(source: Path, target: Path) -> None:
    """The same files under another directory, on the disk; written again where the file system cannot link."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copyfile(one, other)

    try:
        shutil.copytree(source, target, copy_function=link)
        sync_all(target)
        sync(target.parent)
    except FileNotFoundError:
        raise NotFound(f"the files of the checkpoint in {source.name} were deleted: save it again") from None


def _remove_cut_short(root: Path, before: float) -> None:
    for directory in root.iterdir() if root.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # just now it was given its name
            if CUT_SHORT.match(directory.name) and directory.stat().st_mtime < before:
                shutil.rmtree(directory, ignore_errors=True)
