"""Keys, ownership, and that a refusal tells nothing and changes nothing."""

from __future__ import annotations

import asyncio

import pytest

from tuft_jupyter.core.access import KeyRing, owned
from tuft_jupyter.core.errors import Forbidden, Lost, NotFound, Unauthenticated
from tuft_jupyter.core.promises import Answer, Promises
from tuft_jupyter.core.state import Session
from tuft_jupyter.core.types import Principal

ALICE, BOB = Principal("alice"), Principal("bob")


def test_no_key_is_401_and_a_wrong_or_revoked_one_403() -> None:
    """S1-24."""
    ring = KeyRing()
    ring.add("tml-a", ALICE)
    assert ring.principal("tml-a") == ALICE
    with pytest.raises(Unauthenticated, match="Missing API key"):
        ring.principal(None)
    with pytest.raises(Forbidden, match="Invalid API key"):
        ring.principal("tml-b")
    ring.revoke("tml-a")
    with pytest.raises(Forbidden):
        ring.principal("tml-a")


def test_the_ring_holds_no_key() -> None:
    ring = KeyRing()
    ring.add("tml-secret", ALICE)
    assert "tml-secret" not in repr(vars(ring))


def test_a_foreign_object_and_a_missing_one_look_the_same() -> None:
    """S1-01."""
    sessions = {"s": Session("s", "alice", 0.0)}
    assert owned(ALICE, sessions, "s", "session").id == "s"
    with pytest.raises(NotFound) as foreign:
        owned(BOB, sessions, "s", "session")
    with pytest.raises(NotFound) as missing:
        owned(BOB, {}, "s", "session")
    assert str(foreign.value) == str(missing.value)


def test_asking_for_a_foreign_promise_leaves_no_trace() -> None:
    """M4: in a peer, a stranger's refused call made the owner's pending result vanish."""

    async def scenario() -> None:
        promises = Promises()
        promise = promises.open("id", "alice", "run")
        with pytest.raises(Lost) as foreign:
            promises.get(BOB, "id")
        with pytest.raises(Lost) as missing:
            promises.get(BOB, "other")
        assert str(foreign.value).replace("'id'", "X") == str(missing.value).replace("'other'", "X")
        assert await promises.wait(promise, 0) is None
        promises.settle("id", Answer(b"result"))
        answer = await promises.wait(promises.get(ALICE, "id"), 0)
        assert answer is not None
        assert answer.body == b"result"

    asyncio.run(scenario())


def test_answers_leave_memory_oldest_first_and_only_training_ones_can_be_read_again() -> None:
    promises = Promises(capacity=100)
    promises.open("train", "alice", "run")
    promises.settle("train", Answer(b"x" * 80, record=5))
    promises.open("sample", "alice", "sampler")
    promises.settle("sample", Answer(b"y" * 80))
    kept = promises.get(ALICE, "train").answer
    assert kept is not None
    assert kept.body is None
    assert kept.record == 5
    promises.open("more", "alice", "sampler")
    promises.settle("more", Answer(b"z" * 80))
    with pytest.raises(Lost):
        promises.get(ALICE, "sample")
