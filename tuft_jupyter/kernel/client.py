"""The few HTTP calls the kernel makes itself, on urllib: is it alive, what does it serve, serve this, its
tokenizer.

It knows the addresses of our routes and nothing else; training and sampling are the SDK's business. It
promises that no call outlives its timeout, and that a failure is either :class:`Unreachable` or
:class:`Refused` with the server's own words. Loopback addresses are reached directly, whatever proxies the
environment names.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROBE_SECONDS = 2.0
CALL_SECONDS = 30.0
ANSWER_SECONDS = 600.0
"""Of silence in an answer that is streamed: before it, a worker may have to load a large model."""
MAX_ANSWER = 256 * 2**20
CHUNK = 2**20


class Unreachable(Exception):
    """Nothing that speaks HTTP answered in time."""


class Refused(Exception):
    """An answer that is not a success. ``status`` is its HTTP status, the text what the server says."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def normal(address: str) -> str:
    """An address as we compare and show it: with a scheme, without a trailing slash."""
    address = address.strip().rstrip("/")
    return address if "://" in address else f"http://{address}"


def is_loopback(address: str) -> bool:
    """Whether it leads to this machine itself; 0.0.0.0, where a server listens everywhere, does so too."""
    host = ""
    try:
        host = urllib.parse.urlsplit(address).hostname or ""
        found = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return found.is_loopback or found.is_unspecified


@dataclass(frozen=True, slots=True)
class Client:
    """``address`` is the root below which ``/api/v1`` lies; ``key`` goes into ``X-API-Key``."""

    address: str
    key: str = field(default="", repr=False)

    def alive(self, seconds: float = PROBE_SECONDS) -> bool:
        """Whether a Tinker-like server answers ``healthz``; no key is sent."""
        try:
            return Client(self.address).call("GET", "healthz", timeout=seconds).get("status") == "ok"
        except (Unreachable, Refused):
            return False

    def models(self, timeout: float = CALL_SECONDS) -> list[str]:
        """The names of the base models offered."""
        answer = self.call("GET", "get_server_capabilities", timeout=timeout)
        offered = answer.get("supported_models")
        if not isinstance(offered, list):
            raise Refused(200, "the answer is not that of a Tinker server")
        return [each["model_name"] for each in offered if isinstance(each, dict) and each.get("model_name")]

    def status(self) -> dict[str, Any]:
        """Readiness as ``%tuft status`` shows it; Refused with 404 by servers that are not ours."""
        return self.call("GET", "tuft/status")

    def add_model(self, model: str) -> str:
        """Ask the server to offer and load a model; the name it is served under."""
        return str(self.call("POST", "tuft/models", {"model": model})["name"])

    def tokenizer(self, model: str) -> dict[str, str]:
        """The model's tokenizer files by name, as text."""
        query = urllib.parse.urlencode({"model": model})
        files = self.call("GET", f"tuft/tokenizer?{query}")["files"]
        return {str(name): str(text) for name, text in files.items()}

    def outlook(self, seen: str = "", wait: float = 0.0, tenant: str = "") -> dict[str, Any]:
        """How the key's own work stands; an admin's may name a ``tenant``, or * for all.

        With the ``version`` last seen, another is waited for, ``wait`` seconds.
        """
        given = {"tenant": tenant, "seen": seen, "wait": int(wait) if seen else ""}
        query = urllib.parse.urlencode({name: value for name, value in given.items() if value != ""})
        return self.call("GET", f"tuft/outlook?{query}", timeout=CALL_SECONDS + wait)

    def curve(self, run: str, start: int = 0) -> dict[str, list[Any]]:
        """The columns of a run's curve, one entry per optimizer step, from entry ``start`` on."""
        answer = self.call("GET", f"tuft/runs/{urllib.parse.quote(run)}/curve?start={start}")
        columns: dict[str, list[Any]] = answer["columns"]
        return columns

    def resume(self, run: str, session: str) -> dict[str, Any]:
        """Let ``session`` go on with a live run; ``step``, ``pending`` and ``next_seq`` of it."""
        path = f"tuft/runs/{urllib.parse.quote(run)}/resume"
        return self.call("POST", path, {"session_id": session})

    def gauges(self) -> dict[str, Any]:
        """What the server's machine does, measured within the last two seconds."""
        return self.call("GET", "tuft/gauges")

    def ray(self) -> dict[str, Any]:
        """The server's Ray: address, nodes with GPUs, what is placed where, and the commands that start a cluster."""
        return self.call("GET", "tuft/ray")

    def checkpoint(self, method: str, path: str, verb: str = "") -> dict[str, Any]:
        """A verb of a checkpoint's route, by its ``tinker://run/kind/name`` path."""
        run, kind, name = path.removeprefix("tinker://").split("/", 2)
        route = f"training_runs/{urllib.parse.quote(run)}/checkpoints/{kind}/{urllib.parse.quote(name)}"
        return self.call(method, f"{route}/{verb}" if verb else route)

    def save(self, url: str, target: Path) -> Iterator[int]:
        """Fetch a signed address of this server into a file, whole or not at all; yields the bytes so far.

        OSError if the file cannot be written.
        """
        parts = urllib.parse.urlsplit(self.address)
        here = urllib.parse.urlsplit(url)._replace(scheme=parts.scheme, netloc=parts.netloc).geturl()
        fresh = target.with_name(f".{target.name}.part")
        try:
            with fresh.open("wb") as file:
                for chunk in _chunks(here):
                    file.write(chunk)
                    yield file.tell()
            fresh.replace(target)
        finally:
            fresh.unlink(missing_ok=True)

    def events(self, path: str, body: dict[str, Any]) -> Iterator[str]:
        """Post to a path below the address, and the data of each server-sent event of the answer, as it comes."""
        headers = {"Content-Type": "application/json", "X-API-Key": self.key}
        data = json.dumps(body).encode()
        with _failures():
            request = urllib.request.Request(
                f"{self.address}/{path}", data=data, headers=headers, method="POST"
            )
            with _opener(self.address).open(request, timeout=ANSWER_SECONDS) as response:
                for line in response:
                    name, _, value = line.decode().rstrip().partition(": ")
                    if name == "data":
                        yield value

    def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout: float = CALL_SECONDS
    ) -> dict[str, Any]:
        """One request below ``/api/v1``; the answer must be a JSON object."""
        headers = {"Accept": "application/json"} | ({"X-API-Key": self.key} if self.key else {})
        data = None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        with _failures():
            request = urllib.request.Request(
                f"{self.address}/api/v1/{path}", data=data, headers=headers, method=method
            )
            with _opener(self.address).open(request, timeout=timeout) as response:
                told = response.read(MAX_ANSWER)
                _whole(response)
        try:
            answer = json.loads(told)
        except ValueError:
            raise Refused(200, "the answer is not JSON") from None
        if not isinstance(answer, dict):
            raise Refused(200, "the answer is not a JSON object")
        return answer


def _chunks(url: str) -> Iterator[bytes]:
    """What lies at an address, to its end; Unreachable if the connection breaks before."""
    with _failures(), _opener(url).open(url, timeout=CALL_SECONDS) as response:
        while chunk := response.read(CHUNK):
            yield chunk
        _whole(response)


def _whole(response: Any) -> None:
    """IncompleteRead if something is left of an answer that was read: http.client takes an early end for the end."""
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)


@contextmanager
def _failures() -> Iterator[None]:
    """What goes wrong on the way, as one of our two exceptions."""
    try:
        yield
    except urllib.error.HTTPError as error:
        raise Refused(error.code, _words(error)) from None
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(str(getattr(error, "reason", error) or type(error).__name__)) from None
    except ValueError:  # whose text may hold the key
        raise Unreachable("the address or the key holds something that HTTP cannot send") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect means a login page, never our server; and the key must not follow it."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _opener(address: str) -> urllib.request.OpenerDirector:
    direct = [urllib.request.ProxyHandler({})] if is_loopback(address) else []
    return urllib.request.build_opener(_NoRedirect, *direct)


def _words(error: urllib.error.HTTPError) -> str:
    """What the server says, from our error shape; otherwise the status line."""
    try:
        said = json.loads(error.read(64 * 1024))
        text = said.get("detail") or said.get("error") or said.get("message")
        text = text.get("message") if isinstance(text, dict) else text
    except (ValueError, OSError, AttributeError):
        text = None
    return str(text or f"{error.code} {error.reason}")
