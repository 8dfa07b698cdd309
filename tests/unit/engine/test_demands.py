"""From settings to what is asked of a cluster."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from tuft_jupyter.config import ConfigError, ModelSettings, PlacementConfig, Settings
from tuft_jupyter.core.types import ModelCard
from tuft_jupyter.engine.demands import UNASKED_SHARE, ask_of, demands_of, ranks_of
from tuft_jupyter.engine.placement import settled
from tuft_jupyter.engine.plan import COLOCATE, SEPARATE, Ask
from tuft_jupyter.engine.ray_actors import ActorOptions, EngineActor, free_port
from tuft_jupyter.engine.ray_runtime import RayThread


def settings(section: PlacementConfig | None = None, **model: Any) -> Settings:
    home = Path("/nowhere")
    return Settings(
        home=home, checkpoint_dir=home, supported_models=(ModelSettings("m", **model),), placement=section
    )


def test_without_settings_two_shares_are_asked_for_and_nobody_waits() -> None:
    """S3-25: on a laptop nothing is placed."""
    ask = ask_of(settings(), "m")
    assert (ask.ranks, ask.replicas, ask.share) == (1, 1, UNASKED_SHARE)
    assert ask_of(settings(), "another model") == ask


def test_a_models_own_numbers_go_before_those_of_the_section() -> None:
    """S2-09, S2-13, S2-39, S2-56, S3-41: ranks are GPUs."""
    section = PlacementConfig(training_num_nodes=2, training_num_gpus_per_node=2, inference_num_gpus=4)
    ask = ask_of(settings(section), "m")
    assert (ask.ranks, ask.training_nodes, ask.gpus_per_engine) == (4, 2, 4)
    own = ask_of(settings(section, data_parallel=2, training_gpus=2, sampling_gpus=1), "m")
    assert (own.ranks, own.training_nodes, own.gpus_per_rank, own.sampling_gpus) == (2, 1, 1, 1)
    assert ask_of(settings(training_gpus=3, data_parallel=3, training_nodes=3), "m").training_nodes == 3
    assert ask_of(settings(training_gpus=3), "m").training_gpus == 3
    assert ranks_of(settings(data_parallel=2, training_gpus=0), "m") == 2


def test_three_nodes_of_the_seed_are_asked_for_as_twenty_gpus() -> None:
    """S3-45, S3-47, S3-53: planned as drawn; sampling over two nodes says that it is not built."""
    section = PlacementConfig(training_num_gpus_per_node=4, inference_num_gpus=16, nnodes=2)
    made = demands_of(settings(section), "m", RayThread())
    assert (made.ask.ranks, made.ask.replicas, made.ask.gpus_per_engine) == (4, 1, 8)
    assert settled(made.ask, 20).expected_gpus == 20
    assert len(made.training) == 4
    pairs = PlacementConfig(inference_num_gpus=4, nnodes=2)
    heads = demands_of(settings(pairs, sampling_replicas=2), "m", RayThread()).sampling
    assert [demand.number for demand in heads] == [0, 2]  # only heads are sent requests
    (sampling,) = made.sampling
    assert "placement.nnodes" in sampling.refusal


def test_auto_shares_where_there_is_one_gpu() -> None:
    """S3-12, S3-13."""
    assert settled(Ask(mode="auto"), 1).mode == COLOCATE
    assert settled(Ask(mode="auto"), 2).mode == SEPARATE
    assert settled(Ask(mode="auto", ranks=2), 1).mode == SEPARATE
    assert settled(Ask(mode="auto"), 0).mode == SEPARATE


@pytest.mark.parametrize(
    ("section", "model", "problem"),
    [
        (PlacementConfig(), {"tensor_parallel_size": 2}, "tensor_parallel_size 2"),
        (PlacementConfig(mode="colocate"), {"sampling_gpus": 2}, "colocate shares single GPUs"),
        (PlacementConfig(), {"sampling_gpus": 16}, "inference_num_gpus_per_node 8"),
    ],
)
def test_a_model_that_contradicts_the_section_is_refused_at_once(
    section: PlacementConfig, model: dict[str, Any], problem: str
) -> None:
    """S2-14, S3-16."""
    with pytest.raises(ConfigError, match=problem):
        settings(section, **model)


def test_neighbouring_free_ports_are_found_past_those_in_use() -> None:
    """S3-02."""
    first = free_port(20000, 3)
    with socket.socket() as held:
        held.bind(("", first + 1))
        held.listen()
        assert free_port(first, 2) > first + 1
        assert free_port(first) == first
    assert free_port() > 0


def test_every_actor_sets_up_its_device_and_finds_its_address_by_one_class(tmp_path: Path) -> None:
    """S3-02: a subclass says only what it makes; it works where there is no GPU."""

    class Counting(EngineActor):
        made = 0

        def make(self) -> None:
            self.made += 1

    class Failing(EngineActor):
        def make(self) -> None:
            raise ValueError("no such weights")

    options = ActorOptions(ModelCard("m", str(tmp_path), 32, 8, "llama"), threads=torch.get_num_threads())
    actor = Counting(options)
    loaded = actor.load()
    assert (actor.made, loaded.device, loaded.error) == (1, "cpu", "")
    assert actor.gpu_bytes() == 0
    ip, _, port = actor.address().removeprefix("tcp://").rpartition(":")
    assert ip == actor.node_ip()
    assert 0 < int(port) < 65536
    assert Failing(options).load().error == "ValueError: no such weights"
