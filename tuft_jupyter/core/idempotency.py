"""Which requests were accepted before: by run and sequence number, so that one that is sent again is not run again.

Sequence numbers have holes by nature, and nothing waits for them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence

from tuft_jupyter.core.errors import UserError

REMEMBERED = 1024
"""Requests remembered for each run: far more than a client can have in flight."""


class SeenRequests:
    def __init__(self) -> None:
        self._runs: dict[str, OrderedDict[int, tuple[str, str]]] = {}

    def add(self, run: str, seq: int, digest: str, request_id: str) -> None:
        known = self._runs.setdefault(run, OrderedDict())
        known[seq] = (digest, request_id)
        while len(known) > REMEMBERED:
            known.popitem(last=False)

    def find(self, run: str, seq: int, digest: str) -> str | None:
        """The request id of an op accepted before under this number; UserError if it was a different op."""
        accepted = self._runs.get(run)
        known = accepted.get(seq) if accepted else None
        if known is None:
            return None
        if known[0] != digest:
            raise already_used(run, seq)
        return known[1]

    def next_seq(self, run: str) -> int:
        """A number that no op of this run was sent under: what a client that takes over begins with."""
        return max(self._runs.get(run, {}), default=0) + 1

    def drop(self, run: str) -> None:
        self._runs.pop(run, None)

    def image(self, runs: Collection[str]) -> dict[str, list[list[str | int]]]:
        """What is remembered of some runs, as JSON."""
        return {
            run: [[seq, digest, request_id] for seq, (digest, request_id) in known.items()]
            for run, known in self._runs.items()
            if run in runs
        }

    def restore(self, image: Mapping[str, Sequence[Sequence[str | int]]]) -> None:
        for run, known in image.items():
            for seq, digest, request_id in known:
                self.add(run, int(seq), str(digest), str(request_id))


def already_used(run: str, seq: int) -> UserError:
    return UserError(
        f"seq_id {seq} of {run} was already used by a different request: "
        "send each request with its own seq_id (where two programs train one run, end one of them; "
        "tuft_jupyter.resume gives the other a client at its next request)"
    )
