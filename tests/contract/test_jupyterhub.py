"""A real JupyterHub: users' own servers, and one shared service that owns the engine for everybody."""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.run_on_server import Kernel, Server
from tests.support.hub_trial import everybody
from tests.support.hubs import Hub, proxy_command
from tests.support.live import standing_still, until

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(proxy_command() is None, reason="configurable-http-proxy is missing: npm ci"),
]
STEPS = 12
CAPABILITIES = """
%load_ext tuft_jupyter
%tuft init
import tinker, os
offered = [m.model_name for m in tinker.ServiceClient().get_server_capabilities().supported_models]
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """The Hub of examples/jupyterhub/shared_service.py, its users' kernels at work by themselves."""
    work = tmp_path_factory.mktemp("hub")
    made = Hub(
        "shared_service.py",
        work,
        cmd=[sys.executable, "-m", "tests.support.hub_user"],
        admins={"root"},
        service_env={"TUFT_HUB_CACHE_SECONDS": "1"},
        spawner_env={"TEST_STEPS": str(STEPS)},
    )
    with made:
        yield made


def status(hub: Hub, token: str | None, path: str = "sessions") -> int:
    try:
        hub.tuft("GET", path, token)
    except urllib.error.HTTPError as refused:
        return refused.code
    return 200


def kernel_of(hub: Hub, user: str, token: str) -> Kernel:
    """A kernel on a user's own server, reached as a browser would: through the Hub's proxy."""
    server = Server(hub.work, hub.work, token=token)
    server.url = f"{hub.url}/user/{user}/"
    return Kernel(server)


def test_S0_10_each_user_has_a_server_of_their_own(tmp_path: Path) -> None:
    """S0-10: `%tuft init` behind /user/NAME/, for two users, whose servers know nothing of each other."""
    with Hub("own_servers.py", tmp_path) as hub:
        addresses = {}
        for name in ("real-ann", "real-ben"):
            token = hub.user(name)
            hub.start(name)
            with kernel_of(hub, name, token) as kernel:
                kernel.run(CAPABILITIES)
                assert kernel.value("offered") == ["tuft/demo"]
                addresses[name] = kernel.value("os.environ['TINKER_BASE_URL']")
                assert kernel.value("tinker.ServiceClient().create_rest_client() is not None")
        assert addresses["real-ann"].endswith("/user/real-ann/tuft")
        assert addresses["real-ben"].endswith("/user/real-ben/tuft")


def test_S0_10_a_kernel_finds_the_shared_service_with_no_key_typed(hub: Hub) -> None:
    """S0-10, S0-23, S0-43: in a real single-user server, with and without `%tuft init`; it outlives that server."""
    token = hub.user("real-zoe")
    hub.start("real-zoe")
    with kernel_of(hub, "real-zoe", token) as kernel:
        kernel.run("import tinker, os; client = tinker.ServiceClient()")
        kernel.run("seen = client.get_server_capabilities().supported_models[0].model_name")
        assert kernel.value("seen") == "tuft/demo"
        assert kernel.value("os.environ['TINKER_BASE_URL']") == hub.service
        kernel.run(CAPABILITIES)
        assert kernel.value("offered") == ["tuft/demo"]
        kernel.run("from tuft_jupyter.kernel import connect; status = connect.current().status()")
        assert kernel.value("status['tenant']") == "real-zoe"
        panel = kernel.server.request("GET", "tuft/lab/state")
        assert panel["status"]["tenant"] == "real-zoe"
        shown = {session["id"] for session in panel["state"]["sessions"]}
        assert shown == set(hub.tuft("GET", "sessions", token)["sessions"]), "the panel shows the service's"
    hub.stop("real-zoe")
    assert hub.tuft("GET", "healthz", None)["status"] == "ok"


def test_the_hub_says_who_one_is_and_who_may(hub: Hub) -> None:
    """T1: tokens by scope and user; nobody's token, a stranger's and a revoked one are refused."""
    token, root = hub.user("ann"), hub.user("root")
    assert hub.tuft("GET", "tuft/status", token)["tenant"] == "ann"
    assert status(hub, hub.mint("ann", ["access:services!service=tuft"])) == 200
    assert status(hub, hub.mint("ann", ["read:users!user"])) == 403
    assert status(hub, "0123456789abcdef") == 403
    assert status(hub, None) == 401
    assert status(hub, hub.token) == 403, "a service of the Hub is no user"
    assert "admins" in refused(hub, token, {"tenant": "ann"})
    made = hub.tuft("POST", "tuft/keys", root, {"tenant": "ann", "name": "for a script"})
    assert hub.tuft("GET", "tuft/status", made["key"].removeprefix("tml-"))["tenant"] == "ann"


def refused(hub: Hub, token: str, body: dict[str, str]) -> str:
    with pytest.raises(urllib.error.HTTPError) as error:
        hub.tuft("POST", "tuft/keys", token, body)
    return str(json.loads(error.value.read())["error"])


def test_everybody_trains_at_once_fairly_and_alone_and_admins_see_and_stop_it(hub: Hub) -> None:
    """T2, T12, L6: through the environment of their own kernels; `make hub-trial` is the same with thirty users."""
    outcome = everybody(hub, 4, STEPS)
    assert not outcome.errors
    assert outcome.finished == 4
    assert outcome.fairness >= 0.95
    assert outcome.trespasses == 0
    root = hub.mint("root")
    seen = hub.tuft("GET", "tuft/state?tenant=*", root)["state"]["runs"]
    assert {run["tenant"] for run in seen} >= {f"user{n:02d}" for n in range(4)}
    own = hub.tuft("GET", "tuft/state?tenant=*", hub.mint("user00"))["state"]["runs"]
    assert {run["tenant"] for run in own} == {"user00"}
    run = next(run["id"] for run in seen if run["tenant"] == "user01")
    stopped = hub.tuft("POST", "unload_model", root, {"model_id": run})
    hub.tuft("POST", "retrieve_future", root, {"request_id": stopped["request_id"]})
    runs = hub.tuft("GET", "tuft/state", hub.mint("user01"))["state"]["runs"]
    assert [each["status"] for each in runs] == ["closed"]


def test_a_culled_server_s_training_goes_on(hub: Hub) -> None:
    """F19: what its kernel had sent is done, though nobody is there any more."""
    token = hub.user("long-cara")
    (hub.work / "homes" / "go").touch()
    hub.start("long-cara")
    home = hub.work / "homes" / "long-cara"
    until(lambda: (home / "begun").exists(), 120, "the first step was sent")
    run = (home / "begun").read_text()
    until(lambda: state(hub, token, run)["pending"] > 10, 60, "more is sent than is done")
    assert hub.process is not None
    with standing_still(hub.process.pid, "TrainingActor"):  # however long the Hub takes to stop a server
        hub.stop("long-cara")
        before = state(hub, token, run)
    assert not (home / "result.json").exists(), "it was culled in the middle"
    until(lambda: state(hub, token, run)["pending"] == 0, 120, "what was accepted is done")
    done = state(hub, token, run)
    assert before["pending"] > 0
    assert done["step"] > before["step"]
    assert done["status"] == "ready"


def state(hub: Hub, token: str, run: str) -> dict[str, Any]:
    runs = hub.tuft("GET", "tuft/state", token)["state"]["runs"]
    return next(each for each in runs if each["id"] == run)  # type: ignore[no-any-return]


def test_a_token_that_is_revoked_at_the_hub_stops_here_also_where_a_poll_is_parked(hub: Hub) -> None:
    """T7: within the seconds for which the Hub's word is believed, and one."""
    hub.user("dan")
    made = hub.api("POST", "users/dan/tokens", {"expires_in": 600, "note": "to be revoked"})
    token = made["token"]
    session = hub.tuft("POST", "create_session", token, {})["session_id"]
    sampler = hub.tuft(
        "POST",
        "create_sampling_session",
        token,
        {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tuft/demo"},
    )["sampling_session_id"]
    poll = {"target": {"type": "sampling_session", "sampling_session_id": sampler}, "timeout": 20}
    ended: list[int] = []

    def parked() -> None:
        try:
            hub.tuft("POST", "retrieve_futures", token, poll)
        except urllib.error.HTTPError as error:
            ended.append(error.code)

    polling = threading.Thread(target=parked)
    polling.start()
    hub.api("DELETE", f"users/dan/tokens/{made['id']}")
    began = time.monotonic()
    polling.join(15)
    assert ended == [403]
    assert time.monotonic() - began < 5.0
    assert status(hub, token) == 403
