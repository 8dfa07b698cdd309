"""Which GPUs of this machine are meant."""

from __future__ import annotations

import pytest

from tuft_jupyter.machine import interface_of, local_gpu
from tuft_jupyter_server import gpus


@pytest.mark.parametrize(
    ("number", "uuid", "visible", "local"),
    [
        (5, "GPU-55", "4,5,6,7", 1),
        (3, "GPU-33", "4,5", None),
        (2, "GPU-22", None, 2),
        (2, "GPU-22", "", None),
        (1, "GPU-8f2a11", "GPU-77, GPU-8f2a", 1),
        (0, "MIG-abc/2/0", "MIG-abc/1/0,MIG-abc/2/0", 1),
        (5, "GPU-55", "4,-1,5", None),
    ],
)
def test_a_gpu_is_found_among_those_that_a_process_sees(
    number: int, uuid: str, visible: str | None, local: int | None
) -> None:
    """S3-26: physical 5 of 4,5,6,7 is the second one; UUIDs and MIG slices are found by name."""
    assert local_gpu(number, uuid, visible) == local


def test_the_interface_of_an_address_is_known() -> None:
    """S3-40."""
    assert interface_of("127.0.0.1").startswith("lo")
    assert interface_of("203.0.113.7") == ""


def test_gauges_show_the_gpus_that_the_server_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3-26: on a shared machine the others' GPUs are nobody's business here."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-55")
    assert [gpus._is_meant(n, f"GPU-{n}{n}") for n in (3, 4, 5)] == [False, True, True]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpus._is_meant(3, b"GPU-33")
