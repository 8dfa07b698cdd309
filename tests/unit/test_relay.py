"""A Hub's shared service as a user's own server sees it: what is trusted, and what is taken for its words."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tornado.web import HTTPError

from tests.support.stub_server import KEY, StubServer
from tuft_jupyter_server import relay
from tuft_jupyter_server.relay import HubService, RelayExport, Unreachable


@pytest.fixture
def service() -> Iterator[StubServer]:
    relay._client.cache_clear()
    with StubServer() as stub:
        yield stub
    relay._client.cache_clear()


def asked(service: StubServer) -> int:
    hub = HubService(service.address, KEY)
    return asyncio.run(hub.ask("/api/v1/tuft/status")).status_code


def heard(service: StubServer) -> list[bytes]:
    async def listen() -> list[bytes]:
        return [event async for event in HubService(service.address, KEY).events("/api/v1/tuft/feed")]

    return asyncio.run(asyncio.wait_for(listen(), 20))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
def test_the_service_is_trusted_as_kernels_trust_it(
    service: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the machine or SSL_CERT_FILE vouches for: a kernel that trains beside a panel that cannot would puzzle."""
    certificate = service.speak_tls(tmp_path)
    with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
        asked(service)
    relay._client.cache_clear()
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    assert asked(service) == 200


def test_an_address_that_leads_elsewhere_is_named_as_the_problem(service: StubServer) -> None:
    """http where the Hub is at https: the panel would say no more than that it is not connected."""
    service.routes["GET /tuft/status"] = lambda _: (302, "https://hub.example/services/tuft")
    with pytest.raises(Unreachable, match=r"it redirects to https://hub\.example/services/tuft"):
        asked(service)


def test_only_a_feed_is_passed_on_as_one(service: StubServer, caplog: pytest.LogCaptureFixture) -> None:
    """A proxy's page, or a refusal, is not for the panel to read as messages; the log says what came."""
    caplog.set_level(logging.INFO)
    service.routes["GET /tuft/feed"] = lambda _: (503, "<h1>503</h1>\n\nno server is available\n\n")
    assert heard(service) == []
    assert "answers 503" in caplog.text
    service.routes["GET /tuft/feed"] = lambda _: (200, 'data: {"n": 1}\n\ndata: {"n": 2}\n\n')
    assert heard(service) == [b'{"n": 1}', b'{"n": 2}']


def test_a_curve_that_cannot_be_had_now_is_not_said_to_be_none(service: StubServer) -> None:
    export = RelayExport.__new__(RelayExport)
    export.service = HubService(service.address, KEY)
    service.routes["GET /tuft/runs/r/curve"] = lambda _: (429, {"detail": "reading the journal"})
    with pytest.raises(HTTPError, match=r"\(reading the journal\)$") as refused:
        asyncio.run(export.columns("r"))
    assert refused.value.status_code == 429
    service.routes["GET /tuft/runs/r/curve"] = lambda _: (404, {"detail": "does not exist"})
    assert asyncio.run(export.columns("r")) is None
    service.routes["GET /tuft/runs/r/curve"] = lambda _: (200, {"columns": {"step": [1]}})
    assert asyncio.run(export.columns("r")) == {"step": [1]}
