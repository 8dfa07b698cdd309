"""The access matrix: every route of the table against everybody who may knock. A route without a rule fails."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tornado.httpclient import HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application

from tests.support.access_rules import RULES, SAMPLE, Ids, Whose
from tests.support.http_server import BOB_KEY, Server, on_server
from tuft_jupyter.core.types import PROTOBUF
from tuft_jupyter.wire.routes import OPENAI_ROUTES, ROUTES, Access, Dialect, Route
from tuft_jupyter_server.hub import HubKeys, HubUser
from tuft_jupyter_server.tinker import openai_handlers

OAI = "/user/alice/tuft/oai/api/v1"
COOKIE = {"Cookie": "username-127-0-0-1=2|alice; _xsrf=2|x", "X-XSRFToken": "2|x"}
TABLE = [*ROUTES, *OPENAI_ROUTES]
GONE = {"SESSION": "00000000-gone", "REQUEST": "lost-request", "SAMPLE": "lost-sample", "KEY": "0" * 12}


def named(session: str, request: str, sample: str, key: str) -> dict[str, str]:
    run = f"{session}:train:0"
    return {
        "SESSION": session, "RUN": run, "SAMPLER": f"{session}:sample:0", "PATH": f"tinker://{run}/weights/n",
        "REQUEST": request, "SAMPLE": sample, "KEY": key,
    }  # fmt: skip


class Tokens:
    """A Hub, as far as a service asks it: whom a token speaks for. The real one: test_jupyterhub."""

    def __init__(self) -> None:
        self.users = {"0ca401": "carol", "0ca402": "carol", "0b0b": "bob"}

    async def user(self, token: str) -> HubUser | None:
        name = self.users.get(token)
        return None if name is None else HubUser(name)

    async def groups(self, name: str) -> frozenset[str]:
        return frozenset()


class World:
    """A server with a tenant, carol, who owns one object of each kind, another, bob, and keys that are no good.

    With ``hub``, carol and bob come with tokens of a Hub.
    """

    def __init__(self, server: Server, hub: Tokens | None) -> None:
        self.server = server
        self.hub = hub
        self.bob = "tml-0b0b" if hub else BOB_KEY
        server.http.stop()
        host = server.host
        self.http = HTTPServer(Application(openai_handlers(OAI, host.api, host.keys, 2**22)))
        socket, self.port = bind_unused_port()
        self.http.add_socket(socket)
        socket, server.port = bind_unused_port()
        server.http.add_socket(socket)

    async def furnish(self) -> None:
        post = self.server.post
        made = {name: await post("/tuft/keys", {"tenant": "carol"}) for name in ("good", "spare", "revoked")}
        made["expired"] = await post("/tuft/keys", {"tenant": "carol", "ttl_seconds": 0})
        await self.server.ask("DELETE", f"/tuft/keys/{made['revoked']['id']}")
        self.keys = {name: key["key"] for name, key in made.items()}
        if self.hub is not None:
            self.keys |= {"good": "tml-0ca401", "revoked": "tml-0ca402", "stranger": "tml-0badc0de"}
            await self.server.ask("GET", "/sessions", key=self.keys["revoked"])
            del self.hub.users["0ca402"]  # the Hub's word of a moment ago does not hold
        carol = self.keys["good"]
        run = await self.server.new_run(carol)
        session = run.split(":")[0]
        saved = [
            await post(verb, {"model_id": run, "path": "n", "seq_id": seq}, carol)
            for seq, verb in ((1, "/save_weights"), (2, "/save_weights_external"))
        ]
        for promise in saved:
            await post("/retrieve_future", {"request_id": promise["request_id"]}, carol)
        opened = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tuft/demo"}
        await post("/create_sampling_session", opened, carol)
        sample = await post("/asample", {**SAMPLE, "sampling_session_id": f"{session}:sample:0"}, carol)
        await self.server.ask("POST", "/retrieve_future", {"request_id": sample["request_id"]}, carol)
        await self.server.host.service.sampling.usage.flush()  # else the next sweep records it
        for checkpoint in self.server.host.ledger.state.checkpoints.values():
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                (Path(checkpoint.directory) / file).write_bytes(b"{}")
        self.ids = named(session, saved[0]["request_id"], sample["request_id"], made["spare"]["id"])
        self.gone = named(*GONE.values())

    async def ask(
        self, route: Route, ids: Ids, key: str | None, headers: dict[str, str] | None = None
    ) -> HTTPResponse:
        rule = RULES[route.method, route.path]
        path = route.path.replace("{kind}", rule.kind).replace("{name}", "n")
        for name in ("session", "run", "sampler", "key"):
            path = path.replace("{" + name + "}", ids[name.upper()])
        path = (
            path.replace("{model}", ids["PATH"].replace("/", "%2F")).replace("{ticket}", "v1.x.y")
            + rule.query
        )
        body = rule.body(ids)
        headers = dict(headers or {})
        if isinstance(body, bytes):
            headers["Content-Type"] = PROTOBUF
        if route.dialect is not Dialect.OPENAI:
            return await self.server.ask(route.method, path, body, key, headers)
        if key is not None:
            headers["Authorization"] = f"Bearer {key or self.server.host.key}"
        sent = None if route.method == "GET" else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}{OAI}{path}"
        return await self.server.client.fetch(
            url, method=route.method, body=sent, headers=headers, raise_error=False
        )

    def state(self) -> str:
        """A digest of everything the server remembers, and of every file it keeps."""
        host = self.server.host
        root = host.service.checkpoints.root
        kept = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        return hashlib.sha256(repr((asdict(host.ledger.state), kept)).encode()).hexdigest()

    def carols(self) -> str:
        """What carol has, as it is remembered."""
        state = self.server.host.ledger.state
        families = (state.sessions, state.runs, state.samplers, state.checkpoints)
        return repr([each for family in families for each in family.values() if each.tenant == "carol"])


Scene = Callable[[Callable[[World], Any]], None]


@pytest.fixture(params=["keys", "tokens of a Hub"])
def in_a_world(tmp_path: Path, request: pytest.FixtureRequest) -> Scene:
    """Both ways of saying who one is; what follows is the same."""
    hub = None if request.param == "keys" else Tokens()
    keys = None if hub is None else HubKeys(hub, {}, max_age=0.0)
    return lambda body: in_one_world(tmp_path, body, hub, keys)


def in_one_world(
    tmp_path: Path, body: Callable[[World], Any], hub: Tokens | None = None, keys: HubKeys | None = None
) -> None:
    async def scenario(server: Server) -> None:
        world = World(server, hub)
        await world.furnish()
        try:
            await body(world)
        finally:
            world.http.stop()

    on_server(tmp_path, scenario, keys=keys, custom_loss_server_side=True)


def test_every_route_has_a_rule_and_every_rule_a_route() -> None:
    """T1: a new route without a rule fails here."""
    assert [(route.method, route.path) for route in TABLE if (route.method, route.path) not in RULES] == []
    assert RULES.keys() == {(route.method, route.path) for route in TABLE}
    for route in TABLE:
        assert (RULES[route.method, route.path].whose is Whose.ANYBODY) == (route.access is not Access.KEY)


def test_who_has_no_good_key_is_told_so_alone_and_leaves_no_trace(in_a_world: Scene) -> None:
    """T1, S1-24: no key, an unknown, a revoked and an expired one, a cookie, a Hub's stranger and a token that it has
    taken back; whether the object exists is not told.
    """

    async def body(world: World) -> None:
        before = world.state()
        strangers = [(None, {}, 401), (None, COOKIE, 401), ("tml-unknown", {}, 403)]
        strangers += [(world.keys[name], {}, 403) for name in world.keys if name not in ("good", "spare")]
        for route in TABLE:
            if route.access is not Access.KEY:
                continue
            for key, headers, status in strangers:
                here = await world.ask(route, world.ids, key, headers)
                gone = await world.ask(route, world.gone, key, headers)
                assert here.code == gone.code == status, (route.method, route.path, key, here.body)
                assert here.body == gone.body, (route.method, route.path)
                assert "Set-Cookie" not in here.headers
        assert world.state() == before

    in_a_world(body)


def test_what_belongs_to_somebody_else_answers_like_what_does_not_exist(in_a_world: Scene) -> None:
    """P2, S1-01, T1, T2, M3: every route that names an object, with carol's ids in bob's hands, who comes with a key or
    his own token of the Hub: the same bytes, no change.
    """

    async def body(world: World) -> None:
        before = world.state()
        asked = 0
        for route in TABLE:
            if RULES[route.method, route.path].whose is not Whose.OWN:
                continue
            foreign = await world.ask(route, world.ids, world.bob)
            missing = await world.ask(route, world.gone, world.bob)
            said = [answer.body.decode() for answer in (foreign, missing)]
            for name in sorted(world.ids, key=lambda name: -len(world.ids[name])):
                said = [said[0].replace(world.ids[name], name), said[1].replace(world.gone[name], name)]
            assert foreign.code == missing.code, (route.method, route.path, said)
            assert 400 <= foreign.code < 500, (route.method, route.path, said)
            assert foreign.code not in (402, 409)
            assert said[0] == said[1], (route.method, route.path)
            assert world.state() == before, (route.method, route.path)
            asked += 1
        assert asked > 30

    in_a_world(body)


def test_what_is_about_the_caller_tells_bob_nothing_of_carol(in_a_world: Scene) -> None:
    """T1, T2."""

    async def body(world: World) -> None:
        before = world.carols()
        for route in TABLE:
            rule = RULES[route.method, route.path]
            if rule.whose is not Whose.TENANT or route.endpoint == "revoke_key":
                continue
            answer = await world.ask(route, world.ids, world.bob)
            assert answer.code == 200, (route.method, route.path, answer.body)
            told = answer.body.decode()
            assert "carol" not in told, (route.method, route.path)
            for name in ("SESSION", "KEY", "REQUEST", "SAMPLE"):
                assert world.ids[name] not in told, (route.method, route.path, name)
        assert world.carols() == before

    in_a_world(body)


def test_what_is_for_admins_is_refused_to_tenants(in_a_world: Scene) -> None:
    """T1."""

    async def body(world: World) -> None:
        before = world.state()
        for route in TABLE:
            if RULES[route.method, route.path].whose is Whose.ADMIN:
                for key in (world.bob, world.keys["good"]):
                    assert (await world.ask(route, world.ids, key)).code == 403, (route.method, route.path)
        assert world.state() == before

    in_a_world(body)


ENDS = {"finish_session", "unload_model", "delete_checkpoint", "revoke_key", "forward", "forward_backward"}
"""Verbs after which a world is of no more use to others."""


@pytest.mark.parametrize("verb", ["all others", *sorted(ENDS)])
def test_the_owner_is_answered(tmp_path: Path, verb: str) -> None:
    """T1: the success of every row, so that the refusals above mean something."""

    async def body(world: World) -> None:
        if verb in ("forward", "forward_backward"):  # the scripted engine does not read bodies
            world.server.host.engines.trainer.gate.clear()
        for route in TABLE:
            if route.endpoint != verb and (verb in ENDS or route.endpoint in ENDS):
                continue
            rule = RULES[route.method, route.path]
            key = {Whose.ADMIN: "", Whose.ANYBODY: None}.get(rule.whose, world.keys["good"])
            answer = await world.ask(route, world.ids, key)
            status = 403 if route.access is Access.SIGNED else 200  # a good address is tried in test_transfer
            assert answer.code == status, (route.method, route.path, answer.body)

    in_one_world(tmp_path, body)


def test_names_that_climb_lead_nowhere(tmp_path: Path) -> None:
    """T2: names that climb, in every place of a path, are refused alike and change nothing."""

    async def body(world: World) -> None:
        before = world.state()
        for name in (
            "..",
            "%2e%2e%2fn",
            "n%00",
            "n%2F..%2Fn",
            "x" * 4096,
            "%C0%AE%C0%AE",
            "tinker:%2F%2F..%2F..",
        ):
            for method, ending in (("DELETE", ""), ("GET", "/archive"), ("POST", "/publish")):
                path = f"/training_runs/{world.ids['RUN']}/checkpoints/weights/{name}{ending}"
                answer = await world.server.ask(method, path, key=world.keys["good"])
                assert 400 <= answer.code < 500, (name, answer.code)
        assert world.state() == before

    in_one_world(tmp_path, body)
