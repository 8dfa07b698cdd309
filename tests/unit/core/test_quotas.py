"""Rates and sizes per tenant, by a clock that the test turns."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tuft_jupyter.core.errors import Overloaded, UserError
from tuft_jupyter.core.lanes import Lanes
from tuft_jupyter.core.quotas import HOLD, Queue, Quota, Quotas, Work
from tuft_jupyter.core.types import Op, OpKind


class Clock:
    """Time passes when somebody sleeps, and ``passed`` says who woke when."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


def limited(quota: Quota, clock: Clock, **more: object) -> Quotas:
    return Quotas(quota, clock=clock, sleep=clock.sleep, **more)  # type: ignore[arg-type]


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(body())  # type: ignore[arg-type]


def test_the_request_that_comes_too_soon_is_held_and_then_passes() -> None:
    """S2-42: with two requests a second, the third of one second waits half a second; 0 disables."""
    clock = Clock()
    quotas = limited(Quota(requests_per_second=2), clock)

    async def body() -> None:
        passed = []
        for _ in range(6):
            await quotas.pace("alice", 1)
            passed.append(clock.now - 100.0)
        assert passed == pytest.approx([0, 0, 0.5, 1.0, 1.5, 2.0])
        clock.now += 60  # what was not used is not saved up beyond a second's worth
        began = clock.now
        for _ in range(4):
            await quotas.pace("alice", 1)
        assert clock.now - began == pytest.approx(1.0)
        free = limited(Quota(), clock)
        before = clock.now
        for _ in range(1000):
            await free.pace("alice", 1, 10**6)
        assert clock.now == before

    run(body)


def test_nobody_pays_for_another_tenant_and_many_keys_are_one_tenant() -> None:
    """S2-43, T12: limits know tenants only."""
    clock = Clock()
    quotas = limited(Quota(tokens_per_second=100), clock)

    async def body() -> None:
        await quotas.pace("alice", 1, 800)
        before = clock.now
        await quotas.pace("bob", 1, 100)
        assert clock.now == before
        await quotas.pace("alice", 1, 100)
        assert clock.now - before == pytest.approx(8.0)

    run(body)


def test_a_request_larger_than_a_second_s_worth_passes_when_the_debt_is_paid() -> None:
    """S2-43: nothing starves."""
    clock = Clock()
    quotas = limited(Quota(tokens_per_second=100), clock)

    async def body() -> None:
        for _ in range(5):
            before = clock.now
            await quotas.pace("alice", 1, 500)
            assert clock.now - before <= 5.0
        assert clock.now - 100.0 == pytest.approx(20.0)

    run(body)


def test_who_would_wait_too_long_is_told_to_come_later_and_owes_nothing_for_it() -> None:
    """S2-42: 429 with Retry-After, which the SDK follows by itself."""
    clock = Clock()
    quotas = limited(Quota(tokens_per_second=10), clock)

    async def body() -> None:
        await quotas.pace("alice", 1, 10 * 30)
        for _ in range(3):
            with pytest.raises(Overloaded, match="paused_rate_limit") as later:
                await quotas.pace("alice", 1, 10)
            assert 0 < later.value.retry_after <= 30
        clock.now += 30 - HOLD + 0.1
        await quotas.pace("alice", 1, 10)

    run(body)


def test_a_poll_can_tell_that_requests_are_being_held() -> None:
    async def body() -> None:
        woken = asyncio.Event()

        async def sleep(seconds: float) -> None:
            await woken.wait()

        quotas = Quotas(Quota(requests_per_second=1), clock=lambda: 5.0, sleep=sleep)
        await quotas.pace("alice", 1)
        held = asyncio.ensure_future(quotas.pace("alice", 1))
        await asyncio.sleep(0)
        assert quotas.paused("alice")
        assert not quotas.paused("bob")
        woken.set()
        await held
        assert not quotas.paused("alice")
        again = asyncio.ensure_future(quotas.pace("alice", 1))
        await asyncio.sleep(0)
        again.cancel()
        await asyncio.gather(again, return_exceptions=True)
        assert not quotas.paused("alice")

    run(body)


def test_input_and_storage_have_limits_that_say_what_to_do() -> None:
    """S2-44."""
    quotas = Quotas(Quota(input_tokens=10_000, checkpoint_bytes=100))
    quotas.check_input("alice", 10_000)
    with pytest.raises(UserError, match=r"Input tokens \(10001\) exceed maximum allowed \(10000\)"):
        quotas.check_input("alice", 10_001)
    quotas.check_storage("alice", 40, 60)
    for used, more in ((41, 60), (100, 0)):
        with pytest.raises(UserError, match="delete checkpoints"):
            quotas.check_storage("alice", used, more)


def test_a_tenant_s_own_limits_go_before_its_groups_and_these_before_all_others() -> None:
    groups = {"students": {"runs": 1, "weight": 0.5}, "staff": {"runs": 9}}
    members = {"eve": {"students"}, "ann": {"staff", "students"}, "root": {"students"}}
    quotas = Quotas(
        Quota(runs=3), {"root": {"runs": 0}}, groups, members=lambda tenant: members.get(tenant, ())
    )
    assert [quotas.of(name).runs for name in ("bob", "eve", "ann", "root")] == [3, 1, 9, 0]
    assert quotas.weight("eve") == 0.5
    assert quotas.weight("bob") == 1.0


def test_a_busy_engine_is_shared_by_weight() -> None:
    """L6: tokens in proportion, as long as everybody has work."""
    weights = {"alice": 3.0, "bob": 1.0}
    lanes = Lanes(400, weight=weights.__getitem__)
    served = {"alice": 0, "bob": 0}
    for n, tenant in enumerate(("alice", "bob")):
        lanes.push(Op(f"r{n}", f"run{n}", 1, OpKind.FORWARD_BACKWARD, tenant, 10**6), n)
    for _ in range(50):
        for grant in lanes.next_batch():
            grant.entry.done += grant.tokens
            served[grant.lane.tenant] += grant.tokens
    assert served["alice"] / served["bob"] == pytest.approx(3.0, rel=0.05)


TRAINING, SAMPLING = (Work.TRAINING, "m"), (Work.SAMPLING, "m")


def test_what_is_trained_does_not_slow_what_is_sampled() -> None:
    """S2-42, S2-57: each engine of each base model has a limiter of its own, within the tenant's own."""
    clock = Clock()
    queues = {TRAINING: Queue(requests_per_second=2), SAMPLING: Queue(tokens_per_second=100)}
    quotas = limited(Quota(requests_per_second=10), clock, queues=queues)

    async def body() -> None:
        for _ in range(3):
            await quotas.pace("alice", 1, 50, TRAINING)
        assert clock.now - 100.0 == pytest.approx(0.5)
        before = clock.now
        await quotas.pace("alice", 1, 100, SAMPLING)
        await quotas.pace("bob", 1, 50, TRAINING)
        await quotas.pace("alice", 1, 50, (Work.TRAINING, "another"))
        assert clock.now == before
        await quotas.pace("alice", 1, 100, SAMPLING)
        assert clock.now - before == pytest.approx(1.0)
        clock.now += 60
        before = clock.now
        for n in range(11):  # of another engine, but the tenant's
            await quotas.pace("alice", 1, engine=(Work.TRAINING, f"{n}"))
        assert clock.now - before == pytest.approx(0.1)

    run(body)
    assert quotas.allowed("alice", TRAINING) == "2 requests a second"
    assert quotas.allowed("alice", SAMPLING) == "10 requests a second and 100 tokens a second"


def test_the_lower_of_two_limits_on_input_holds() -> None:
    """S2-44."""
    quotas = Quotas(
        Quota(input_tokens=20), queues={TRAINING: Queue(input_tokens=10), SAMPLING: Queue(input_tokens=30)}
    )
    quotas.check_input("alice", 10, TRAINING)
    quotas.check_input("alice", 20, SAMPLING)
    with pytest.raises(UserError, match=r"Input tokens \(11\) exceed maximum allowed \(10\)"):
        quotas.check_input("alice", 11, TRAINING)
    with pytest.raises(UserError, match=r"Input tokens \(21\) exceed maximum allowed \(20\)"):
        quotas.check_input("alice", 21, SAMPLING)
