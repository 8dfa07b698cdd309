"""``tuft keys``: keys of a server, asked of the server itself or, where none runs, written into its journal.

A key is printed once, when it is made; everything else speaks of it by its id. Nothing here ever puts a key into an
argument of a process.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from typing import Any

from tuft_jupyter.config import Settings, config_file, load_settings
from tuft_jupyter.core.errors import UserError

ACTIONS = ("list", "create", "expire", "revoke")
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def add_parser(verbs: Any) -> None:
    keys = verbs.add_parser("keys", help="make, list, end and revoke keys")
    keys.add_argument("action", choices=ACTIONS, nargs="?", default="list")
    keys.add_argument("what", nargs="?", help="a tenant (create), or the id of a key (expire, revoke)")
    keys.add_argument("--name", default="", help="what the key is for")
    keys.add_argument("--expires", metavar="TIME", help="its end from now: 90s, 30m, 12h, 30d, or never")
    keys.add_argument("--admin", action="store_true", help="the key may see and stop what belongs to others")
    keys.add_argument("--address", metavar="URL", help="of the server (default: the one that is found)")
    keys.add_argument(
        "--offline", action="store_true", help="write into the journal of a server that is down"
    )
    keys.add_argument("--config", "-c", metavar="FILE", help="the configuration of that server")


def run(options: argparse.Namespace) -> int:
    if options.action != "list" and not options.what:
        needed = "a tenant" if options.action == "create" else "the id of a key (`tuft keys list`)"
        print(f"tuft: keys {options.action} needs {needed}", file=sys.stderr)
        return 2
    book = _server(options) or _Journal(options)
    seconds = _seconds(options.expires)
    match options.action:
        case "create":
            made = book.create(options.what, options.name, seconds, options.admin)
            print(made["key"], flush=True)  # alone, so that KEY=$(tuft keys create NAME) is the key
            print(f"id {made['id']}, for {made['tenant']}; it is not shown again", file=sys.stderr)
        case "expire":
            if options.expires is None:
                raise UserError("--expires: say when, such as 1h, or never")
            print(_line(book.expire(options.what, seconds)))
        case "revoke":
            book.revoke(options.what)
            print(f"{options.what} is revoked")
        case _:
            print("\n".join(_line(key) for key in book.listed()))
    return 0


class _Server:
    """A running server's keys."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def listed(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._call("GET", "tuft/keys", None)["keys"]
        return found

    def create(self, tenant: str, name: str, seconds: float | None, admin: bool) -> dict[str, Any]:
        body = {"tenant": tenant, "name": name, "ttl_seconds": seconds, "admin": admin}
        return self._call("POST", "tuft/keys", body)

    def expire(self, key: str, seconds: float | None) -> dict[str, Any]:
        return self._call("PUT", f"tuft/keys/{key}", {"ttl_seconds": seconds})

    def revoke(self, key: str) -> None:
        self._call("DELETE", f"tuft/keys/{key}", None)

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        from tuft_jupyter.kernel.client import Refused, Unreachable

        try:
            answer: dict[str, Any] = self._client.call(method, path, body)
        except (Refused, Unreachable) as error:
            raise UserError(f"{self._client.address}: {error}") from None
        return answer


class _Journal:
    """The same in the journal of a server that is not running."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.settings = load_settings(options.config or config_file())
        if not self.settings.persistence.enabled:
            raise UserError(
                "no server is running, and its configuration keeps no journal (persistence: disabled) in which "
                "keys could be kept: start it, or choose persistence.mode file_redis"
            )

    def listed(self) -> list[dict[str, Any]]:
        from tuft_jupyter.core.keys import as_json

        async def work(book: Any, owner: Any) -> Any:
            return [as_json(key) for key in book.listed(owner)]

        return self._do(work)  # type: ignore[no-any-return]

    def create(self, tenant: str, name: str, seconds: float | None, admin: bool) -> dict[str, Any]:
        from tuft_jupyter.core.keys import as_json

        async def work(book: Any, owner: Any) -> Any:
            key, kept = await book.create(owner, tenant, name, seconds, admin=admin)
            return {**as_json(kept), "key": key}

        return self._do(work)  # type: ignore[no-any-return]

    def expire(self, key: str, seconds: float | None) -> dict[str, Any]:
        from tuft_jupyter.core.keys import as_json

        async def work(book: Any, owner: Any) -> Any:
            return as_json(await book.expire(owner, key, seconds))

        return self._do(work)  # type: ignore[no-any-return]

    def revoke(self, key: str) -> None:
        async def work(book: Any, owner: Any) -> Any:
            await book.revoke(owner, key)

        self._do(work)

    def _do(self, work: Any) -> Any:
        return asyncio.run(_with_book(self.settings, work))


async def _with_book(settings: Settings, work: Any) -> Any:
    from tuft_jupyter_server.host import Host

    host = Host(settings)
    await host.ledger.open()
    try:
        host.keybook.recovered()
        return await work(host.keybook, host.owner)
    finally:
        await host.ledger.close()


def _server(options: argparse.Namespace) -> _Server | None:
    """The server that is meant, None where none runs."""
    from tuft_jupyter.kernel.discovery import discover

    if options.offline:
        return None
    found = discover(options.address, None, note=lambda text: print(f"tuft: {text}", file=sys.stderr))
    return None if found is None else _Server(found.client)


def _seconds(text: str | None) -> float | None:
    if text in (None, "never"):
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text or "")
    if match is None:
        raise UserError(f"--expires: {text!r} is no time: write 90s, 30m, 12h, 30d or never")
    return float(match[1]) * UNITS[match[2]]


def _line(key: dict[str, Any]) -> str:
    if key["revoked"]:
        end = "revoked"
    elif key["expires"] is None:
        end = "no end"
    else:
        word = "expires" if key["expires"] > time.time() else "expired"
        end = f"{word} {time.strftime('%Y-%m-%d %H:%M', time.localtime(key['expires']))}"
    words = [key["id"], key["tenant"], end, key["source"], "admin" if key["admin"] else "", key["name"]]
    return "  ".join(word for word in words if word)
