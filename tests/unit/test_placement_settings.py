"""What a configuration may say about GPUs, nodes and the environment of a model's processes."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tuft_jupyter.config import ConfigError, ModelSettings, PlacementConfig, Settings, load_settings


def test_a_model_that_says_nothing_reserves_nothing() -> None:
    model = ModelSettings("m")
    assert (model.training_gpus, model.sampling_gpus, model.sampling_replicas) == (None, None, 1)
    assert (model.actor_cpus, model.actor_env) == (None, {})


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"training_gpus": -1}, "training_gpus must be at least 0"),
        ({"sampling_replicas": 0}, "sampling_replicas must be at least 1"),
        ({"actor_cpus": -0.5}, "actor_cpus must be at least 0"),
        ({"data_parallel": 3, "training_nodes": 2}, "3 processes cannot be divided evenly over 2 nodes"),
        ({"training_gpus": 3, "data_parallel": 2}, "3 GPUs are not 2 equal shares"),
        ({"sampling_gpus": 3, "sampling_replicas": 2}, "3 GPUs are not 2 equal shares"),
    ],
)
def test_counts_that_do_not_fit_are_refused_by_name(given: dict[str, Any], problem: str) -> None:
    """S2-14: the error names the numbers."""
    with pytest.raises(ConfigError, match=problem):
        ModelSettings("m", **given)


@pytest.mark.parametrize("kind", ["training", "sampling"])
def test_colocate_shares_single_gpus_alone(kind: str, tmp_path: Path) -> None:
    """S3-13: a process on two GPUs could share neither as a whole."""
    model = ModelSettings("m", **{f"{kind}_gpus": 2})
    with pytest.raises(ConfigError, match=f"a {kind} process of m has 2"):
        Settings(tmp_path, tmp_path, supported_models=(model,), placement=PlacementConfig(mode="colocate"))
    two_of_one = ModelSettings("m", training_gpus=2, data_parallel=2, sampling_gpus=2, sampling_replicas=2)
    PlacementConfig(mode="colocate").check(two_of_one, 2)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"sampling_gpus": 16}, "needs more than 1 nodes with inference_num_gpus_per_node 8"),
        ({"tensor_parallel_size": 16}, "needs more than 1 nodes with inference_num_gpus_per_node 8"),
        ({"sampling_gpus": 2, "tensor_parallel_size": 4}, "spread over tensor_parallel_size 4 GPUs"),
    ],
)
def test_numbers_of_a_model_are_checked_when_they_are_read_also_without_the_section(
    given: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=problem):
        Settings(tmp_path, tmp_path, supported_models=(ModelSettings("m", **given),))


def placement(text: str, tmp_path: Path) -> PlacementConfig:
    file = tmp_path / "tuft.yaml"
    file.write_text(f"supported_models: [{{model_name: tuft/demo}}]\n{textwrap.dedent(text)}")
    found = load_settings(file, {"TUFT_HOME": str(tmp_path)}).placement
    assert found is not None
    return found


def test_without_the_section_nothing_is_placed_and_its_defaults_are_torchspecs(tmp_path: Path) -> None:
    """S3-43, S3-44, S3-48, S3-49, S3-50, S3-51, S3-52."""
    assert load_settings(None, {"TUFT_HOME": str(tmp_path)}).placement is None
    default = PlacementConfig()
    assert (default.training_num_nodes, default.training_num_gpus_per_node) == (1, 1)
    assert (default.inference_num_gpus, default.inference_num_gpus_per_node, default.nnodes) == (1, 8, 1)
    assert (default.dist_init_addr, default.dist_timeout) == (None, 60.0)
    assert (default.mode, default.strategy, default.wait_seconds) == ("auto", "PACK", 300.0)


def test_torchspecs_sections_are_read_as_they_are(tmp_path: Path) -> None:
    """S3-45, S3-53: `inference.sglang.nnodes` is `placement.nnodes`."""
    theirs = """
        training: {training_num_nodes: 1, training_num_gpus_per_node: 4}
        inference:
          inference_num_gpus: 16
          inference_num_gpus_per_node: 8
          sglang: {nnodes: 2, dist_init_addr: "10.0.0.2:2000", dist_timeout: 90}
        """
    ours = """
        placement: {training_num_gpus_per_node: 4, inference_num_gpus: 16, nnodes: 2,
          dist_init_addr: "10.0.0.2:2000", dist_timeout: 90.0}
        """
    assert placement(theirs, tmp_path) == placement(ours, tmp_path)
    assert placement("inference: {nnodes: 2, inference_num_gpus: 4}", tmp_path).nnodes == 2


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ("placement: {colocate: true, debug_train_only: true}", "colocate and debug_train_only at once"),
        ("placement: {mode: separate, debug_inference_only: true}", "debug_inference_only and separate"),
        ("training: {colocate: true, debug_train_only: true}", "colocate and debug_train_only at once"),
        ("placement: {mode: shared}", "mode must be one of auto, separate"),
        ("placement: {strategy: CRAM}", "strategy must be one of PACK"),
        ("placement: {inference_num_gpus: 16}", "needs more than 1 nodes with inference_num_gpus_per_node 8"),
        ("placement: {inference_num_gpus: 3, nnodes: 2}", "multiple of the 2 processes"),
        ("placement: {dist_init_addr: somewhere}", "must be IP:PORT"),
        ("placement: {dist_timeout: 0}", "dist_timeout must be more than 0"),
        ("placement: {dist_timeout: .nan}", "dist_timeout must be more than 0"),
        ("placement: all\ntraining: {training_num_nodes: 2}", "placement must hold keys and values"),
        ("training: {training_gpus: 3}", "unknown key 'training'"),
        ("inference: {sglang: {mem_fraction: 0.3}}", "unknown key 'inference'"),
    ],
)
def test_contradictions_are_refused_before_anything_is_reserved(
    section: str, problem: str, tmp_path: Path
) -> None:
    """S3-16."""
    with pytest.raises(ConfigError, match=re.escape(problem)):
        placement(section, tmp_path)
