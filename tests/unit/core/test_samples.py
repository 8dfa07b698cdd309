"""What a run's weights said: kept within bounds, for whoever asked, and for nobody else."""

from __future__ import annotations

import pytest

from tuft_jupyter.core import samples
from tuft_jupyter.core.objects import Sampler
from tuft_jupyter.core.samples import Kept, Samples


def of(step: int | None, tenant: str = "alice", run: str | None = "r") -> Sampler:
    return Sampler(f"s{step}", "session", tenant, "tuft/demo", 0.0, run=run, step=step)


def one(text: bytes = b"?", answer: bytes = b"!") -> Kept:
    return Kept(0.0, text, answer)


def test_a_step_shows_its_own_samples_or_those_of_the_last_step_before_it() -> None:
    kept = Samples()
    for step in (2, 5):
        kept.keep(of(step), one(b"%d" % step))
    assert kept.steps("alice", "r") == [2, 5]
    for asked, found in ((5, 5), (9, 5), (4, 2), (2, 2), (1, 2)):
        near = kept.near("alice", "r", asked)
        assert near == (found, [one(b"%d" % found)])
    assert kept.near("alice", "other", 5) is None


def test_samples_are_only_for_the_tenant_that_asked() -> None:
    kept = Samples()
    kept.keep(of(1, "bob"), one(b"secret"))
    assert kept.near("alice", "r", 1) is None
    assert kept.steps("alice", "r") == []


def test_a_base_model_is_nobodys_step_and_a_switch_keeps_nothing() -> None:
    kept = Samples()
    kept.keep(of(None, run=None), one())
    assert kept.near("alice", "r", 0) is None
    off = Samples(keeping=False)
    off.keep(of(1), one())
    assert off.near("alice", "r", 1) is None


def test_the_oldest_go_first_when_there_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "LARGEST", 50)
    monkeypatch.setattr(samples, "PER_TENANT", 100)
    monkeypatch.setattr(samples, "TOGETHER", 150)
    kept = Samples()
    kept.keep(of(0), one(b"x" * 51, b""))
    assert kept.steps("alice", "r") == [], "one that is too large is not kept"
    for step in (1, 2, 3):
        kept.keep(of(step), one(b"x" * 40, b""))
    assert kept.steps("alice", "r") == [2, 3]
    kept.keep(of(9, "bob"), one(b"x" * 40, b""))
    kept.keep(of(9, "carol"), one(b"x" * 40, b""))
    assert kept.steps("alice", "r") == [3], (
        "a tenant within its bound gives way when all together have too much"
    )
    assert kept.steps("bob", "r") == [9]


def test_a_step_keeps_its_newest_requests() -> None:
    kept = Samples()
    for n in range(samples.PER_STEP + 3):
        kept.keep(of(1), one(b"%d" % n))
    near = kept.near("alice", "r", 1)
    assert near is not None
    assert [each.body for each in near[1]] == [b"%d" % n for n in range(3, samples.PER_STEP + 3)]
