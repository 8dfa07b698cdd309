"""What a configuration may say about GPUs, nodes and the environment of a model's processes."""

from __future__ import annotations

from typing import Any

import pytest

from tuft_jupyter.config import ConfigError, ModelSettings


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
        ({"training_gpus": 3, "data_parallel": 2}, "3 GPUs are not 2 equal shares"),
        ({"sampling_gpus": 3, "sampling_replicas": 2}, "3 GPUs are not 2 equal shares"),
    ],
)
def test_counts_that_do_not_fit_are_refused_by_name(given: dict[str, Any], problem: str) -> None:
    """S2-14: the error names the numbers."""
    with pytest.raises(ConfigError, match=problem):
        ModelSettings("m", **given)
