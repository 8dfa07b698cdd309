"""This machine: its addresses in its networks, and which of its GPUs are meant. Sends nothing, asks no GPU."""

from __future__ import annotations

import socket

import psutil

_FAR = ("192.0.2.1", 9)
"""An address set aside for documentation: a route to it is looked up, and no packet sent."""


def outward_ip() -> str:
    """The address that other machines see; loopback where there is no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_FAR)
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def interface_of(ip: str) -> str:
    """The network interface with an address; "" if there is none."""
    return next(
        (name for name, held in psutil.net_if_addrs().items() if any(a.address == ip for a in held)), ""
    )


def local_gpu(number: int, uuid: str, visible: str | None) -> int | None:
    """Which of the GPUs it is to a process with ``CUDA_VISIBLE_DEVICES=visible``; None: the process does not see it.

    The list holds the machine's numbers, or UUIDs (``GPU-…``, ``MIG-…``), shortened as one likes. CUDA ends it at the
    first entry that names nothing, such as -1.
    """
    if visible is None:
        return number
    for place, name in enumerate(entry.strip() for entry in visible.split(",")):
        if not name.isdecimal() and not name.startswith(("GPU-", "MIG-")):
            return None
        if name == str(number) or (not name.isdecimal() and uuid.startswith(name)):
            return place
    return None
