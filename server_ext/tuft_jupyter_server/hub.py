"""A service of JupyterHub: one server that owns the GPUs for all users of the Hub (``tuft hub-service``).

The handlers are those of every other server; only the keys differ. A Hub token with ``tml-`` before it is a key here,
because the Tinker SDK wants keys to begin like that; the Hub is asked whom it speaks for and whether it may use this
service. Tokens are not stored, so a client simply goes on after a restart of the service. The Hub's user is the tenant,
its groups choose the limits, and its admins may see and stop what belongs to others. Admins may also issue keys.

Promises: a token that the Hub no longer knows is refused after :attr:`HubKeys.max_age` seconds at most, also while a
request with it is waiting; while the Hub cannot be reached, or takes longer than :data:`SILENT_SECONDS`, tokens that it
confirmed in the last five minutes stay valid.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from jupyterhub.services.auth import HubAuth
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.web import HTTPError

from tuft_jupyter.config import ConfigError, Settings
from tuft_jupyter.core.access import ActiveKey, KeyRing, digest
from tuft_jupyter.core.errors import Forbidden, Overloaded
from tuft_jupyter.core.types import Principal
from tuft_jupyter.home import KEY_PREFIX
from tuft_jupyter_server import daemon
from tuft_jupyter_server.host import Host

log = logging.getLogger("tuft_jupyter.hub")

ADMIN_SCOPE = "custom:tuft:admin"
GRACE_SECONDS = 300.0
"""How long tokens that the Hub confirmed stay valid while it cannot be reached."""
SILENT_SECONDS = 3.0
"""How long the Hub may take to confirm one of those again; and it is left alone as long after it took longer."""
REFUSED_SECONDS = 5.0
REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class HubUser:
    name: str
    admin: bool = False
    groups: frozenset[str] = frozenset()


class Hub(Protocol):
    async def user(self, token: str) -> HubUser | None:
        """Whom a token speaks for, None if it may not use this service; OSError if the Hub does not answer."""

    async def groups(self, name: str) -> frozenset[str]:
        """The groups of a user, none for a name that is no user's; OSError if the Hub does not answer."""


class JupyterHub:
    """The Hub this service belongs to, by its REST API.

    Groups and the admin flag are asked for with the service's own token: one of a user's may be too narrow to tell.
    """

    def __init__(self) -> None:
        self.auth = HubAuth(cache_max_age=0)
        self._http = AsyncHTTPClient(force_instance=True, max_clients=50)

    async def user(self, token: str) -> HubUser | None:
        try:
            model = await self.auth.user_for_token(token, use_cache=False, sync=False)
        except (HTTPError, OSError, ValueError) as error:  # no JSON: the page of a proxy in the Hub's place
            raise OSError(f"JupyterHub does not answer: {error}") from None
        if not model or model.get("kind") != "user":
            return None
        if not self.auth.check_scopes(self.auth.access_scopes, model):
            return None
        known = await self._known(model["name"])
        admin = bool(known.get("admin")) or ADMIN_SCOPE in model.get("scopes", ())
        return HubUser(model["name"], admin, frozenset(known.get("groups", ())))

    async def groups(self, name: str) -> frozenset[str]:
        return frozenset((await self._known(name)).get("groups", ()))

    async def _known(self, name: str) -> Mapping[str, Any]:
        """What the Hub tells the service of a user; nothing without the scope ``read:users``."""
        tls = {
            "ca_certs": self.auth.client_ca,
            "client_key": self.auth.keyfile,
            "client_cert": self.auth.certfile,
        }
        request = HTTPRequest(
            f"{self.auth.api_url}/users/{quote(name, safe='')}",
            headers={"Authorization": f"token {self.auth.api_token}"},
            **{option: path for option, path in tls.items() if path},
        )
        try:
            answer = await self._http.fetch(request, raise_error=False)
        except OSError as error:
            raise OSError(f"JupyterHub does not answer: {error}") from None
        if answer.code >= 500:
            raise OSError(f"JupyterHub answers {answer.code}")
        if answer.code == 404:
            log.info("JupyterHub tells nothing of %s: no user of it, or none that the service may read", name)
            return {}
        if answer.code != 200:
            log.warning(
                "JupyterHub does not tell groups and admins (%s): give the service read:users", answer.code
            )
            return {}
        try:
            found: Mapping[str, Any] = json.loads(answer.body)
        except ValueError:
            raise OSError("JupyterHub does not answer: what came in its place is no JSON") from None
        return found


class HubKeys(KeyRing):
    """Keys issued here, and the Hub's tokens.

    ``groups`` is kept up to date with the groups a tenant is in, whichever of the two it comes with: limits are a
    tenant's, not a key's.
    """

    def __init__(
        self,
        hub: Hub,
        groups: MutableMapping[str, frozenset[str]],
        max_age: float,
        signed: Callable[[str, Iterable[str]], str | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(signed)
        self.hub = hub
        self.groups = groups
        self.max_age = max_age
        self._now = clock
        self._vouched: OrderedDict[str, tuple[str, float]] = OrderedDict()
        """digest of the key -> the Hub's token, and when the Hub last vouched for it"""
        self._refused: OrderedDict[str, float] = OrderedDict()
        self._grouped: OrderedDict[str, float] = OrderedDict()
        """tenant with a key that was issued here -> when the Hub last told its groups"""
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._silent = -1e9
        """when the Hub last did not answer about a token that it had vouched for"""

    async def authenticate(self, key: str | None) -> ActiveKey:
        known = digest(key or "")
        if known not in self._vouched:
            try:
                found = await super().authenticate(key)
            except Forbidden:
                if self._refused.get(known, -1e9) > self._now() - REFUSED_SECONDS:
                    raise
            else:
                known = found.digest  # a signed token stands for a key, which may be one of the Hub's
                if known not in self._vouched:
                    await self._group(found.principal)
                    return self.active(key)
        token, since = self._vouched.get(known, ((key or "").removeprefix(KEY_PREFIX), -1e9))
        if self._stale(since):
            await self._ask(known, self._learn(known, token))
        return self.active(key)

    async def look_again(self) -> None:
        """Ask the Hub anew about tokens under which something is being served; for ever."""
        while True:
            await asyncio.sleep(min(1.0, self.max_age / 2))
            stale = [(k, token) for k, (token, since) in self._vouched.items() if self._stale(since)]
            for known, token in stale:
                if self.serving(known):
                    try:
                        await self._ask(known, self._learn(known, token))
                    except Overloaded as error:
                        log.warning("%s", error.message)
                    except Exception:  # one that ended this loop would keep every token good that is in use
                        log.exception("JupyterHub could not be asked about a token")

    def _stale(self, since: float) -> bool:
        """Whether the Hub, which vouched for a token then, is to be asked again."""
        now = self._now()
        left_alone = now - self._silent < SILENT_SECONDS and now - since < GRACE_SECONDS
        return now - since > self.max_age and not left_alone

    async def _ask(self, about: str, question: Coroutine[Any, Any, None]) -> None:
        """One question at a time about each token or tenant, however many requests come with it."""
        task = self._asking.get(about)
        if task is None:
            task = self._asking[about] = asyncio.get_running_loop().create_task(question)
            task.add_done_callback(lambda _: self._asking.pop(about, None))
        else:
            question.close()
        await asyncio.shield(task)

    async def _group(self, principal: Principal) -> None:
        """Know the groups of a tenant who comes with a key that was issued here; of admins nothing is asked."""
        since = self._grouped.get(principal.tenant, -1e9)
        if not principal.admin and self._now() - since > self.max_age:
            await self._ask(f"user {principal.tenant}", self._learn_groups(principal.tenant))

    async def _learn_groups(self, tenant: str) -> None:
        try:
            self.groups[tenant] = await self.hub.groups(tenant)
        except OSError as error:  # the key is good all the same; the groups of a moment ago hold
            log.warning("%s; the limits of %s stay as they were", error, tenant)
        _remember(self._grouped, tenant, self._now())

    async def _learn(self, known: str, token: str) -> None:
        now = self._now()
        grace = now - self._vouched.get(known, ("", -1e9))[1] < GRACE_SECONDS
        try:
            async with asyncio.timeout(SILENT_SECONDS if grace else None):
                user = await self.hub.user(token)
        except OSError as error:
            if grace:
                self._silent = self._now()
                log.warning("%s; a user it vouched for before goes on", str(error) or "JupyterHub is silent")
                return
            raise Overloaded(f"{error}: wait until it is back", 5.0) from None
        if user is None:
            self._vouched.pop(known, None)
            self.forget(known)
            _remember(self._refused, known, now)
            return
        self.groups[user.name] = user.groups
        _remember(self._vouched, known, (token, now))
        self.admit(known, Principal(user.name, user.admin))
        if len(self._vouched) >= REMEMBERED:
            oldest, _ = self._vouched.popitem(last=False)
            self.forget(oldest)


def _remember(table: OrderedDict[str, Any], key: str, value: Any) -> None:
    table[key] = value
    table.move_to_end(key)
    while len(table) > REMEMBERED:
        table.popitem(last=False)


def serve(settings: Settings) -> None:
    """Serve below the service's prefix until the Hub says stop. ConfigError outside a Hub's service."""
    prefix, url = os.environ.get("JUPYTERHUB_SERVICE_PREFIX"), os.environ.get("JUPYTERHUB_SERVICE_URL")
    if not prefix or not url or not os.environ.get("JUPYTERHUB_API_TOKEN"):
        raise ConfigError(
            "tuft hub-service is started by JupyterHub, or with the variables it sets: JUPYTERHUB_SERVICE_PREFIX, "
            "JUPYTERHUB_SERVICE_URL, JUPYTERHUB_API_URL and JUPYTERHUB_API_TOKEN (see docs/jupyterhub.md)"
        )
    where = urlsplit(url)
    settings = replace(
        settings,
        host=where.hostname or settings.host,
        port=where.port or settings.port,
        public_url=settings.public_url or os.environ.get("JUPYTERHUB_PUBLIC_URL", ""),
    )
    asyncio.run(_serve(settings, prefix.rstrip("/")))


async def _serve(settings: Settings, prefix: str) -> None:
    name = os.environ.get("JUPYTERHUB_SERVICE_NAME", "tuft")
    owner = Principal(f"service:{name}", admin=True)  # no Hub user is called so
    groups: dict[str, frozenset[str]] = {}
    keys = HubKeys(JupyterHub(), groups, settings.hub_cache_seconds)
    host = Host(settings, owner=owner, keys=keys, groups=groups)
    looking = asyncio.get_running_loop().create_task(keys.look_again())
    try:
        await daemon.serve_host(host, prefix)
    finally:
        looking.cancel()
