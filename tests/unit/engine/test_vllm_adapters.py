"""Names of adapters in a vLLM engine, and which are held: the part of the vLLM sampler that needs no vLLM."""

from __future__ import annotations

import asyncio
import os
import sys
import types
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.loops import on_a_loop
from tests.support.server_configs import MODEL, SAMPLER, SERVER, changed
from tests.support.tiny_models import make_model
from tuft_jupyter.config import ModelSettings, Settings, load_settings
from tuft_jupyter.core.errors import NotFound, ServerError, UserError
from tuft_jupyter.core.types import LoraSpec, ModelCard
from tuft_jupyter.engine.ray_actors import ActorOptions, SamplingActor, TrainingActor, VllmOptions
from tuft_jupyter.engine.ray_engines import RayEngines, RaySamplingEngine
from tuft_jupyter.engine.supervision import GPU_SHARE, Demand, RayEngine
from tuft_jupyter.engine.vllm_adapters import WEIGHTS, Named, NamedAdapters
from tuft_jupyter.engine.vllm_sampler import VllmSampler


class Engine:
    """Remembers what it was told; weights that say ``bad`` cannot be loaded."""

    def __init__(self) -> None:
        self.loaded: list[Named] = []
        self.held: set[int] = set()

    async def load(self, named: Named) -> None:
        await asyncio.sleep(0)
        if (named.directory / WEIGHTS).read_text() == "bad":
            raise UserError("bad weights")
        self.loaded.append(named)
        self.held.add(named.number)

    def unload(self, named: Named) -> None:
        self.held.discard(named.number)


@pytest.fixture
def engine() -> Engine:
    return Engine()


def saved(home: Path, name: str, text: str = "1") -> Path:
    directory = home / name
    directory.mkdir(exist_ok=True)
    (directory / WEIGHTS).unlink(missing_ok=True)
    (directory / WEIGHTS).write_text(text)
    return directory


async def use(adapters: NamedAdapters, directory: Path) -> Named:
    async with adapters.using(directory) as named:
        return named


@on_a_loop
async def test_every_saved_version_has_a_name_and_a_number_of_its_own(engine: Engine, tmp_path: Path) -> None:
    adapters = NamedAdapters(4, engine.load, engine.unload)
    first = await use(adapters, saved(tmp_path, "a"))
    assert await use(adapters, tmp_path / "a") == first
    os.utime(saved(tmp_path, "a", "2") / WEIGHTS, ns=(1, 1))
    second = await use(adapters, tmp_path / "a")
    other = await use(adapters, saved(tmp_path, "b"))
    assert len({each.name for each in (first, second, other)}) == 3
    assert len({each.number for each in (first, second, other)}) == 3


@on_a_loop
async def test_the_one_used_least_recently_goes_and_is_loaded_again_under_a_new_name(
    engine: Engine, tmp_path: Path
) -> None:
    adapters = NamedAdapters(2, engine.load, engine.unload)
    a, b, c = (saved(tmp_path, name) for name in "abc")
    first = await use(adapters, a)
    await use(adapters, b)
    await use(adapters, a)
    await use(adapters, c)  # drops b
    assert await use(adapters, a) == first
    again = await use(adapters, b)
    assert [named.directory.name for named in engine.loaded] == ["a", "b", "c", "b"]
    assert again.name not in {named.name for named in engine.loaded[:-1]}
    assert len(engine.held) == 2


@on_a_loop
async def test_an_adapter_on_experts_is_refused_before_the_engine_sees_it(
    engine: Engine, tmp_path: Path
) -> None:
    """An engine that does not expect one ends when it is used, with everybody's samples."""
    adapters = NamedAdapters(4, engine.load, engine.unload)
    directory = saved(tmp_path, "a")
    (directory / "adapter_config.json").write_text('{"target_parameters": ["mlp.experts.down_proj"]}')
    with pytest.raises(UserError, match=r"weights on experts.*set sampler_type: torch"):
        await use(adapters, directory)
    assert not engine.loaded


@pytest.mark.parametrize(
    ("settings", "on_gpu", "trained"),
    [({}, False, True), ({"sampler_type": "torch"}, True, True), ({"sampler_type": "vllm"}, False, False)],
)
def test_experts_are_trained_only_where_they_can_be_sampled(
    settings: dict[str, str], on_gpu: bool, trained: bool, tmp_path: Path
) -> None:
    moe = make_model(tmp_path / "m", "mixtral", num_local_experts=4, num_experts_per_tok=2)
    served = ModelSettings("m", str(moe), **settings)  # type: ignore[arg-type]
    engines = RayEngines(Settings(tmp_path, tmp_path / "checkpoints", supported_models=(served,)))
    engine = engines.training(ModelCard("m", str(moe), 64, 512, "mixtral"))
    assert isinstance(engine, RayEngine)
    actor = TrainingActor(engine.actor_options(on_gpu=on_gpu))
    actor.load()
    with nullcontext() if trained else pytest.raises(UserError, match=r"train_mlp: .* or train_mlp=False"):
        actor.worker.trainer.create("a", LoraSpec(2, 4, 0))
    actor.worker.trainer.create("b", LoraSpec(2, 4, 0, train_mlp=False))


@on_a_loop
async def test_what_is_in_use_stays_and_others_wait(engine: Engine, tmp_path: Path) -> None:
    adapters = NamedAdapters(1, engine.load, engine.unload)
    a, b = saved(tmp_path, "a"), saved(tmp_path, "b")
    async with adapters.using(a) as held:
        waiting = [asyncio.create_task(use(adapters, b)) for _ in range(3)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert engine.held == {held.number}
        waiting.pop().cancel()
    assert {named.directory for named in await asyncio.gather(*waiting)} == {b}
    assert len(engine.loaded) == 2


@on_a_loop
async def test_what_is_released_leaves_at_once_unless_it_is_in_use(engine: Engine, tmp_path: Path) -> None:
    """S4-26: and is loaded again for whoever still asks for it."""
    adapters = NamedAdapters(4, engine.load, engine.unload)
    a, b, c = (saved(tmp_path, name) for name in "abc")
    for directory in (a, b, c):
        await use(adapters, directory)
    async with adapters.using(b):
        adapters.release([a, b])
        assert [named.directory for named in adapters.held()] == [c, b]
    again = await use(adapters, a)
    assert engine.held == {named.number for named in adapters.held()}
    assert again.number == 4


@on_a_loop
async def test_weights_that_cannot_be_loaded_fail_everybody_who_asked_and_are_tried_again(
    engine: Engine, tmp_path: Path
) -> None:
    adapters = NamedAdapters(1, engine.load, engine.unload)
    bad = saved(tmp_path, "a", "bad")
    results = await asyncio.gather(*(use(adapters, bad) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [UserError] * 3
    with pytest.raises(NotFound, match="no longer there"):
        await use(adapters, tmp_path / "nowhere")
    (bad / WEIGHTS).write_text("good")
    assert (await use(adapters, bad)).directory == bad


def test_without_vllm_the_error_names_the_extra(qwen3: Path) -> None:
    with pytest.raises(UserError, match=r'not installed: pip install "tuft-jupyter\[vllm\]"'):
        VllmSampler(qwen3)


def test_the_gpus_of_a_model_are_those_its_entry_in_the_file_asks_for(tmp_path: Path) -> None:
    """S1-20: one GPU shared for the first entry, two whole ones for the second."""
    models = (ModelSettings("small"), ModelSettings("large", tensor_parallel_size=2))
    settings = Settings(tmp_path, tmp_path, supported_models=models, sampler_type="vllm")
    made = RayEngines(settings)
    asked = [
        made.sampling(ModelCard(model.model_name, "/m", 128, 64, "Qwen3ForCausalLM")).gpus()
        for model in models
    ]
    assert asked == [GPU_SHARE, 2]


def test_a_sampler_over_several_gpus_asks_for_them() -> None:
    """S1-20: a model with tensor_parallel_size 2 is placed on two GPUs; one that shares asks for its share."""
    card = ModelCard("m", "/m", 128, 64, "Qwen3ForCausalLM")

    def made(asked: str, gpus: int) -> RaySamplingEngine:
        options = ActorOptions(card, 1, vllm=VllmOptions(16, 1, 0.2, gpus))
        return RaySamplingEngine(None, options, Demand(), asked=asked)

    assert made("vllm", 2).gpus() == 2
    assert made("vllm", 1).gpus() == GPU_SHARE
    assert made("torch", 2).gpus() == GPU_SHARE
    options: ActorOptions = made("vllm", 2).actor_options(on_gpu=True)
    assert options.vllm == VllmOptions(max_rank=16, max_loras=1, gpu_memory=0.2, tensor_parallel=2)
    assert made("auto", 1).actor_options(on_gpu=True).vllm is None  # it is not installed here


class Refused(Exception):
    """What the vLLM of the next test answers."""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments that a vLLM is started with, which then does not start."""
    arguments: dict[str, Any] = {}

    class AsyncLLM:
        @staticmethod
        def from_engine_args(given: dict[str, Any]) -> None:
            arguments.update(given)
            raise Refused

    for name, content in (
        ("vllm", {"AsyncEngineArgs": dict}),
        ("vllm.v1", {}),
        ("vllm.v1.engine", {}),
        ("vllm.v1.engine.async_llm", {"AsyncLLM": AsyncLLM}),
    ):
        module = types.ModuleType(name)
        module.__dict__.update(content, __spec__=ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)
    return arguments


@pytest.mark.parametrize("lora", [True, False])
def test_what_the_file_says_of_vllm_is_what_vllm_is_told(
    lora: bool, told: dict[str, Any], qwen3: Path, tmp_path: Path
) -> None:
    """S2-52, S2-53, S2-54, S2-55: engine_args from the file in Twinkle's form to the engine's own."""

    def change(apps: list[dict[str, Any]]) -> None:
        apps[SERVER]["args"] = {}
        for number in (MODEL, SAMPLER):
            apps[number]["args"]["model_id"] = str(qwen3)
        apps[SAMPLER]["args"]["engine_args"] |= {"max_model_len": 96, "enable_lora": lora}

    path = tmp_path / "server_config.yaml"
    path.write_text(yaml.safe_dump(changed(change)))
    settings = load_settings(path, {"TUFT_HOME": str(tmp_path)})
    (model,) = settings.supported_models
    card = ModelCard(model.model_name, str(qwen3), model.max_model_len or 0, 64, "Qwen3ForCausalLM")
    options: ActorOptions = RayEngines(settings).sampling(card).actor_options(on_gpu=True)
    with pytest.raises(ServerError, match="vLLM cannot serve"):
        SamplingActor(options).sampler()
    assert told["max_model_len"] == 96
    assert told["gpu_memory_utilization"] == 0.5
    assert told["enable_lora"] == options.adapters == lora
    assert told["logprobs_mode"] == "processed_logprobs"
