"""The kernel's own HTTP: what breaks off is not taken for whole, and what cannot be sent is said without the key."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.stub_server import KEY, StubServer
from tuft_jupyter.kernel.answers import Drawing, answer
from tuft_jupyter.kernel.client import Client, Unreachable, is_loopback

Raw = Callable[[bytes], str]


@pytest.fixture
def raw() -> Iterator[Raw]:
    """Servers that send these bytes to whoever asks first, and no more."""
    made = []

    def serve(text: bytes) -> str:
        listening = socket.create_server(("127.0.0.1", 0))
        made.append(listening)

        def once() -> None:
            connection, _ = listening.accept()
            with closing(connection):
                connection.recv(2**16)
                connection.sendall(text)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(2**16):  # closed on what was not read, it would take back what was sent
                    pass

        threading.Thread(target=once, daemon=True).start()
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield serve
    for listening in made:
        listening.close()


def test_a_download_that_breaks_off_leaves_no_file(raw: Raw, tmp_path: Path) -> None:
    """S1-45: http.client takes the end of a connection for the end of a body."""
    address = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 500)
    target = tmp_path / "weights.tar"
    with pytest.raises(Unreachable):
        list(Client(address).save(f"{address}/file", target))
    assert list(tmp_path.iterdir()) == []
    address = raw(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"runs": [')
    with pytest.raises(Unreachable):
        Client(address).outlook()


def test_an_answer_that_breaks_off_is_not_taken_for_a_short_one(raw: Raw) -> None:
    event = b'data: {"choices":[{"text":"half"}]}\n\n'
    chunk = b"%x\r\n%s\r\n" % (len(event), event)
    address = raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk)
    pieces = answer(Client(address), "m", "p", Drawing(chat=False))
    assert next(pieces) == "half"
    with pytest.raises(Unreachable, match="broke off"):
        next(pieces)


@pytest.mark.parametrize("address", ["http://[bad", "://x", "http://host:port", "http://a b"])
def test_an_address_that_is_none_is_nobody_s(address: str) -> None:
    assert not Client(address).alive()
    assert not is_loopback(address)


def test_a_key_that_cannot_be_sent_is_not_shown(server: StubServer) -> None:
    with pytest.raises(Unreachable, match="key") as told:
        Client(server.address, f"{KEY}\n").models()
    assert KEY not in str(told.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "[::1]", "[::]", "localhost"])
def test_a_proxy_is_not_asked_for_this_machine(host: str) -> None:
    """P5: a server that listens everywhere is called 0.0.0.0 by who started it."""
    assert is_loopback(f"http://{host}:10610")
    assert not is_loopback("http://10.0.0.5:10610")
