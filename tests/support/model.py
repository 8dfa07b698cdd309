"""The service as a dict and a list: what a run must have gone through, whatever the network did to its requests.

Requests are done once, in the order in which they first arrived. Sequence numbers are names: they may have holes, come
out of order, and come again; the same bytes under the same name are the same request, other bytes are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

REFUSED = "refused"


@dataclass
class Model:
    """``seen`` maps (run, seq) to (bytes, request id); ``done`` lists what each run went through."""

    seen: dict[tuple[str, int], tuple[bytes, str]] = field(default_factory=dict)
    done: dict[str, list[str]] = field(default_factory=dict)

    def expects(self, run: str, seq: int, body: bytes) -> str | None:
        """The request id that the service must answer with; REFUSED; or None for one it has not given yet."""
        known = self.seen.get((run, seq))
        if known is None:
            return None
        return known[1] if known[0] == body else REFUSED

    def accepted(self, run: str, seq: int, body: bytes, request_id: str) -> None:
        assert request_id not in [known for _, known in self.seen.values()], "an id was given twice"
        self.seen[run, seq] = (body, request_id)
        self.done.setdefault(run, []).append("step" if body.startswith(b"o") else request_id)
