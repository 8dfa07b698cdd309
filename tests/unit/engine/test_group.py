"""Ranks that are one trainer: where they meet, and what becomes of the others when one fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tuft_jupyter.core.engine import EngineDied, Outcome, Task
from tuft_jupyter.core.errors import ServerError
from tuft_jupyter.engine.group import Meeting, TrainingGroup


class Rank:
    """Says where it would meet the others; ``dies`` in its step, or is ``broken`` and cannot start."""

    part_tokens = 100

    def __init__(self, number: int, meeting: Meeting, *, dies: bool = False, broken: bool = False) -> None:
        self.on_progress: Callable[[str], None] = lambda _: None
        self.met = ""
        self.ended = 0
        self.asked = 0
        self.has_gpus = False
        self._number, self._meeting, self._dies, self._broken = number, meeting, dies, broken

    async def address(self) -> str:
        self.asked += 1
        return f"tcp://10.0.0.{self.asked}:1234"

    async def start(self) -> None:
        self.has_gpus = True
        self.met = await self._meeting.among_nodes(self._number, self.address)
        if self._broken:
            raise ServerError("no memory")

    async def step(self, tasks: Sequence[Task]) -> list[Outcome]:
        if self._dies:
            raise EngineDied("its process is gone")
        return await asyncio.get_running_loop().create_future()  # waits for the others, for ever

    async def end(self) -> None:
        self.ended += 1

    async def give_up(self) -> None:
        self.has_gpus = False

    async def stop(self) -> None:
        await self.end()

    def resources(self) -> dict[str, Any]:
        return {}


def test_all_ranks_meet_where_the_first_one_says_anew_at_each_start(tmp_path: Path) -> None:
    """S3-51: the address is asked of rank 0 alone."""

    async def scenario() -> None:
        meeting = Meeting(tmp_path / "meeting")
        ranks = [Rank(number, meeting) for number in range(3)]
        group = TrainingGroup(ranks, meeting)
        await group.start()
        assert {rank.met for rank in ranks} == {"tcp://10.0.0.1:1234"}
        await group.start()
        assert {rank.met for rank in ranks} == {"tcp://10.0.0.2:1234"}
        assert [rank.asked for rank in ranks] == [2, 0, 0]

    asyncio.run(scenario())


def test_an_address_that_was_set_is_not_asked_for(tmp_path: Path) -> None:
    """S3-51."""

    async def scenario() -> None:
        meeting = Meeting(tmp_path / "meeting", "10.9.9.9:77")
        ranks = [Rank(number, meeting) for number in range(2)]
        await TrainingGroup(ranks, meeting).start()
        assert {rank.met for rank in ranks} == {"tcp://10.9.9.9:77"}
        assert ranks[0].asked == 0

    asyncio.run(scenario())


def test_where_one_rank_cannot_start_no_rank_keeps_its_gpus(tmp_path: Path) -> None:
    """S3-10: also those that were up already; after a death they are kept, for the next start."""

    async def scenario() -> None:
        meeting = Meeting(tmp_path / "meeting")
        ranks = [Rank(0, meeting), Rank(1, meeting), Rank(2, meeting, broken=True)]
        with pytest.raises(ServerError, match="no memory"):
            await TrainingGroup(ranks, meeting).start()
        assert [rank.has_gpus for rank in ranks] == [False] * 3
        well = [Rank(0, meeting), Rank(1, meeting, dies=True)]
        group = TrainingGroup(well, meeting)
        await group.start()
        with pytest.raises(EngineDied):
            await group.step([])
        assert [rank.has_gpus for rank in well] == [True] * 2

    asyncio.run(scenario())


def test_the_death_of_one_rank_is_told_once_with_its_number_and_ends_all(tmp_path: Path) -> None:
    """S3-03."""

    async def scenario() -> None:
        meeting = Meeting(tmp_path / "meeting")
        ranks = [Rank(0, meeting), Rank(1, meeting, dies=True)]
        group = TrainingGroup(ranks, meeting)
        await group.start()
        before = [rank.ended for rank in ranks]
        with pytest.raises(EngineDied, match="rank 1 of 2: its process is gone"):
            await group.step([])
        assert [rank.ended for rank in ranks] == [n + 1 for n in before]

    asyncio.run(scenario())
