"""The file in Twinkle's form: what is refused, with the place, the reason and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.server_configs import (
    MODEL,
    NAME,
    PROCESSOR,
    SAMPLER,
    SERVER,
    Apps,
    Load,
    args,
    changed,
    deployed,
    with_megatron,
    with_transformers,
)
from tuft_jupyter.config import ConfigError

REFUSED: list[tuple[str, Callable[[Apps], Any], str]] = [
    (
        "S2-24",
        args(SAMPLER, sampler_typ="vllm"),
        "unknown key 'applications[2].args.sampler_typ'; did you mean 'sampler_type'",
    ),
    ("S2-27", lambda apps: apps[MODEL].pop("args"), "applications[1] lacks 'args'"),
    ("S2-27", lambda apps: apps[MODEL].pop("name"), "applications[1] lacks 'name'"),
    ("S2-27", lambda apps: apps.append(apps[MODEL]), "applications[4].name is that of applications[1]"),
    ("S2-27", lambda apps: apps.append(7), "applications[4] must hold keys and values, not 7"),
    ("S2-27", lambda apps: apps.append({**apps[SERVER], "name": "x"}), "applications[4] is a second server"),
    (
        "S2-27",
        lambda apps: apps.append({**apps[MODEL], "name": "x"}),
        f"applications[4] serves '{NAME}', as applications[1] does",
    ),
    ("S2-27", lambda apps: apps.clear(), "applications must be a list with at least one entry"),
    (
        "S2-27",
        lambda apps: apps.__delitem__(slice(1, 3)),
        "must have at least one with import_path: model or sampler",
    ),
    (
        "S2-12",
        lambda apps: apps[MODEL].update(route_prefix="models"),
        "applications[1].route_prefix must be a path",
    ),
    (
        "S2-12",
        lambda apps: apps[MODEL].update(route_prefix="/api/v1"),
        "route_prefix is that of applications[0]",
    ),
    (
        "S2-14",
        args(MODEL, device_mesh={"dp_size": 2, "tp_size": 2}),
        "applications[1].args.device_mesh: dp_size 2 x tp_size 2 = 4 processes do not fit ranks 2",
    ),
    ("S2-13", args(SAMPLER, device_group={"ranks": 3}, device_mesh={"dp_size": 2}), "do not fit ranks 3"),
    (
        "S2-14",
        args(MODEL, device_mesh={"tp_size": 2}),
        "applications[1].args.device_mesh: tp_size 2 is not supported",
    ),
    ("S2-14", args(MODEL, device_mesh={"pp_size": 2}), "pp_size 2 is not supported"),
    (
        "S2-14",
        args(SAMPLER, device_mesh={"ep_size": 2}),
        "applications[2].args.device_mesh: ep_size 2 is not supported",
    ),
    (
        "S2-14",
        args(SAMPLER, sampler_type="torch", device_group={"ranks": 2}, device_mesh={"tp_size": 2}),
        "tp_size 2 is not supported by sampler_type torch",
    ),
    (
        "S2-30",
        args(SERVER, server_config={"supported_models": ["other"]}),
        "names 'other', which no application serves",
    ),
    (
        "S2-30",
        args(SERVER, server_config={"supported_models": [{"model_name": "x"}]}),
        "supported_models[0] must be text",
    ),
    ("S2-30", args(MODEL, model_id="a/b"), "args of 'Qwen/Qwen3.5-4B' says 'a/b': it is one value here"),
    (
        "S2-33",
        deployed(MODEL, autoscaling_config={"max_replicas": 2}),
        "deployments[0].autoscaling_config.max_replicas: 2 replicas are not supported",
    ),
    ("S2-32", deployed(SERVER, max_ongoing_requests=0), "max_ongoing_requests must be at least 1, not 0"),
    ("S2-38", args(MODEL, max_length=0), "applications[1].args.max_length must be at least 1, not 0"),
    ("S2-40", args(MODEL, device_group={"name": "model"}), "applications[1].args.device_group lacks 'ranks'"),
    (
        "S2-40",
        deployed(MODEL, ray_actor_options={"num_gpus": 1}),
        "num_gpus is 1, and device_group stands for 2",
    ),
    (
        "S2-42",
        args(MODEL, queue_config={"rps_limit": -1}),
        "applications[1].args.queue_config.rps_limit must be at least 0",
    ),
    (
        "S2-44",
        args(MODEL, queue_config={"max_tokens": 1}),
        "unknown key 'applications[1].args.queue_config.max_tokens'",
    ),
    (
        "S2-48",
        deployed(MODEL, nme="x"),
        "unknown key 'applications[1].deployments[0].nme'; did you mean 'name'",
    ),
    (
        "S2-49",
        deployed(MODEL, ray_actor_options={"runtime_env": {"env_vars": {"A": 0}}}),
        "env_vars must map text to text; put keys and names in quotes",
    ),
    (
        "S2-51",
        args(SAMPLER, sampler_type="sglang"),
        "sampler_type must be one of auto, torch, vllm, not 'sglang'",
    ),
    (
        "S2-52",
        args(SAMPLER, engine_args={"max_model_len": 0}),
        "engine_args.max_model_len must be at least 1",
    ),
    (
        "S2-53",
        args(SAMPLER, engine_args={"gpu_memory_utilization": 1.5}),
        "gpu_memory_utilization must be above 0 and at most 1, not 1.5",
    ),
    (
        "S2-53",
        args(SAMPLER, engine_args={"gpu_memory_utilization": 0}),
        "gpu_memory_utilization must be above 0",
    ),
    (
        "S2-55",
        args(SAMPLER, engine_args={"logprobs_mode": "raw_logits"}),
        "logprobs_mode must be one of raw_logprobs, processed_logprobs",
    ),
    ("S2-60", args(PROCESSOR, ncpu_proc_per_node=0), "ncpu_proc_per_node must be at least 1"),
    ("S2-60", args(PROCESSOR, device_group={"ranks": 1, "device_type": "cuda"}), "a processor uses no GPU"),
    (
        "S2-61",
        deployed(PROCESSOR, autoscaling_config={"min_replicas": 0}),
        "min_replicas: 0 replicas are not supported",
    ),
    (
        "S2-64",
        lambda apps: apps[MODEL].update(import_path="trainer"),
        "[1].import_path must be one of server, model, processor, sampler, not 'trainer'",
    ),
    (
        "S2-64",
        lambda apps: apps[MODEL].pop("import_path"),
        "must be one of server, model, processor, sampler, not None",
    ),
    (
        "S2-66",
        args(MODEL, device_group={"ranks": 2, "device_type": "npu"}),
        "device_group.device_type must be cuda or CPU, not 'npu'",
    ),
    (
        "S2-66",
        args(MODEL, device_mesh={"device_type": "CPU"}),
        "device_type cpu is not that of device_group, cuda",
    ),
    (
        "S2-67",
        args(MODEL, device_mesh={"dp_size": "2"}),
        "device_mesh.dp_size must be a whole number, not '2'",
    ),
    ("S2-67", args(MODEL, device_group={"ranks": 0}), "ranks is 0, and device_type is cuda"),
    ("S2-46", args(MODEL, adapter_config={"adapter_timeout": -1}), "adapter_timeout must be at least 0"),
]


@pytest.mark.parametrize(
    ("change", "says"), [case[1:] for case in REFUSED], ids=[f"{c[0]} {c[2][:40]}" for c in REFUSED]
)
def test_a_wrong_key_is_refused_by_file_place_and_remedy(
    change: Callable[[Apps], Any], says: str, load: Load
) -> None:
    """S2-12, S2-14, S2-24, S2-27, S2-33, S2-48, S2-53, S2-58, S2-61, S2-64, S2-66, S2-67: each error says where."""
    with pytest.raises(ConfigError) as caught:
        load(changed(change))
    assert "server_config.yaml: " in str(caught.value)
    assert says in str(caught.value)


def test_keys_beside_the_applications_are_refused_like_all_others(load: Load) -> None:
    """S2-23, S2-25, S2-26: unknown sections are rejected, and nothing is said twice."""
    for key, value, says in [
        ("http_option", {}, "unknown key 'http_option'; did you mean 'http_options'"),
        ("proxy_location", "Everywhere", "proxy_location must be one of EveryNode, HeadOnly, Disabled"),
        ("http_options", {"prt": 1}, "unknown key 'http_options.prt'; did you mean 'port'"),
        ("http_options", {"port": 70000}, "port must be 0 (any free one) to 65535, not 70000"),
        ("supported_models", [{"model_name": "a"}], "supported_models is said by the applications too"),
        ("port", 7, "port is said by the applications too"),
        ("telemetry", {}, "unknown key 'telemetry'"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load({**with_transformers(), key: value})
        assert says in str(caught.value)
    misspelt = {"http_options": {"port": 1}, "aplications": []}
    with pytest.raises(ConfigError, match="unknown key 'aplications'; did you mean 'applications'"):
        load(misspelt)
    with pytest.raises(ConfigError, match="applications is missing"):
        load({"http_options": {"port": 1}})
    with pytest.raises(ConfigError, match=r"backends\.training is said by the applications too"):
        load({**with_megatron(), "backends": {"training": "peft"}}, MEGATRON_SERVER_URL="http://h")
