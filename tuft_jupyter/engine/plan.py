"""Which node's GPUs each process of a base model gets: decided before anything is reserved.

Pure: from what is asked and what the nodes have free to a list of processes, each with its node, its GPUs and the
bundle that it shares or has to itself. Promises that the same question has the same answer, in whatever order the nodes
come.
Knows nothing of Ray. The sizes and names follow TorchSpec's placement of trainers and inference engines.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

SEPARATE = "separate"
COLOCATE = "colocate"
TRAIN_ONLY = "debug_train_only"
INFERENCE_ONLY = "debug_inference_only"
TRAINING = "training"
SAMPLING = "sampling"
SHARED_GPU = 0.4
"""Of a GPU, for each of the two processes that share it: Ray then gives it to no third one that asks for as much."""


@dataclass(frozen=True, slots=True)
class Node:
    """A living node of the cluster, with what of it is free and how many GPUs it has in all."""

    id: str
    ip: str
    gpus: float
    cpus: float = 0.0
    gpus_in_all: float = 0.0


@dataclass(frozen=True, slots=True)
class Ask:
    """What one base model needs. ``share`` is the part of each GPU that its bundles reserve.

    ``ranks`` training processes on ``training_nodes`` nodes, with ``gpus_per_rank`` each; ``replicas`` times
    ``nodes_per_replica`` sampling processes with ``gpus_per_engine`` each. No rank, or no replica: none is placed.
    Every process also takes ``cpus``.
    """

    mode: str = SEPARATE
    strategy: str = "PACK"
    ranks: int = 1
    training_nodes: int = 1
    gpus_per_rank: int = 1
    replicas: int = 1
    nodes_per_replica: int = 1
    gpus_per_engine: int = 1
    cpus: float = 0.0
    share: float = 1.0

    @property
    def training_gpus(self) -> int:
        return 0 if self.mode == INFERENCE_ONLY else self.ranks * self.gpus_per_rank

    @property
    def sampling_gpus(self) -> int:
        return 0 if self.mode == TRAIN_ONLY else self.replicas * self.nodes_per_replica * self.gpus_per_engine

    def reserved(self, gpus: int) -> float:
        """Of a bundle for so many GPUs; Ray divides only single ones."""
        return gpus * self.share if gpus == 1 else gpus

    @property
    def expected_gpus(self) -> int:
        """How many GPUs must be in the cluster: both parts together, or the larger where they share."""
        parts = (self.training_gpus, self.sampling_gpus)
        return sum(parts) if self.mode == SEPARATE else max(parts)


@dataclass(frozen=True, slots=True)
class Bundle:
    """What is reserved on one node as one piece."""

    node: str
    gpus: float
    cpus: float


@dataclass(frozen=True, slots=True)
class Seat:
    """One process' place. ``number`` is a trainer's rank, or a sampling process' number among all of them.

    ``takes`` GPUs of the bundle; ``ids`` says which, once they are known. Of a replica that spans nodes, the process
    with ``node_rank`` 0 is its head: the only one that requests are sent to.
    """

    role: str
    number: int
    bundle: int
    node: str
    ip: str
    takes: float
    replica: int = 0
    node_rank: int = 0
    ids: tuple[str, ...] = ()

    @property
    def head(self) -> bool:
        return self.node_rank == 0


@dataclass(frozen=True, slots=True)
class Plan:
    bundles: tuple[Bundle, ...]
    seats: tuple[Seat, ...]

    def of(self, role: str) -> list[Seat]:
        return [seat for seat in self.seats if seat.role == role]

    @property
    def heads(self) -> list[Seat]:
        """The sampling processes that accept requests."""
        return [seat for seat in self.of(SAMPLING) if seat.head]


@dataclass(slots=True)
class _Group:
    """Processes of one role that belong on one node; ``apart`` from its like, if there is a node for each."""

    role: str
    processes: int
    gpus: int
    apart: bool = False
    node: Node | None = None

    @property
    def size(self) -> int:
        return self.processes * self.gpus


def make_plan(ask: Ask, nodes: Sequence[Node]) -> Plan | None:
    """The places of all processes; None if the nodes have no room for all of them now.

    PACK takes as few nodes as it can, but for what was asked to be on several; SPREAD takes as many as it can. With
    STRICT_PACK one node takes all, with STRICT_SPREAD each node's share of a component has a node to itself. A training
    group that no node can hold is divided, but for the strict ones.
    """
    nodes = sorted(nodes, key=lambda node: node_key(node.ip, node.id))
    groups = _groups(ask)
    if not _fit(groups, nodes, ask):
        if ask.strategy.startswith("STRICT"):
            return None
        groups = _divided(groups)
        if not _fit(groups, nodes, ask):
            return None
    return _seated(ask, groups)


def _groups(ask: Ask) -> list[_Group]:
    """What has to be on one node, largest first. Where they share, a rank and an engine are one process here."""
    training, sampling = ask.training_gpus, ask.sampling_gpus
    if ask.mode == COLOCATE:
        most = max(training, sampling)
        per_node = -(-most // ask.training_nodes)
        return [_Group(TRAINING, min(per_node, most - at), 1) for at in range(0, most, per_node)]
    groups = []
    if training:
        per_node = -(-ask.ranks // ask.training_nodes)
        groups = [
            _Group(TRAINING, min(per_node, ask.ranks - at), ask.gpus_per_rank, ask.training_nodes > 1)
            for at in range(0, ask.ranks, per_node)
        ]
    if sampling:
        groups += [
            _Group(SAMPLING, 1, ask.gpus_per_engine, ask.nodes_per_replica > 1)
            for _ in range(ask.replicas * ask.nodes_per_replica)
        ]
    return sorted(groups, key=lambda group: -group.size)


def _divided(groups: Sequence[_Group]) -> list[_Group]:
    """With each training process by itself; largest first again, or the small ones take the room of the large."""
    parts = [group for group in groups if group.role != TRAINING]
    for group in groups:
        if group.role == TRAINING:
            parts += [_Group(TRAINING, 1, group.gpus) for _ in range(group.processes)]
    return sorted(parts, key=lambda part: -part.size)


def _fit(groups: Sequence[_Group], nodes: Sequence[Node], ask: Ask) -> bool:
    """Give every group a node; False, if one finds none."""
    for group in groups:
        group.node = None
    gpus = {node.id: node.gpus for node in nodes}
    cpus = {node.id: node.cpus for node in nodes}
    taken = {node.id: 0 for node in nodes}
    processes = 2 if ask.mode == COLOCATE else 1
    if ask.strategy == "STRICT_PACK":
        size = sum(_reserved(ask, group) for group in groups)
        cpu = sum(group.processes for group in groups) * processes * ask.cpus
        nodes = [node for node in nodes if node.gpus >= size and node.cpus >= cpu][:1]
    for group in groups:
        size, cpu = _reserved(ask, group), group.processes * processes * ask.cpus
        able = [node for node in nodes if gpus[node.id] >= size and cpus[node.id] >= cpu]
        if ask.strategy == "STRICT_SPREAD":
            able = [node for node in able if not taken[node.id]]
        if not able:
            return False
        if ask.strategy.endswith("SPREAD"):
            best = min(able, key=lambda node: taken[node.id])
        else:  # a node in use before a fresh one, and then the one that is left with the least
            like = {
                other.node.id for other in groups if other.node and group.apart and other.role == group.role
            }
            best = min(able, key=lambda node: (node.id in like, not taken[node.id], gpus[node.id]))
        group.node = best
        gpus[best.id] -= size
        cpus[best.id] -= cpu
        taken[best.id] += 1
    return True


def _reserved(ask: Ask, group: _Group) -> float:
    return group.processes * ask.reserved(group.gpus)


def _seated(ask: Ask, groups: Sequence[_Group]) -> Plan:
    bundles: list[Bundle] = []
    seats: list[Seat] = []
    count = {TRAINING: 0, SAMPLING: 0}

    def sit(role: str, node: Node, takes: float) -> None:
        number = count[role]
        count[role] += 1
        replica, node_rank = divmod(number, ask.nodes_per_replica) if role == SAMPLING else (0, 0)
        seats.append(
            Seat(
                role, number, len(bundles) - 1, node.id, node.ip, takes, replica=replica, node_rank=node_rank
            )
        )

    for group in sorted(groups, key=lambda group: (group.role != TRAINING, _where(group))):
        assert group.node is not None
        for _ in range(group.processes):
            if ask.mode == COLOCATE:
                bundles.append(Bundle(group.node.id, ask.share, 2 * ask.cpus))
                if count[TRAINING] < ask.training_gpus:
                    sit(TRAINING, group.node, SHARED_GPU)
                if count[SAMPLING] < ask.sampling_gpus:
                    sit(SAMPLING, group.node, SHARED_GPU)
            else:
                bundles.append(Bundle(group.node.id, ask.reserved(group.gpus), ask.cpus))
                sit(group.role, group.node, ask.reserved(group.gpus))
    return Plan(tuple(bundles), tuple(seats))


def _where(group: _Group) -> tuple[tuple[int, int, str], str]:
    assert group.node is not None
    return node_key(group.node.ip, group.node.id)


def numbered(seats: Iterable[Seat], found: Sequence[tuple[str, str, tuple[str, ...]]]) -> tuple[Seat, ...]:
    """The seats, numbered in the order of the GPUs that were ``found``: (IP, node id, ids) of each bundle.

    Rank 0 is on the lowest (IP, node id, GPU id), whichever bundle Ray gave that GPU.
    """
    seats = list(seats)
    done: list[Seat] = []
    for role in (TRAINING, SAMPLING):
        old = [seat for seat in seats if seat.role == role]
        order = sorted(old, key=lambda seat: slot_key(*found[seat.bundle]))
        for seat, place in zip(old, order, strict=True):  # the number stays, the place is the one in order
            ip, node, ids = found[place.bundle]
            ids = tuple(sorted(ids, key=_gpu_key))  # of several, each process is told another order
            done.append(replace(seat, bundle=place.bundle, node=node, ip=ip, takes=place.takes, ids=ids))
    return tuple(done)


def slot_key(
    ip: str, node: str, ids: Sequence[str]
) -> tuple[tuple[tuple[int, int, str], str], list[tuple[int, str]]]:
    """The order of GPUs: by IP as a number, node id (two nodes may be one machine), GPU id as a number."""
    return node_key(ip, node), sorted(map(_gpu_key, ids))


def _gpu_key(gpu: str) -> tuple[int, str]:
    """Numbers before UUIDs."""
    return (int(gpu), "") if gpu.isdecimal() else (1 << 32, gpu)


def node_key(ip: str, node: str) -> tuple[tuple[int, int, str], str]:
    """The order of nodes. What is no address, such as a host's name that cannot be resolved, comes last, by name."""
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return (9, 0, ip), node
    return (address.version, int(address), ""), node
