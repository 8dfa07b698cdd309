"""A model computes in the precision that its device is fastest in, unless its owner says otherwise."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_models import make_model
from tuft_jupyter.config import ConfigError, ModelSettings, Settings
from tuft_jupyter.core.types import ModelCard
from tuft_jupyter.engine import precision
from tuft_jupyter.engine.base import load_base
from tuft_jupyter.engine.precision import bf16_pays, chosen
from tuft_jupyter.engine.ray_actors import SamplingActor, TrainingActor
from tuft_jupyter.engine.ray_engines import RayEngines
from tuft_jupyter.engine.supervision import RayEngine


@pytest.fixture
def bf16(tmp_path: Path) -> Path:
    return make_model(tmp_path / "bf16", dtype=torch.bfloat16)


@pytest.fixture(params=[True, False], ids=["bf16 pays", "bf16 does not pay"])
def pays(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """On a CPU of either kind, whatever this one is."""
    monkeypatch.setattr(precision, "bf16_pays", lambda: request.param)
    return bool(request.param)


def test_a_model_in_bf16_computes_in_fp32_where_the_cpu_is_faster_so(bf16: Path, pays: bool) -> None:
    base = load_base(bf16, device="cpu")
    assert base.dtype is (torch.bfloat16 if pays else torch.float32)


def test_a_few_tensors_in_fp32_do_not_make_it_another_model(bf16: Path, pays: bool) -> None:
    file = bf16 / "model.safetensors"
    weights = load_file(file)
    norm = next(name for name in weights if "norm" in name)
    save_file(weights | {norm: weights[norm].float()}, file, metadata={"format": "pt"})
    assert load_base(bf16, device="cpu").dtype is (torch.bfloat16 if pays else torch.float32)


def test_a_model_in_fp16_always_computes_in_fp32_on_a_cpu(tmp_path: Path, pays: bool) -> None:
    assert load_base(make_model(tmp_path / "fp16", dtype=torch.float16), device="cpu").dtype is torch.float32


def test_whoever_names_a_precision_gets_it(bf16: Path, pays: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert load_base(bf16, device="cpu", dtype=dtype).dtype is dtype


def test_a_gpu_takes_files_as_they_are(bf16: Path, pays: bool) -> None:
    assert chosen(bf16, "cuda") is None


def test_a_model_that_would_fill_the_memory_in_fp32_stays_as_it_is(
    bf16: Path, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "SHARE", 1e-9)
    assert load_base(bf16, device="cpu").dtype is torch.bfloat16


def test_what_is_measured_is_what_this_cpu_does() -> None:
    """Larger matrices than those of the measurement, in time enough to be sure."""

    def seconds(dtype: torch.dtype) -> float:
        x, w = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        best = float("inf")
        for _ in range(8):
            began = time.perf_counter()
            torch.nn.functional.linear(x, w)
            best = min(best, time.perf_counter() - began)
        return best

    gain = seconds(torch.float32) / seconds(torch.bfloat16)
    assert gain > 1 if bf16_pays() else gain < 1.6


def test_only_precisions_that_train_can_be_named() -> None:
    assert ModelSettings("m").dtype == "auto"
    for name in ("float32", "bfloat16"):
        assert precision.NAMED[ModelSettings("m", dtype=name).dtype] is getattr(torch, name)
    with pytest.raises(ConfigError, match="dtype must be one of auto, float32, bfloat16, not 'float16'"):
        ModelSettings("m", dtype="float16")


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_trainer_and_sampler_of_a_server_compute_as_its_configuration_says(
    name: str, bf16: Path, tmp_path: Path
) -> None:
    """Whatever the CPU prefers: of two names one is not it."""
    served = ModelSettings("m", str(bf16), dtype=name)
    engines = RayEngines(Settings(tmp_path, tmp_path / "checkpoints", supported_models=(served,)))
    card = ModelCard("m", str(bf16), 64, 512, "qwen3")
    for made, actor in ((engines.training(card), TrainingActor), (engines.sampling(card), SamplingActor)):
        assert isinstance(made, RayEngine)
        loaded = actor(replace(made.actor_options(on_gpu=False), threads=torch.get_num_threads()))
        loaded.setup_device()
        engine = loaded.trainer() if isinstance(loaded, TrainingActor) else loaded.sampler()
        assert engine.base.dtype is precision.NAMED[name]
