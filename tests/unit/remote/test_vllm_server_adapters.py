"""Adapters on a vLLM server elsewhere: loaded before they are sampled, named once, and gone when nobody needs them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.stub_vllm import StubVllm
from tests.support.vllm_elsewhere import body, engine, saved, scenario, tokens
from tuft_jupyter.core.engine import EngineDied


def test_an_adapter_is_loaded_before_it_is_sampled_and_only_once(tmp_path: Path) -> None:
    """S4-04: the load call, then the completion with that adapter's name."""

    async def check(stub: StubVllm) -> None:
        directory = saved(tmp_path, "a")
        async with engine(stub) as vllm:
            both = await asyncio.gather(*(vllm.sample(f"r{i}", directory, body([1])) for i in range(2)))
            assert [tokens(each) for each in both] == [[[2, 2, 2]]] * 2
            (loaded,) = stub.bodies("/v1/load_lora_adapter")
            assert loaded["lora_path"] == directory
            assert [sent["model"] for sent in stub.bodies("/v1/completions")] == [loaded["lora_name"]] * 2
            assert stub.paths().index("/v1/load_lora_adapter") < stub.paths().index("/v1/completions")

    scenario(check)


def test_every_saved_version_has_a_name_of_its_own(tmp_path: Path) -> None:
    """S4-04: vLLM's prefix cache tells adapters apart by name."""

    async def check(stub: StubVllm) -> None:
        directory = saved(tmp_path, "a")
        async with engine(stub) as vllm:
            await vllm.sample("r", directory, body([1]))
            weights = Path(directory) / "adapter_model.safetensors"
            weights.unlink()
            weights.write_bytes(b"newer weights")
            assert tokens(await vllm.sample("r", directory, body([1]))) == [[3, 3, 3]]
        async with engine(stub) as vllm:
            await vllm.sample("r", directory, body([1]))
        names = [sent["lora_name"] for sent in stub.bodies("/v1/load_lora_adapter")]
        assert len(set(names)) == 3

    scenario(check)


def test_no_more_adapters_are_held_than_configured_and_all_leave_at_the_end(tmp_path: Path) -> None:
    """S4-18, S4-26: the least recently used is unloaded; a stop unloads the rest."""

    async def check(stub: StubVllm) -> None:
        async with engine(stub, max_loras=2) as vllm:
            for name in "abc":
                await vllm.sample("r", saved(tmp_path, name), body([1]))
                assert len(stub.adapters) <= 3
            names = [sent["lora_name"] for sent in stub.bodies("/v1/load_lora_adapter")]
            while len(stub.adapters) > 2:  # noqa: ASYNC110 - the stub is another thread
                await asyncio.sleep(0)
            assert stub.bodies("/v1/unload_lora_adapter") == [{"lora_name": names[0]}]
        assert not stub.adapters

    scenario(check)


def test_adapters_that_were_left_loaded_are_unloaded_at_the_start() -> None:
    async def check(stub: StubVllm) -> None:
        stub.adapters = {"tuft-home-0-1": 1, "tuft-other-0-1": 2}
        async with engine(stub):
            assert list(stub.adapters) == ["tuft-other-0-1"]

    scenario(check)


def test_a_server_that_was_started_anew_is_told_its_adapters_again(tmp_path: Path) -> None:
    """S4-03: what it had loaded is gone with it."""

    async def check(stub: StubVllm) -> None:
        directory = saved(tmp_path, "a")
        async with engine(stub) as vllm:
            await vllm.sample("r", directory, body([1]))
            stub.end()
            stub.begin()
            with pytest.raises(EngineDied, match="does not know its adapters"):
                await vllm.sample("r", directory, body([1]))
            await vllm.start()
            assert not (await vllm.sample("r", directory, body([1]))).category

    scenario(check)


def test_prompts_are_not_scored_while_an_adapter_on_the_unembedding_is_loaded(tmp_path: Path) -> None:
    async def check(stub: StubVllm) -> None:
        async with engine(stub) as vllm:
            scored = body([1, 2], prompt_logprobs=True)
            assert not (await vllm.sample("r", saved(tmp_path, "a"), scored)).category
            outcome = await vllm.sample("r", saved(tmp_path, "b", "q_proj", "lm_head"), scored)
            assert outcome.category == "user"
            assert "vllm#51594" in outcome.error

    scenario(check)


def test_adapters_that_cannot_be_loaded_say_what_to_do(tmp_path: Path) -> None:
    """S4-04: rank, file system, and a server that may not load any."""

    async def check(stub: StubVllm) -> None:
        async with engine(stub) as vllm:
            broken = saved(tmp_path, "a")
            (Path(broken) / "broken").touch()
            refused = await vllm.sample("r", broken, body([1]))
            assert (refused.category, "max_lora_rank 64" in refused.error) == ("user", True)
            stub.runtime_loras = False
            refused = await vllm.sample("r", saved(tmp_path, "b"), body([1]))
            assert (refused.category, "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in refused.error) == ("user", True)
        async with engine(stub, enable_lora=False) as vllm:
            refused = await vllm.sample("r", broken, body([1]))
            assert (refused.category, "VLLM_ENABLE_LORA" in refused.error) == ("user", True)
            assert not (await vllm.sample("r", None, body([1]))).category

    scenario(check)


def test_a_server_that_does_not_see_the_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S4-04: the file system must be shared."""

    async def check(stub: StubVllm) -> None:
        monkeypatch.setattr(Path, "is_dir", lambda path: False)
        async with engine(stub) as vllm:
            refused = await vllm.sample("r", saved(tmp_path, "a"), body([1]))
            assert refused.category == "user"
            assert "must share this server's file system" in refused.error

    scenario(check)
