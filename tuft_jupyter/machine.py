"""This machine's addresses in its networks. Sends nothing."""

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
