"""A few trials of each fault; ``make fault TRIALS=100`` runs as many as it takes to be sure."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fault import files, kills, order
from tests.fault.bench import Fault
from tests.support.world import ALICE, scenario, world
from tuft_jupyter.core.errors import UserError

FEW = {"F4": 25, "F5": 25, "F6": 3, "S1-53": 3}


@pytest.mark.parametrize("fault", files.FAULTS, ids=lambda fault: fault.row)
def test_files_that_were_torn_or_rotted_or_had_no_room(fault: Fault, tmp_path: Path) -> None:
    """F4, F5, F6, S1-53: acknowledged records are there, or the server says which are not."""
    if fault.row == "F6" and (os.getuid() != 0 or shutil.which("mount") is None):
        pytest.skip("a file system of one's own needs root")
    with fault.bench(tmp_path) as trial:
        for number in range(FEW[fault.row]):
            trial(Random(f"{fault.row} {number}"))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_whatever_the_network_does_each_request_is_done_once_and_in_order(tmp_path: Path, seed: int) -> None:
    """F13, P1: duplicates, late and reordered requests, holes, a dying worker and a dying server."""
    with order.sequences(tmp_path) as trial:
        trial(Random(seed))


@pytest.mark.timeout(300)
def test_killed_while_it_recovers_a_run_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """F3: worker and server killed, and one of them again; adapter and moments are equal bit by bit."""
    (both,) = [fault for fault in kills.FAULTS if fault.row == "F3"]
    with both.bench(tmp_path) as trial:
        trial(Random(3))


def test_a_hole_in_the_numbers_holds_nothing_up(tmp_path: Path) -> None:
    """F14: requests that never came, or were refused, are passed over at once, also by a client that comes back."""

    async def body() -> None:
        async with world(tmp_path) as w:
            run = await w.connect()
            runs = w.service.runs
            first = await order.send(w, (ALICE, run, 1, b"f1:8"))
            with pytest.raises(UserError):
                await runs.load_weights(ALICE, run, 2, "tinker://nothing/weights/x", True, b"refused")
            later = await order.send(w, (ALICE, run, 9, b"f9:8"))
            for request_id in (first, later):
                assert (await w.answer(request_id)).body == b"done"
            reopened = w.service.ledger.seen.next_seq(run)
            again = await order.send(w, (ALICE, run, reopened, b"o10"))
            assert not (await w.answer(again)).category
            assert w.trained == [first, later, "step"]

    scenario(body)
