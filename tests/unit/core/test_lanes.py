"""Order, idempotency and fairness: what the lanes promise."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuft_jupyter.core.lanes import MAX_WAIT, MAX_YIELDS, WAIT_SLACK, Grant, Lanes
from tuft_jupyter.core.types import Op, OpKind


def op(run: str, seq: int, tokens: int = 0, kind: OpKind = OpKind.FORWARD_BACKWARD, tenant: str = "") -> Op:
    return Op(f"{run}-{seq}", run, seq, kind, tenant or run, tokens)


def work_off(lanes: Lanes, batch: list[Grant]) -> list[str]:
    """Do what was granted; returns the ids of the ops that ended."""
    ended = []
    for grant in batch:
        grant.entry.done += grant.tokens
        if grant.entry.op.kind is not OpKind.FORWARD_BACKWARD or grant.entry.done >= grant.entry.op.tokens:
            lanes.finish(grant)
            ended.append(grant.entry.op.request_id)
    return ended


def test_a_lane_runs_in_order_of_arrival_and_holes_are_passed_over() -> None:
    lanes = Lanes(64)
    for seq, kind in ((3, OpKind.OPTIM_STEP), (7, OpKind.FORWARD_BACKWARD), (5, OpKind.OPTIM_STEP)):
        lanes.push(op("r", seq, 8, kind), seq)
    order = []
    while batch := lanes.next_batch():
        order += work_off(lanes, batch)
    assert order == ["r-3", "r-7", "r-5"]


def test_chunks_of_one_call_share_a_batch_and_a_step_never_overtakes_them() -> None:
    lanes = Lanes(512)
    for seq in (2, 3, 1):
        lanes.push(op("r", seq, 100), seq)
    lanes.push(op("r", 4, kind=OpKind.OPTIM_STEP), 4)
    assert [grant.entry.op.seq for grant in lanes.next_batch()] == [2, 3, 1]


def test_a_light_tenant_is_served_in_the_next_batch_beside_a_heavy_one() -> None:
    lanes = Lanes(512, 256)
    for seq in range(3):
        lanes.push(op("heavy", seq, 8192), seq)
    lanes.next_batch()
    lanes.push(op("light", 0, 16), 9)
    batch = lanes.next_batch()
    assert "light-0" in {grant.entry.op.request_id for grant in batch}
    assert sum(grant.tokens for grant in batch) <= 256


def test_a_light_tenant_is_not_packed_with_a_heavy_one_and_neither_starves() -> None:
    lanes = Lanes(512, 256)
    lanes.push(op("heavy", 0, 100_000), 0)
    served = []
    for seq in range(4 * MAX_YIELDS):
        if not lanes.lane("light", "light").queue:
            lanes.push(op("light", seq, 16), seq + 1)
        batch = lanes.next_batch()
        served.append(*{grant.lane.tenant for grant in batch})
        work_off(lanes, batch)
    runs = "".join(name[0] for name in served).split("h")
    assert served.count("heavy") >= 3
    assert max(len(run) for run in runs) <= MAX_YIELDS


def test_a_light_tenant_that_asks_again_at_once_is_waited_for_before_a_heavy_part() -> None:
    now = 100.0
    lanes = Lanes(512, 256, clock=lambda: now)
    lanes.push(op("light", 0, 16), 1)
    assert lanes.anticipation() == 0.0
    work_off(lanes, lanes.next_batch())
    lanes.push(op("heavy", 0, 100_000), 2)
    assert lanes.anticipation() == 0.0, "nothing is known of its think time yet"
    now += MAX_WAIT / 4
    lanes.push(op("light", 1, 16), 3)
    work_off(lanes, lanes.next_batch())
    assert lanes.anticipation() == pytest.approx(MAX_WAIT / 2 + WAIT_SLACK), "twice its think time before"
    now += 2 * MAX_WAIT
    assert lanes.anticipation() == 0.0
    lanes.push(op("light", 2, 16), 4)
    work_off(lanes, lanes.next_batch())
    assert lanes.anticipation() == pytest.approx(MAX_WAIT / 2 + WAIT_SLACK), (
        "one long think time is an outlier"
    )
    now += 2 * MAX_WAIT
    lanes.push(op("light", 3, 16), 5)
    work_off(lanes, lanes.next_batch())
    assert lanes.anticipation() == 0.0, "two are not, so nobody waits for it"


def test_savings_of_a_heavy_tenant_do_not_crowd_a_light_one_out() -> None:
    """L6, M7: it yields, and is served after MAX_YIELDS, not before."""
    lanes = Lanes(512, 256)
    lanes.push(op("heavy", 0, 100_000), 0)
    turns = []
    for seq in range(2 * (MAX_YIELDS + 1)):
        lanes.push(op("light", seq, 16), seq)
        batch = lanes.next_batch()
        turns.append({grant.lane.tenant for grant in batch})
        if turns[-1] == {"heavy"}:
            work_off(lanes, batch)
            batch = lanes.next_batch()
        work_off(lanes, batch)
    assert turns[:MAX_YIELDS] == [{"light"}] * MAX_YIELDS
    assert turns.count({"heavy"}) == 2


def test_a_light_tenant_is_waited_for_a_bounded_number_of_times() -> None:
    lanes = Lanes(512, 256, clock=lambda: 100.0)
    lanes.push(op("light", 0, 16), 1)
    work_off(lanes, lanes.next_batch())
    lanes.push(op("light", 1, 16), 2)
    work_off(lanes, lanes.next_batch())
    lanes.push(op("heavy", 0, 100_000), 3)
    waited = sum(lanes.anticipation() > 0 for _ in range(3 * MAX_YIELDS))
    assert waited == MAX_YIELDS
    assert [grant.lane.tenant for grant in lanes.next_batch()] == ["heavy"]
    assert lanes.anticipation() > 0, "it was served, so it may yield again"


def test_equals_are_packed_together() -> None:
    lanes = Lanes(512, 256)
    for i in range(8):
        lanes.push(op(f"t{i}", 0, 16 + i), i)
    assert len(lanes.next_batch()) == 8


def test_a_step_that_is_due_runs_before_any_pass() -> None:
    lanes = Lanes(512, 256)
    lanes.push(op("heavy", 0, 8192), 0)
    lanes.push(op("a", 1, kind=OpKind.OPTIM_STEP), 1)
    lanes.push(op("b", 1, kind=OpKind.OPTIM_STEP), 2)
    assert {grant.entry.op.run for grant in lanes.next_batch()} == {"a", "b"}


def tokens_by_tenant(lanes: Lanes) -> Counter[str]:
    """What fifty batches grant to each tenant."""
    granted: Counter[str] = Counter()
    for _ in range(50):
        for grant in lanes.next_batch():
            granted[grant.lane.tenant] += grant.tokens
            grant.entry.done += grant.tokens
    return granted


def test_two_heavy_tenants_get_equal_shares() -> None:
    lanes = Lanes(512, 256)
    lanes.push(op("a", 0, 100_000), 1)
    lanes.push(op("b", 0, 100_000), 2)
    granted = tokens_by_tenant(lanes)
    assert abs(granted["a"] - granted["b"]) <= 256


def test_many_runs_of_one_tenant_do_not_outweigh_one_run_of_another() -> None:
    lanes = Lanes(512, 256)
    for i in range(8):
        lanes.push(op(f"a{i}", 0, 100_000, tenant="a"), i)
    lanes.push(op("b", 0, 100_000, tenant="b"), 9)
    granted = tokens_by_tenant(lanes)
    assert abs(granted["a"] - granted["b"]) <= 256


def test_a_suspect_runs_alone() -> None:
    """F11: an op that was in a batch whose worker died is tried by itself, so that its neighbours are spared."""
    lanes = Lanes(512)
    lanes.push(op("a", 0, 10), 1)
    poison = lanes.push(op("b", 0, 10), 2)
    poison.attempts = 1
    assert [grant.entry for grant in lanes.next_batch()] == [poison]


sizes = st.lists(st.integers(1, 3000), min_size=1, max_size=6)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), sizes, min_size=1), st.integers(16, 600))
def test_everything_ends_in_order_and_no_batch_is_empty_or_over_budget(
    queues: dict[str, list[int]], budget: int
) -> None:
    lanes = Lanes(budget)
    for run, costs in queues.items():
        for seq, tokens in enumerate(costs):
            lanes.push(op(run, seq, tokens), seq)
    ended: list[str] = []
    for _ in range(100_000):
        batch = lanes.next_batch()
        if not batch:
            break
        assert 0 < sum(grant.tokens for grant in batch) <= budget
        ended += work_off(lanes, batch)
    assert not any(lane.queue for lane in lanes.by_run.values())
    for run, costs in queues.items():
        assert [name for name in ended if name.startswith(run)] == [f"{run}-{i}" for i in range(len(costs))]


def test_work_is_waited_for_without_polling() -> None:
    async def scenario() -> None:
        lanes = Lanes(512)
        waiting = asyncio.ensure_future(lanes.work())
        await asyncio.sleep(0)
        assert not waiting.done()
        lanes.push(op("r", 0, 1), 1)
        await asyncio.wait_for(waiting, 1)

    asyncio.run(scenario())


def test_parts_are_as_large_as_the_engine_asks_for() -> None:
    """A pass of 4,096 tokens is one call where that suits the engine, and halves beside another tenant."""
    lanes = Lanes(512, 256)
    lanes.set_budget(4096)
    lanes.push(op("a", 1, 4096), 1)
    assert [grant.tokens for grant in lanes.next_batch()] == [4096]
    lanes.push(op("b", 2, 4096), 2)
    assert sum(grant.tokens for grant in lanes.next_batch()) == 2048
