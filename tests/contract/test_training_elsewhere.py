"""Training on another server of ours, through the stock SDK: the same bits, each op once, whoever is restarted."""

from __future__ import annotations

import asyncio
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.run_on_server import Server
from tests.support.elsewhere import Client, Daemon, Seen, direct, names_in, scenario, trainer_of
from tests.support.live import ask, environment, key_of, until
from tests.support.server_configs import EXAMPLE, MODEL, changed
from tests.support.stub_vllm import StubVllm
from tuft_jupyter.core.service import Service
from tuft_jupyter.core.snapshots import SnapshotRule
from tuft_jupyter.engine.remote import http

STEPS = 3


def test_training_and_sampling_there_give_the_same_bits_as_without_us(tmp_path: Path) -> None:
    """S4-05, S4-28, S4-29, S2-36: mode 2; forward_backward, optim_step and the sample reach the training server."""

    async def check() -> None:
        async with Daemon(tmp_path / "there") as there:
            expected = await asyncio.to_thread(direct, there, STEPS)
            before = len(there.asked)
            async with Daemon(tmp_path / "here", trainer_of(there)) as here:
                client = await asyncio.to_thread(Client, here)
                seen = await asyncio.to_thread(client.steps, STEPS)
                tokens = await asyncio.to_thread(client.sampled)
                assert Seen(seen.bits, seen.losses, tokens) == expected
                sent = there.asked[before:]
                for path, count in (("/forward_backward", STEPS), ("/optim_step", STEPS), ("/asample", 1)):
                    assert sent.count(f"POST {path}") == count

    scenario(check)


def test_a_checkpoint_made_there_is_loaded_again_with_its_optimizer(tmp_path: Path) -> None:
    """S4-29: save and load of state go there; the adapter's files come here."""

    async def check() -> None:
        async with Daemon(tmp_path / "there") as there, Daemon(tmp_path / "here", trainer_of(there)) as here:

            def work() -> None:
                client = Client(here)
                client.steps(2)
                path = client.training.save_state("two").result(timeout=60).path
                expected = client.steps(2)
                again = client.service.create_training_client_from_state_with_optimizer(path).result()
                assert client.steps(2, again) == expected

            await asyncio.to_thread(work)
            (saved,) = here.host.service.state.checkpoints.values()
            assert {"adapter_config.json", "adapter_model.safetensors"} <= names_in(saved.directory)

    scenario(check)


def test_what_is_deleted_here_is_deleted_there_with_the_next_save(tmp_path: Path) -> None:
    """S4-26: no copies pile up on the training server, also not of checkpoints from before our restart."""

    async def check() -> None:
        async with Daemon(tmp_path / "there") as there, Daemon(tmp_path / "here", trainer_of(there)) as here:
            client = await asyncio.to_thread(Client, here)

            async def save(name: str) -> int:
                await asyncio.to_thread(lambda: client.training.save_state(name).result(timeout=60))
                return sum("/weights/tuft-" in path for path in there.host.service.state.checkpoints)

            before = await save("one")
            assert await save("two") == before + 1
            await here.end()
            await here.begin()
            assert await save("three") >= before + 2
            checkpoints = here.host.service.checkpoints
            saved = sorted(here.host.service.state.checkpoints)
            for path in saved:
                await checkpoints.delete(here.host.owner, path)
            await checkpoints.collect()
            now = await save("four")
            assert now == before + 1  # the snapshot that brought the run back, and the newest

    scenario(check)


def test_our_own_sampler_draws_from_what_was_trained_there(tmp_path: Path) -> None:
    """S4-01: external x torch. The weights come as files; the training server draws nothing."""

    async def check() -> None:
        async with Daemon(tmp_path / "there") as there:
            expected = await asyncio.to_thread(direct, there, STEPS)
            drawn = there.count("/asample")
            home = tmp_path / "here"
            home.mkdir()
            config = home / "config.yaml"
            config.write_text(
                "supported_models: [{model_name: tuft/demo}]\nbackends: {training: external, sampling: torch}\n"
            )
            env = {key: value for key, value in trainer_of(there).items() if not key.startswith("USE_")}
            async with Daemon(home, env, config) as here:
                client = await asyncio.to_thread(Client, here)
                await asyncio.to_thread(client.steps, STEPS)
                assert await asyncio.to_thread(client.sampled) == expected.tokens
            assert there.count("/asample") == drawn

    scenario(check)


def test_both_elsewhere_by_the_environment_alone(tmp_path: Path) -> None:
    """S4-01, S4-02, S4-04, S4-26, S4-27, S4-41: passes reach one server, samples the other, and both are left."""

    async def check() -> None:
        async with Daemon(tmp_path / "there") as there:
            with StubVllm() as vllm:
                both = {
                    "USE_VLLM": "true",
                    "VLLM_BASE_URL": vllm.url,
                    "VLLM_ENABLE_LORA": "true",
                    "MAX_WORKERS": "4",
                }
                async with Daemon(tmp_path / "here", trainer_of(there) | both) as here:
                    client = await asyncio.to_thread(Client, here)
                    await asyncio.to_thread(client.steps, 1)
                    assert len(await asyncio.to_thread(client.sampled)) == 5
                    assert there.count("/forward_backward") == 1
                    assert there.count("/asample") == 0
                    (loaded,) = vllm.bodies("/v1/load_lora_adapter")
                    assert names_in(loaded["lora_path"]) == {
                        "adapter_config.json",
                        "adapter_model.safetensors",
                    }
                    (drawn,) = vllm.bodies("/v1/completions")
                    assert drawn["model"] == loaded["lora_name"]
                    (run,) = here.host.service.state.runs
                    unloaded = await here.host.service.runs.unload(here.host.owner, run, b"")
                    await here.host.service.retrieve(here.host.owner, unloaded, 30)
                    assert there.count("/unload_model") == 1
                    gone = [{"lora_name": loaded["lora_name"]}]
                    left = partial(until, lambda: vllm.bodies("/v1/unload_lora_adapter") == gone)
                    await asyncio.to_thread(left, 30, "vLLM holds it still")
                assert vllm.bodies("/v1/unload_lora_adapter") == gone

    scenario(check)


def test_a_file_in_twinkles_form_trains_at_its_megatron_server(tmp_path: Path) -> None:
    """S2-36: use_megatron: true, with MEGATRON_SERVER_URL set; forward_backward reaches that server."""

    async def check() -> None:
        async with Daemon(tmp_path / "there") as there:
            document = changed(
                lambda apps: apps[MODEL]["args"].update(use_megatron=True),
                yaml.safe_load(EXAMPLE.read_text()),
            )
            config = tmp_path / "server_config.yaml"
            config.write_text(yaml.safe_dump(document))
            env = {"MEGATRON_SERVER_URL": there.url, "MEGATRON_SERVER_KEY": there.host.key}
            async with Daemon(tmp_path / "here", env, config) as here:
                assert here.host.settings.backends.training == "external"
                client = await asyncio.to_thread(Client, here)
                await asyncio.to_thread(client.steps, 1)
            assert there.count("/forward_backward") == 1

    scenario(check)


def test_a_jupyter_server_begins_with_both_elsewhere_by_its_environment(tmp_path: Path) -> None:
    """S4-02, S4-03, S4-41: the block of variables alone; one of the two is not there yet."""
    (tmp_path / "notebooks").mkdir()
    with StubVllm() as vllm:
        env = {
            **environment(tmp_path),
            "USE_MEGATRON": "true", "USE_VLLM": "true", "VLLM_ENABLE_LORA": "true", "MAX_WORKERS": "4",
            "MEGATRON_SERVER_URL": "http://127.0.0.1:9", "VLLM_BASE_URL": vllm.url,
        }  # fmt: skip
        with Server(tmp_path / "notebooks", tmp_path, env=env) as server:
            address, key = f"{server.url.rstrip('/')}/tuft", key_of(tmp_path)

            def states() -> dict[str, str]:
                return {each["name"]: each["state"] for each in ask(address, "tuft/status", key)["servers"]}

            wanted = {"training server": "unreachable", "vLLM server": "reachable"}
            until(lambda: states() == wanted, 30, "the servers elsewhere are not shown")
            assert ask(address, "tuft/status", key)["backend"]["installed"]


def test_an_answer_that_is_lost_on_its_way_applies_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S4-03, S4-29: the server worked, we did not hear of it: the same bytes under the same number go out again."""
    heard, lost = http.Server.ask, set[str]()

    async def lossy(server: http.Server, method: str, path: str, *rest: Any, **more: Any) -> http.Reply:
        reply = await heard(server, method, path, *rest, **more)
        if method == "POST" and path not in lost:
            lost.add(path)
            raise http.Unreachable("cut off by the test")
        return reply

    async def check() -> None:
        async with Daemon(tmp_path / "there") as there:
            expected = await asyncio.to_thread(direct, there, STEPS)
            before = there.count("/forward_backward")
            async with Daemon(tmp_path / "here", trainer_of(there)) as here:
                monkeypatch.setattr(http.Server, "ask", lossy)
                client = await asyncio.to_thread(Client, here)
                seen = await asyncio.to_thread(client.steps, STEPS)
                tokens = await asyncio.to_thread(client.sampled)
                assert Seen(seen.bits, seen.losses, tokens) == expected
                assert there.count("/forward_backward") == before + STEPS + 1
                assert {run.step for run in there.host.service.state.runs.values()} == {STEPS}
                assert len(lost) >= 6
                monkeypatch.setattr(http.Server, "ask", heard)

    scenario(check)


@pytest.mark.parametrize("forgets", [False, True], ids=["it remembers", "it has lost everything"])
def test_a_training_server_that_is_restarted_applies_every_op_once(tmp_path: Path, forgets: bool) -> None:
    """S4-03: in the middle of a run. With its journal it goes on; without, the run is made anew from ours."""

    async def check() -> None:
        async with Daemon(tmp_path / "alone") as alone:
            expected = await asyncio.to_thread(direct, alone, 2 * STEPS)
        there = Daemon(tmp_path / "there")
        await there.begin()
        async with Daemon(tmp_path / "here", trainer_of(there)) as here:
            client = await asyncio.to_thread(Client, here)
            first = await asyncio.to_thread(client.steps, STEPS)
            key = there.host.key
            await there.end()
            rest = asyncio.create_task(asyncio.to_thread(client.steps, STEPS))
            if forgets:
                (there.home / "journal.sqlite").unlink()
                for left in there.home.glob("journal.sqlite*"):
                    left.unlink()
            await there.begin()
            assert there.host.key == key
            then = await rest
            assert first.bits + then.bits == expected.bits
            assert await asyncio.to_thread(client.sampled) == expected.tokens
        await there.end()

    scenario(check)


def test_our_own_restart_brings_the_run_back_from_its_snapshot_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S4-29: the snapshot is a checkpoint there, found by a note here; at most two of a run are kept."""
    monkeypatch.setattr(Service.__init__, "__defaults__", _with_rule(SnapshotRule(2, 1e9)))

    async def check() -> None:
        async with Daemon(tmp_path / "alone") as alone:
            expected = await asyncio.to_thread(direct, alone, 12)
        async with Daemon(tmp_path / "there") as there, Daemon(tmp_path / "here", trainer_of(there)) as here:
            client = await asyncio.to_thread(Client, here)
            first = await asyncio.to_thread(client.steps, 9)
            await here.end()
            await here.begin()
            then = await asyncio.to_thread(client.steps, 3)
            assert first.bits + then.bits == expected.bits
            assert "POST /load_weights" in there.asked
            kept = [path for path in there.host.service.state.checkpoints if "/weights/tuft-" in path]
            assert 1 <= len(kept) <= 2

    scenario(check)


def _with_rule(rule: SnapshotRule) -> tuple[object, ...]:
    return (None, rule, None, None)


def test_a_training_server_that_is_down_fails_at_once_and_trains_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S4-03, S4-35: the message has the address and the command to look; nothing is restarted here."""
    monkeypatch.setattr(http, "PROBE_SECONDS", 0.05)

    async def check() -> None:
        there = Daemon(tmp_path / "there")
        await there.begin()
        env = trainer_of(there)
        await there.end()
        async with Daemon(tmp_path / "here", env) as here:
            with pytest.raises(Exception, match=f"training server can't be reached at {there.url}.*curl"):
                await asyncio.to_thread(Client, here)
            await there.begin()
            client = await asyncio.to_thread(Client, here)
            assert (await asyncio.to_thread(client.steps, 1)).losses
        await there.end()

    scenario(check)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MEGATRON_SERVER_KEY": "tml-wrong"}, "refuses our key.*MEGATRON_SERVER_KEY"),
        ({"TUFT_MODEL_PATH": "OTHER"}, "offers tuft/demo, not other"),
    ],
)
def test_a_training_server_that_cannot_serve_us_says_why(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    """S4-03: a key, another model."""
    model = tmp_path / "other"
    shutil.copytree(Path(__file__).parents[2] / "tuft_jupyter" / "demo", model)
    change = {name: str(model) if value == "OTHER" else value for name, value in change.items()}

    async def check() -> None:
        there = Daemon(tmp_path / "there")
        async with there, Daemon(tmp_path / "here", trainer_of(there) | change) as here:
            name = "other" if "TUFT_MODEL_PATH" in change else "tuft/demo"
            with pytest.raises(Exception, match=message):
                await asyncio.to_thread(Client, here, name)

    scenario(check)
