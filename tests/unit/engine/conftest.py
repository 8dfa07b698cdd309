from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.adapters import make_adapter
from tests.support.tiny_models import make_model
from tuft_jupyter.engine.torch_sampler import TorchSampler


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="package")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3")


@pytest.fixture(scope="package")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2")


@pytest.fixture(scope="package")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", "llama", tied=False)


@pytest.fixture(scope="package")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a short context, for the sampler's tests; ``adapters`` and ``sampler`` belong to it."""
    return make_model(tmp_path_factory.mktemp("models") / "sampled", max_length=96)


@pytest.fixture(scope="package")
def adapters(sampled: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(home / "a", sampled, seed=1),
        make_adapter(home / "b", sampled, seed=2, rank=2),
        make_adapter(home / "c", sampled, seed=3, modules=("q_proj", "v_proj")),
    ]


@pytest.fixture
def sampler(sampled: Path) -> TorchSampler:
    return TorchSampler(sampled)
