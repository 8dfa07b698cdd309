"""Who gets which GPU of which node, decided without a cluster."""

from __future__ import annotations

import itertools
import random

import pytest

from tuft_jupyter.engine import plan
from tuft_jupyter.engine.plan import (
    COLOCATE,
    INFERENCE_ONLY,
    SAMPLING,
    SEPARATE,
    TRAIN_ONLY,
    TRAINING,
    Ask,
    Node,
    Plan,
    make_plan,
    node_key,
    numbered,
    slot_key,
)


def nodes(*gpus: float, cpus: float = 8) -> list[Node]:
    return [Node(f"n{i}", f"10.0.0.{i}", have, cpus, have) for i, have in enumerate(gpus)]


def where(found: Plan | None, role: str) -> list[str]:
    assert found is not None
    return [seat.node for seat in found.of(role)]


def test_the_same_nodes_in_any_order_give_the_same_plan() -> None:
    """S3-18, S3-19."""
    ask = Ask(ranks=2, training_nodes=2, replicas=3)
    plans = {make_plan(ask, order) for order in itertools.permutations(nodes(2, 2, 2, 0))}
    assert len(plans) == 1


def test_nodes_are_ordered_by_address_as_a_number_and_gpus_by_id_as_a_number() -> None:
    """S3-18: two raylets on one machine have one IP and the same ids, so the node's id decides; names come last."""
    slots = [
        ("10.0.0.9", "b", ("2",)),
        ("10.0.0.9", "b", ("10",)),
        ("10.0.0.9", "c", ("0",)),
        ("10.0.0.10", "a", ("0",)),
        ("10.0.0.10", "a", ("GPU-1f",)),
        ("fe80::1", "a", ("0",)),
        ("gpu-host", "a", ("0",)),
    ]
    shuffled = slots[:]
    for seed in range(20):
        random.Random(seed).shuffle(shuffled)
        assert sorted(shuffled, key=lambda slot: slot_key(*slot)) == slots
    assert node_key("10.0.0.9", "z") < node_key("10.0.0.10", "a")


def test_ranks_are_numbered_by_the_gpus_that_were_found() -> None:
    """S3-18: Ray may give the first bundle the last GPU."""
    found = make_plan(Ask(ranks=3), nodes(4))
    assert found is not None
    gpus = [("10.0.0.0", "n0", (gpu,)) for gpu in ("3", "0", "2", "1")]
    seats = numbered(found.seats, gpus)
    assert [(s.role, s.number, s.bundle, s.ids) for s in seats] == [
        (TRAINING, 0, 1, ("0",)),
        (TRAINING, 1, 2, ("2",)),
        (TRAINING, 2, 0, ("3",)),
        (SAMPLING, 0, 3, ("1",)),
    ]
    several = make_plan(Ask(mode=TRAIN_ONLY, gpus_per_rank=3), nodes(4))
    assert several is not None
    (seat,) = numbered(several.seats, [("10.0.0.0", "n0", ("10", "3", "2"))])
    assert seat.ids == ("2", "3", "10")


@pytest.mark.parametrize(
    ("mode", "expected"), [(SEPARATE, 6), (COLOCATE, 4), (TRAIN_ONLY, 4), (INFERENCE_ONLY, 2)]
)
def test_expected_gpus_are_the_sum_or_the_larger_part(mode: str, expected: int) -> None:
    """S3-35."""
    ask = Ask(mode=mode, ranks=4, replicas=2)
    assert ask.expected_gpus == expected
    found = make_plan(ask, nodes(8))
    assert found is not None
    assert sum(bundle.gpus for bundle in found.bundles) == expected


def test_training_and_sampling_share_no_gpu_unless_they_are_to() -> None:
    """S3-12, S3-13, S3-20."""
    separate = make_plan(Ask(ranks=2, replicas=2), nodes(4))
    assert separate is not None
    assert len({seat.bundle for seat in separate.seats}) == len(separate.bundles) == 4
    shared = make_plan(Ask(mode=COLOCATE), nodes(1))
    assert shared is not None
    assert [(seat.role, seat.bundle, seat.takes) for seat in shared.seats] == [
        (TRAINING, 0, plan.SHARED_GPU),
        (SAMPLING, 0, plan.SHARED_GPU),
    ]


def test_a_single_mode_places_nothing_of_the_other() -> None:
    """S3-14, S3-15."""
    assert {seat.role for seat in make_plan(Ask(mode=TRAIN_ONLY), nodes(2)).seats} == {TRAINING}  # type: ignore[union-attr]
    assert {seat.role for seat in make_plan(Ask(mode=INFERENCE_ONLY), nodes(2)).seats} == {SAMPLING}  # type: ignore[union-attr]


def test_what_does_not_fit_has_no_plan_rather_than_half_of_one() -> None:
    """S3-10."""
    assert make_plan(Ask(ranks=4), nodes(2, 2)) is None
    assert make_plan(Ask(ranks=4), nodes(2, 3)) is not None
    assert make_plan(Ask(replicas=1, gpus_per_engine=4), nodes(3, 3)) is None  # an engine cannot be divided
    assert make_plan(Ask(cpus=2), nodes(2, cpus=3)) is None
    assert make_plan(Ask(cpus=2), nodes(2, cpus=4)) is not None


def test_ranks_are_nodes_times_gpus_per_node() -> None:
    """S3-41, S3-42: on two nodes with two GPUs each, four ranks are two and two."""
    found = make_plan(Ask(mode=TRAIN_ONLY, ranks=4, training_nodes=2), nodes(2, 2))
    assert where(found, TRAINING) == ["n0", "n0", "n1", "n1"]
    assert found is not None
    assert [seat.number for seat in found.seats] == [0, 1, 2, 3]
    two = Ask(mode=TRAIN_ONLY, ranks=2, training_nodes=2)
    assert where(make_plan(two, nodes(4, 4)), TRAINING) == ["n0", "n1"]
    assert where(make_plan(two, nodes(4)), TRAINING) == ["n0", "n0"]
    assert where(make_plan(Ask(mode=TRAIN_ONLY, ranks=4), nodes(2, 2)), TRAINING) == ["n0", "n0", "n1", "n1"]


def test_sixteen_gpus_on_two_nodes_are_one_replica_with_one_head() -> None:
    """S3-46, S3-47: two processes with eight GPUs each; the first accepts requests, the second takes part."""
    ask = Ask(mode=INFERENCE_ONLY, replicas=1, nodes_per_replica=2, gpus_per_engine=8)
    found = make_plan(ask, nodes(8, 8))
    assert found is not None
    assert [(s.node, s.takes, s.replica, s.node_rank, s.head) for s in found.of(SAMPLING)] == [
        ("n0", 8, 0, 0, True),
        ("n1", 8, 0, 1, False),
    ]
    assert [seat.number for seat in found.heads] == [0]


@pytest.mark.parametrize("sizes", list(itertools.permutations((4, 8, 8))))
def test_the_layout_of_three_nodes_comes_out_as_drawn(sizes: tuple[int, ...]) -> None:
    """S3-53: training on the node with four GPUs, the two halves of the replica on those with eight, in order."""
    ask = Ask(ranks=4, nodes_per_replica=2, gpus_per_engine=8)
    found = make_plan(ask, nodes(*sizes))
    four = f"n{sizes.index(4)}"
    assert where(found, TRAINING) == [four] * 4
    assert where(found, SAMPLING) == sorted({"n0", "n1", "n2"} - {four})
    assert ask.expected_gpus == 20


@pytest.mark.parametrize("strategy", ["PACK", "SPREAD"])
def test_a_divided_training_group_leaves_room_for_a_larger_sampler(strategy: str) -> None:
    """Three ranks that no node holds together, and a sampler on two GPUs of one: the large part is placed first."""
    ask = Ask(strategy=strategy, ranks=3, gpus_per_engine=2)
    found = make_plan(ask, nodes(2, 2, 2))
    (sampler,) = where(found, SAMPLING)
    assert len(where(found, TRAINING)) == 3
    assert sampler not in where(found, TRAINING)


def test_strategies_pack_spread_and_insist() -> None:
    """S2-15, S3-42: SPREAD takes a node for each part where there are enough; the strict ones rather wait."""
    one_each = Ask(strategy="SPREAD")
    assert where(make_plan(one_each, nodes(2, 2)), TRAINING) != where(
        make_plan(one_each, nodes(2, 2)), SAMPLING
    )
    assert make_plan(one_each, nodes(2)) is not None
    assert {seat.node for seat in make_plan(Ask(), nodes(2, 2)).seats} == {"n0"}  # type: ignore[union-attr]
    assert make_plan(Ask(strategy="STRICT_SPREAD"), nodes(2)) is None
    assert make_plan(Ask(strategy="STRICT_SPREAD"), nodes(2, 2)) is not None
    assert make_plan(Ask(strategy="STRICT_PACK", ranks=3), nodes(3, 3)) is None
    assert {s.node for s in make_plan(Ask(strategy="STRICT_PACK", ranks=3), nodes(3, 4)).seats} == {"n1"}  # type: ignore[union-attr]
