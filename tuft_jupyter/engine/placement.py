"""GPUs of a cluster, reserved for one base model as a unit. All placement groups are made here.

:func:`create_placement` waits until the cluster has the GPUs, reserves them all or none, and finds out with short-lived
probes which GPUs they are. Promises: the same cluster gives the same ranks the same GPUs; whatever fails, or is
cancelled, leaves nothing reserved and no probe behind. What goes where is :mod:`~tuft_jupyter.engine.plan`'s. Ray is
imported with the first call, and only ever asked in the thread that is passed in.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from tuft_jupyter.core.errors import ServerError, Unobtainable
from tuft_jupyter.engine.plan import COLOCATE, SEPARATE, Ask, Node, Plan, make_plan, numbered
from tuft_jupyter.engine.ray_runtime import RayThread, Session

log = logging.getLogger(__name__)

T = TypeVar("T")

AUTO = "auto"
POLL_SECONDS = 1.0
RESERVE_SECONDS = 30.0
"""For Ray to give a group the room that was seen to be free."""
SETTLE_SECONDS = 10.0
"""For Ray to see whether there is room for a group that is to be removed; milliseconds as a rule."""
PROBE_SECONDS = 60.0
"""For all probes together; each starts a process."""


LOCAL_SECONDS = 10.0
"""On a Ray of our own, which no node joins: only as long as GPUs take to be free again after their last use."""


class InfoActor:
    """A process in a bundle that says where it is, and is killed."""

    def look(self) -> tuple[str, str, tuple[str, ...]]:
        """(the node's IP, its id, the ids of the GPUs that Ray gave)."""
        import ray

        context = ray.get_runtime_context()
        return ray.util.get_node_ip_address(), context.get_node_id(), tuple(map(str, ray.get_gpu_ids()))


@dataclass(eq=False)
class Placement:
    """What is reserved for one base model, until :meth:`remove`. ``group`` is Ray's handle."""

    name: str
    ask: Ask
    plan: Plan
    group: Any
    session: Session
    thread: RayThread

    def options(self, role: str, number: int) -> dict[str, Any]:
        """Ray's options for the actor of a training rank or of a sampling process."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        seat = self.plan.of(role)[number]
        return {
            "num_gpus": seat.takes,
            "num_cpus": self.ask.cpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self.group, seat.bundle, placement_group_capture_child_tasks=False
            ),
        }

    async def stands(self) -> bool:
        """Whether all its nodes are still in the cluster."""
        if self.session.lost or self.session.closing:
            return False
        alive = {node.id for node in await nodes_of(self.thread)}
        return {bundle.node for bundle in self.plan.bundles} <= alive

    async def remove(self) -> None:
        """Give the GPUs back. Ray ends the actors that still run there. Of a cluster that is gone, nothing is left."""
        if self.session.lost or self.session.closing:
            return
        try:
            await self.thread.run(lambda: _remove(self.group))
        except Exception as error:  # noqa: BLE001 - whoever stops has more to end
            log.warning("the GPUs of %s could not be given back: %s", self.name, error)

    def shown(self) -> dict[str, Any]:
        """As JSON: the mesh, and which process is where."""
        ask = self.ask
        return {
            "model": self.name,
            "mode": ask.mode,
            "strategy": ask.strategy,
            "gpus": ask.expected_gpus,
            "mesh": {
                "data_parallel": ask.ranks if ask.training_gpus else 0,
                "training_nodes": ask.training_nodes,
                "sampling_replicas": ask.replicas if ask.sampling_gpus else 0,
                "tensor_parallel": ask.gpus_per_engine * ask.nodes_per_replica,
                "nodes_per_replica": ask.nodes_per_replica,
            },
            "processes": [
                {
                    "role": seat.role,
                    "rank": seat.number,
                    "node": seat.node,
                    "ip": seat.ip,
                    "gpus": list(seat.ids),
                    "head": seat.head,
                }
                for seat in self.plan.seats
            ],
        }


async def create_placement(
    ask: Ask,
    session: Session,
    thread: RayThread,
    *,
    name: str = "",
    wait_seconds: float = 300.0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Placement:
    """Reserve what is asked for; Unobtainable if it cannot be had in time, ServerError if it cannot be probed.

    ``mode`` may be ``auto``: shared where the cluster has one GPU and one of each is asked for, else separate.
    """
    deadline = time.monotonic() + wait_seconds
    if session.place.local:  # a Ray of our own counts no CPUs
        ask = replace(ask, cpus=0.0)
    while True:
        nodes = await nodes_of(thread)
        visible = int(sum(node.gpus_in_all for node in nodes))
        chosen = settled(ask, visible)
        if session.place.local and visible < chosen.expected_gpus:
            raise Unobtainable(_too_few(chosen, visible))
        plan = make_plan(chosen, nodes)
        if plan is not None:
            group = await _reserve(
                plan, name, thread, min(RESERVE_SECONDS, max(deadline - time.monotonic(), 1.0))
            )
            if group is not None:
                break
        if time.monotonic() >= deadline:
            problem = _too_late(chosen, nodes, visible, wait_seconds)
            raise ServerError(problem) if session.place.local else Unobtainable(problem)
        on_progress(_waiting(chosen, nodes, visible))
        await asyncio.sleep(min(POLL_SECONDS, max(deadline - time.monotonic(), 0.0)))
    try:
        found = await _probe(plan, group, thread)
    except BaseException:
        await asyncio.shield(thread.run(lambda: _remove(group)))
        raise
    placement = Placement(
        name, chosen, replace(plan, seats=numbered(plan.seats, found)), group, session, thread
    )
    log.info(
        "%s is placed (%s): %s",
        name,
        chosen.mode,
        [(s.role, s.number, s.ip, s.ids) for s in placement.plan.seats],
    )
    return placement


class Shared:
    """The placement of one base model, made when the first of its engines starts and given back with the last.

    ``required`` False: where there is no room for it, or fewer than two GPUs, the engines do without.
    """

    def __init__(
        self, name: str, ask: Ask, thread: RayThread, *, wait_seconds: float = 0.0, required: bool = True
    ) -> None:
        self.name = name
        self.ask = ask
        self.placement: Placement | None = None
        self._thread = thread
        self._wait_seconds = wait_seconds
        self._required = required
        self._users: set[object] = set()
        self._lock = asyncio.Lock()

    async def join(
        self, user: object, session: Session, on_progress: Callable[[str], None] = lambda _: None
    ) -> Placement | None:
        """The placement, made if there is none on the nodes of this session; ServerError says why there can be none."""
        if not self._required and session.gpus < 2:
            return None
        self._users.add(user)  # first: nobody who leaves takes it away meanwhile
        async with self._lock:
            made = self.placement
            if made is not None and (made.session is not session or not await made.stands()):
                self.placement = None
                await made.remove()
            if self.placement is None:
                try:
                    self.placement = await create_placement(
                        self.ask,
                        session,
                        self._thread,
                        name=self.name,
                        wait_seconds=min(
                            self._wait_seconds, LOCAL_SECONDS if session.place.local else math.inf
                        ),
                        on_progress=on_progress,
                    )
                except ServerError as problem:
                    if self._required:
                        raise
                    log.info("%s is not placed: %s", self.name, problem.message)
                    return None
            return self.placement

    async def leave(self, user: object) -> None:
        """One engine less; its actor must have ended. Waits for no other one that is joining."""
        self._users.discard(user)
        made = self.placement
        if made is not None and not self._users:
            self.placement = None
            await made.remove()


def settled(ask: Ask, visible: int) -> Ask:
    """``auto`` decided for a cluster with so many GPUs."""
    if ask.mode != AUTO:
        return ask
    alone = visible == 1 and ask.ranks * ask.gpus_per_rank == ask.replicas * ask.gpus_per_engine == 1
    return replace(ask, mode=COLOCATE if alone else SEPARATE)


async def nodes_of(thread: RayThread) -> list[Node]:
    """The living nodes of the cluster that Ray's thread is connected to; ServerError if it does not answer."""
    return await _ask(thread, cluster_nodes)


def cluster_nodes() -> list[Node]:
    """The living nodes, with what they have free. In Ray's thread."""
    import ray
    from ray.util.client import ray as client

    free = ray.get(ray.remote(num_cpus=0)(_free).remote()) if client.is_connected() else _free()
    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            left = free.get(node["NodeID"], {})
            nodes.append(
                Node(
                    node["NodeID"],
                    node["NodeManagerAddress"],
                    float(left.get("GPU", 0)),
                    float(left.get("CPU", 0)),
                    float(has.get("GPU", 0)),
                )
            )
    return nodes


def _free() -> dict[str, dict[str, float]]:
    """What each node has free, by its id. Only a process of the cluster can know."""
    from ray._private.state import available_resources_per_node

    return dict(available_resources_per_node())


def _waiting(ask: Ask, nodes: Iterable[Node], visible: int) -> str:
    """``2/4 GPUs`` of those that must have joined; once they have, how many are free."""
    if visible < ask.expected_gpus:
        return f"waiting for GPUs: {visible}/{ask.expected_gpus} GPUs"
    free = sum(node.gpus for node in nodes)
    return f"waiting for room: {free:g} of {visible} GPUs are free, {ask.expected_gpus} are needed ({ask.strategy})"


def _too_few(ask: Ask, visible: int) -> str:
    """On a Ray of our own, which no node joins."""
    return (
        f"{ask.expected_gpus} GPUs are asked for, and this machine has {visible}: ask for less (training_gpus and "
        "sampling_gpus of the model, or placement), or name a cluster with ray_address"
    )


def _too_late(ask: Ask, nodes: Iterable[Node], visible: int, seconds: float) -> str:
    if visible < ask.expected_gpus:
        return (
            f"Timed out waiting for GPUs: {visible}/{ask.expected_gpus} after {seconds:g}s. "
            "Check that all Ray worker nodes have joined the cluster."
        )
    have = ", ".join(f"{node.ip}: {node.gpus:g} GPUs and {node.cpus:g} CPUs" for node in nodes)
    return (
        f"Timed out waiting for room after {seconds:g}s: {ask.expected_gpus} GPUs ({ask.mode}, {ask.strategy}, "
        f"{ask.cpus:g} CPUs for each process) do not fit what is free ({have}). Ask for less, or stop other work."
    )


async def _ask(thread: RayThread, job: Callable[[], T]) -> T:
    """What Ray answers; ServerError where it cannot."""
    try:
        return await thread.run(job)
    except Exception as error:
        raise ServerError(f"the Ray cluster does not answer: {type(error).__name__}: {error}") from error


async def _reserve(plan: Plan, name: str, thread: RayThread, seconds: float) -> Any:
    """Ray's handle, or None if the room was gone."""
    asked = asyncio.ensure_future(_ask(thread, lambda: _group(plan, name)))
    deadline = time.monotonic() + seconds
    ready = False
    try:
        group = await asyncio.shield(asked)
        while not ready and time.monotonic() < deadline:
            ready = await _ask(thread, lambda: group.wait(0.2))
    finally:
        if not ready:
            made = await asked  # also where the wait for it was cancelled
            await asyncio.shield(thread.run(lambda: _remove(made)))
    return group if ready else None


def _group(plan: Plan, name: str) -> Any:
    from ray.util.placement_group import placement_group

    return placement_group(
        [{"GPU": bundle.gpus, **({"CPU": bundle.cpus} if bundle.cpus else {})} for bundle in plan.bundles],
        strategy="PACK",  # which node is decided already
        bundle_label_selector=[{"ray.io/node-id": bundle.node} for bundle in plan.bundles],
        name=f"tuft {name} {uuid.uuid4().hex[:8]}",  # two servers may serve the same model
    )


def _remove(group: Any) -> None:
    """Give its room back, once Ray has dealt it out: of a group removed meanwhile, Ray 2.60 keeps GPUs for ever."""
    from ray.util.placement_group import placement_group_table, remove_placement_group

    deadline = time.monotonic() + SETTLE_SECONDS
    while (
        placement_group_table(group)["stats"]["scheduling_state"] in ("QUEUED", "SCHEDULING_STARTED")
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    remove_placement_group(group)


async def _probe(plan: Plan, group: Any, thread: RayThread) -> list[tuple[str, str, tuple[str, ...]]]:
    """(IP, node id, GPU ids) of each bundle; ServerError if a probe does not answer."""
    probes: list[Any] = []

    def start() -> list[Any]:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        for number, bundle in enumerate(plan.bundles):
            strategy = PlacementGroupSchedulingStrategy(
                group, number, placement_group_capture_child_tasks=False
            )
            options = {
                "num_cpus": 0,
                "num_gpus": bundle.gpus,
                "scheduling_strategy": strategy,
                "max_restarts": 0,
            }
            probes.append(ray.remote(InfoActor).options(**options).remote())
        return [probe.look.remote() for probe in probes]

    def end() -> None:
        import ray

        for probe in probes:
            ray.kill(probe, no_restart=True)

    try:
        answers = await thread.run(start)
        looked = asyncio.gather(*(asyncio.wrap_future(answer.future()) for answer in answers))
        return list(await asyncio.wait_for(looked, PROBE_SECONDS))
    except TimeoutError:
        raise ServerError(
            f"the GPUs that Ray reserved cannot be used: a probe did not answer within {PROBE_SECONDS:g} s. Look at "
            "the logs of the cluster's nodes"
        ) from None
    except Exception as error:  # noqa: BLE001 - whatever a dead process or node leaves
        raise ServerError(
            f"the GPUs that Ray reserved cannot be used: {type(error).__name__}: {error}"
        ) from None
    finally:
        await asyncio.shield(thread.run(end))
