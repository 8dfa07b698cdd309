"""A real JupyterHub with configurable-http-proxy on loopback ports of its own, driven by its REST API.

The configuration is one of ``examples/jupyterhub`` as it is, followed by what a test machine needs: no accounts of the
operating system, ports, paths. ``Hub.user`` makes users, ``Hub.start`` their servers.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.support.live import ROOT, environment

START_SECONDS = 90.0
EXAMPLES = ROOT / "examples" / "jupyterhub"

TAIL = """
import os, sys
c = get_config()
load_subconfig({example!r})
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.Authenticator.any_allow_config = True
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = {work!r} + "/homes/{{username}}"
c.Spawner.args = ["--allow-root"]
c.Spawner.environment.update({spawner_env!r})
c.Spawner.start_timeout = c.Spawner.http_timeout = 120
c.Spawner.ip = "127.0.0.1"

def choose(spawner):
    if {cmd!r} and not spawner.user.name.startswith("real"):
        spawner.cmd = {cmd!r}

c.Spawner.pre_spawn_hook = choose
c.JupyterHub.bind_url = "http://127.0.0.1:{port}"
c.JupyterHub.hub_bind_url = "http://127.0.0.1:{hub_port}"
c.ConfigurableHTTPProxy.command = {proxy!r}
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{api_port}"
c.ConfigurableHTTPProxy.auth_token = os.environ["TEST_PROXY_TOKEN"]
c.JupyterHub.db_url = "sqlite:///{work}/hub.sqlite"
c.JupyterHub.cookie_secret_file = "{work}/cookie_secret"
c.JupyterHub.concurrent_spawn_limit = 50
c.JupyterHub.active_server_limit = 0
c.JupyterHub.log_level = "WARN"
c.JupyterHub.allow_named_servers = False
c.Authenticator.admin_users = {admins!r}
services = list(c.JupyterHub.services)
for service in services:
    if service["name"] == "tuft":
        service["url"] = "http://127.0.0.1:{service_port}"
        service["command"] = [sys.executable, "-m", "tuft_jupyter_server", "hub-service"]
        service["environment"] = {{**service["environment"], **{service_env!r}}}
c.JupyterHub.services = [s for s in services if s["name"] != "idle-culler"]
c.JupyterHub.services.append({{"name": "tests", "api_token": os.environ["TEST_HUB_TOKEN"]}})
c.JupyterHub.load_roles = [r for r in c.JupyterHub.load_roles if r["name"] != "idle-culler"]
c.JupyterHub.load_roles.append(
    {{"name": "tests", "services": ["tests"], "scopes": ["admin:users", "admin:servers", "tokens", "groups",
      "admin:groups", "access:servers", "access:services"]}})
"""


def proxy_command() -> list[str] | None:
    """configurable-http-proxy, as ``npm ci`` or the environment has it; None where there is none."""
    local = ROOT / "node_modules" / ".bin" / "configurable-http-proxy"
    found = str(local) if local.exists() else shutil.which("configurable-http-proxy")
    return [found] if found else None


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass
class Hub:
    """``cmd`` replaces ``jupyterhub-singleuser`` for users whose names do not begin with "real"; ``service_env`` and
    ``spawner_env`` add to the example's environments.
    """

    example: str
    work: Path
    cmd: list[str] = field(default_factory=list)
    admins: set[str] = field(default_factory=set)
    service_env: Mapping[str, str] = field(default_factory=dict)
    spawner_env: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    token: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)

    def __enter__(self) -> Self:
        proxy = proxy_command()
        assert proxy is not None
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / "homes").mkdir(exist_ok=True)
        port, hub_port, api_port, service_port = free_ports(4)
        self.url = f"http://127.0.0.1:{port}"
        self.service = f"{self.url}/services/tuft"
        kept = environment(self.work)
        shared = {
            name: kept[name] for name in ("PYTHONPATH", "HF_ENDPOINT", "TINKER_TELEMETRY", "OMP_NUM_THREADS")
        }
        scripts = Path(sys.executable).parent  # jupyterhub-singleuser is there, whoever started the tests
        shared |= {"PATH": os.pathsep.join([str(scripts), os.environ["PATH"]])}
        config = self.work / "jupyterhub_config.py"
        config.write_text(
            TAIL.format(
                example=str(EXAMPLES / self.example),
                work=str(self.work),
                cmd=self.cmd,
                admins=self.admins,
                proxy=proxy,
                port=port,
                hub_port=hub_port,
                api_port=api_port,
                service_port=service_port,
                service_env={**shared, **self.service_env},
                spawner_env={**shared, **self.spawner_env},
            )
        )
        env = {
            **kept,
            "TUFT_EXAMPLE_PROXY": self.url,
            "TUFT_EXAMPLE_HOME": str(self.work / "service"),
            "TEST_HUB_TOKEN": self.token,
            "TEST_PROXY_TOKEN": secrets.token_hex(16),
        }
        env.pop("TUFT_HOME")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jupyterhub", "-f", str(config)],
                env=env, cwd=self.work, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    @property
    def log(self) -> Path:
        return self.work / "hub.log"

    def __exit__(self, *_: object) -> None:
        """Ask the Hub to stop; it takes proxy, service and users' servers with it."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(100)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def api(self, method: str, path: str, body: Any = None, token: str = "") -> Any:
        return self._ask(
            method, f"{self.url}/hub/api/{path}", body, {"Authorization": f"token {token or self.token}"}
        )

    def tuft(self, method: str, path: str, token: str | None, body: Any = None) -> Any:
        """One call of the shared service's API, as a kernel would make it with its Hub token."""
        headers = {} if token is None else {"X-API-Key": f"tml-{token}"}
        return self._ask(method, f"{self.service}/api/v1/{path}", body, headers)

    def user(self, name: str) -> str:
        """Make a user; returns a token that inherits all of its permissions."""
        if name not in self.admins:  # those are there from the start
            self.api("POST", f"users/{name}", {})
        return self.mint(name)

    def mint(self, name: str, scopes: list[str] | None = None, seconds: int = 3600) -> str:
        body: dict[str, Any] = {"expires_in": seconds, "note": "test"}
        if scopes is not None:
            body["scopes"] = scopes
        return str(self.api("POST", f"users/{name}/tokens", body)["token"])

    def start(self, name: str, wait: bool = True) -> None:
        self.api("POST", f"users/{name}/server", {})
        while wait and not self.api("GET", f"users/{name}")["servers"].get("", {}).get("ready"):
            time.sleep(0.1)

    def stop(self, name: str) -> None:
        self.api("DELETE", f"users/{name}/server")

    def _ask(self, method: str, url: str, body: Any, headers: Mapping[str, str]) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            url, data=data, headers={"Content-Type": "application/json", **headers}, method=method
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        ready = [f"{self.url}/hub/api/"]
        if "shared" in self.example:
            ready.append(f"{self.service}/api/v1/healthz")
        while ready:
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Hub did not start:\n{self.log.read_text()[-4000:]}")
            try:
                self._ask("GET", ready[0], None, {})
                ready.pop(0)
            except (OSError, ValueError):
                time.sleep(0.1)
