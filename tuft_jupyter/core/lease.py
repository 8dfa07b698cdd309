"""Who holds a lease, as one line of text: its name, a number that nobody else has, and the address where it answers.

``process 12 on host #<random> <network> <address>``. An address on a loopback interface means something only to those
who share that interface: on the same machine, in the same container.
"""

from __future__ import annotations

import socket
import uuid
from pathlib import Path
from urllib.parse import urlsplit


def token(holder: str, address: str) -> str:
    """A new one for a holder ("process 12 on host"); ``address`` may be empty."""
    return f"{holder} #{uuid.uuid4().hex} {network()} {address}"


def holder_of(token: bytes) -> str:
    return token.decode().partition(" #")[0] or "another server"


def address_of(token: bytes) -> str:
    """Where its holder answers; "" if it did not say, or if that is a loopback which is not ours."""
    _, where, address = [*token.decode().rpartition(" #")[2].split(" "), "", ""][:3]
    host = urlsplit(address).hostname or ""
    loopback = host == "localhost" or host.startswith("127.") or host == "::1"
    return "" if loopback and where != network() else address


def network() -> str:
    """The same for all processes that share a loopback interface, and for no others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}-{Path('/proc/self/ns/net').stat().st_ino}"
    except OSError:  # not Linux
        return f"{uuid.getnode():x}-{socket.gethostname()}"
