"""The file in Twinkle's form: what its keys come to, what is refused and what is noted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.server_configs import (
    EXAMPLE,
    MEGATRON,
    MODEL,
    PROCESSOR,
    SAMPLER,
    SERVER,
    changed,
    with_megatron,
    with_transformers,
)
from tuft_jupyter.config import ConfigError, ModelSettings, Settings, load_settings
from tuft_jupyter.config.sections import QueueSettings

NAME = "Qwen/Qwen3.5-4B"
Load = Callable[..., Settings]
Apps = list[dict[str, Any]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(document: Any, **env: str) -> Settings:
        path = tmp_path / "server_config.yaml"
        path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
        return load_settings(path, {"TUFT_HOME": str(tmp_path / "home"), **env})

    return load


def args(app: int, **values: Any) -> Callable[[Apps], None]:
    return lambda apps: apps[app]["args"].update(values)


def deployed(app: int, **values: Any) -> Callable[[Apps], None]:
    return lambda apps: apps[app]["deployments"][0].update(values)


def test_every_key_of_the_seed_s_file_comes_to_a_setting(load: Load) -> None:
    """S2-24, S2-26, S2-27, S2-29, S2-32, S2-38, S2-48, S2-57, S2-58, S2-60, S2-61, S2-63: key by key."""
    settings = load(with_transformers())
    assert (settings.host, settings.port) == ("0.0.0.0", 8000)
    assert (settings.per_token_model_limit, settings.max_ongoing_requests) == (3, 50)
    assert (settings.adapter_timeout, settings.adapter_max_lifetime, settings.max_loras) == (30, 36000, 1)
    assert settings.text_workers == 2
    (model,) = settings.supported_models
    assert model == ModelSettings(
        model_name=NAME,
        model_path=f"ms://{NAME}",
        max_model_len=4096,
        max_train_len=10240,
        max_lora_rank=64,
        trust_remote_code=False,
        sampler_type="vllm",
        gpu_memory_utilization=0.5,
        logprobs_mode="processed_logprobs",
        data_parallel=2,
        training_gpus=2,
        sampling_gpus=1,
        actor_cpus=0.1,
        actor_env={"TWINKLE_TRUST_REMOTE_CODE": "0"},
        training_queue=QueueSettings(100, 10000, 10000),
        sampling_queue=QueueSettings(100, 100000, 0),
    )
    assert settings.backends.training == "peft"


def test_a_file_without_the_optional_keys_has_our_defaults(load: Load, tmp_path: Path) -> None:
    """S2-63, S2-67: adapters leave after 1800 s and end after 36000 s, a mesh has one of each."""
    apps = [
        {"name": "m", "route_prefix": "/m", "import_path": "model", "args": {"model_id": "tuft/demo"}},
        {"name": "s", "route_prefix": "/s", "import_path": "sampler", "args": {"model_id": "tuft/demo"}},
    ]
    settings = load({"applications": apps})
    plain = Settings(home=tmp_path, checkpoint_dir=tmp_path)
    assert (settings.adapter_timeout, settings.adapter_max_lifetime) == (1800, 36000)
    assert (settings.host, settings.port) == (plain.host, plain.port)
    (model,) = settings.supported_models
    assert model == ModelSettings("tuft/demo", max_lora_rank=64, sampler_type="auto")
    assert not settings.notes


def test_what_has_no_effect_here_is_noted_once(load: Load) -> None:
    """S2-25, S2-33, X6, X7: accepted, and said."""
    notes = "\n".join(load(with_transformers()).notes)
    assert "proxy_location has no effect here" in notes
    assert notes.count("target_ongoing_requests has no effect here") == 1
    assert "max_ongoing_requests (50) is below target_ongoing_requests (128)" in notes
    assert "nproc_per_node has no effect here: device_group.ranks decides, 1 (applications[2].args)" in notes


def test_megatron_is_one_thing_in_both_spellings_and_needs_its_server(load: Load) -> None:
    """S2-36, S2-62: the same YAML flips the backend; without an address both ways out are named."""
    url = {"MEGATRON_SERVER_URL": "http://127.0.0.1:5001"}
    spelled = load(MEGATRON, **url)
    assert (spelled.backends.training, spelled.backends.sampling) == ("external", "vllm")
    assert spelled.backends.training_url == url["MEGATRON_SERVER_URL"]
    assert spelled.backends.gpu_memory_utilization == 0.5
    later = changed(lambda apps: apps[MODEL]["args"].pop("use_megatron"), with_megatron())
    later = changed(args(MODEL, backend="megatron"), later)
    assert load(later, **url) == load(with_megatron(), **url)
    named = {**with_megatron(), "backends": {"training_url": "http://h:1"}}
    assert load(named).backends.training_url == "http://h:1"
    for document in (with_megatron(), later):
        with pytest.raises(ConfigError, match="MEGATRON_SERVER_URL to its address, or use_megatron: false"):
            load(document)
        with pytest.raises(ConfigError, match="MEGATRON_SERVER_URL"):
            load(document, USE_MEGATRON="true")
    with pytest.raises(
        ConfigError, match=r"args\.backend is transformers, and use_megatron: true says megatron"
    ):
        load(changed(args(MODEL, use_megatron=True, backend="transformers")))
    ours = changed(args(MODEL, use_megatron=None, backend="Transformers"))
    assert load(ours).supported_models == load(with_transformers()).supported_models


def test_the_example_is_the_seed_s_file_on_a_cpu(load: Load) -> None:
    """S2-11, S2-24, S2-60, X6: every key of the seed is in it; on a CPU ``ranks`` reserves no GPU."""

    def keys(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(keys, value))
        return set(value).union(*map(keys, value.values())) if isinstance(value, dict) else set()

    # what a vLLM on a GPU alone knows is left out of it
    assert keys(with_megatron()) - keys(yaml.safe_load(EXAMPLE.read_text())) == {"gpu_memory_utilization"}
    settings = load(EXAMPLE.read_text())
    assert settings.text_workers == 2
    assert [(model.training_gpus, model.sampling_gpus) for model in settings.supported_models] == [(0, 0)]


@pytest.mark.parametrize(
    ("prefix", "model_id", "name"),
    [
        (f"/api/v1/model/{NAME}", f"ms://{NAME}", NAME),
        (f"/models/{NAME}", f"hf://{NAME}", NAME),
        (f"/models/{NAME}", NAME, NAME),
        (f"/models/{NAME}", "weights/of-mine", NAME),
    ],
)
def test_a_model_is_called_as_supported_models_call_it(
    prefix: str, model_id: str, name: str, load: Load, tmp_path: Path
) -> None:
    """S2-18, S2-30, S2-37, X5: by its id, or by the end of its prefix; a directory is seen from the file."""
    (tmp_path / "weights" / "of-mine").mkdir(parents=True)
    given = changed(args(MODEL, model_id=model_id))
    given = changed(args(SAMPLER, model_id=model_id), given)
    given["applications"][MODEL]["route_prefix"] = prefix
    given["applications"][SAMPLER]["route_prefix"] = prefix.replace("model", "sampler")
    (model,) = load(given).supported_models
    assert model.model_name == name
    where = tmp_path / model_id
    assert model.model_path == (str(where) if where.is_dir() else model_id)


def test_without_a_list_of_models_the_applications_are_the_list(load: Load, tmp_path: Path) -> None:
    """S2-30: each is called by its id or its directory."""
    (tmp_path / "weights" / "of-mine").mkdir(parents=True)
    given = changed(lambda apps: apps[SERVER]["args"].clear())
    other = {"name": "n", "import_path": "model", "args": {"model_id": "./weights/of-mine"}}
    given = changed(lambda apps: apps.append(other), given)
    settings = load(given)
    assert [model.model_name for model in settings.supported_models] == [NAME, "of-mine"]
    assert [app.route_prefix for app in settings.applications if app.model] == [
        f"/api/v1/model/{NAME}",
        f"/api/v1/sampler/{NAME}",
        "/api/v1/model/of-mine",
    ]
    assert "import_path: sampler is of 'of-mine': it is sampled with the defaults" in "".join(settings.notes)


def test_the_mesh_says_how_many_processes_there_are(load: Load) -> None:
    """S2-09, S2-10, S2-67: data parallel processes in training and sampling, tensor parallel ones in sampling."""
    given = changed(args(MODEL, device_group={"ranks": 4}, device_mesh={"dp_size": 4}))
    given = changed(args(SAMPLER, device_group={"ranks": 4}, device_mesh={"dp_size": 2, "tp_size": 2}), given)
    (model,) = load(given).supported_models
    assert (model.data_parallel, model.training_gpus) == (4, 4)
    assert (model.sampling_replicas, model.tensor_parallel_size, model.sampling_gpus) == (2, 2, 4)
    given = changed(args(MODEL, device_group={"ranks": 3}, device_mesh={}))
    assert load(given).supported_models[0].data_parallel == 3
    cpu = {
        "device_group": {"ranks": 0, "device_type": "CPU"},
        "device_mesh": {"device_type": "cpu", "dp_size": 4},
    }
    (model,) = load(changed(args(MODEL, **cpu))).supported_models
    assert (model.data_parallel, model.training_gpus) == (4, 0)


def test_the_word_on_remote_code_is_the_deployment_s_or_the_environment_s(load: Load) -> None:
    """S2-49, S2-68: TWINKLE_TRUST_REMOTE_CODE is TUFT_TRUST_REMOTE_CODE by another name; ours goes first."""
    trusting = {"num_cpus": 0.1, "runtime_env": {"env_vars": {"TWINKLE_TRUST_REMOTE_CODE": "1"}}}
    given = changed(deployed(MODEL, ray_actor_options=trusting))
    with pytest.raises(
        ConfigError, match=r"env_vars\.TWINKLE_TRUST_REMOTE_CODE is '0', and applications\[1\]"
    ):
        load(given)
    given = changed(deployed(SAMPLER, ray_actor_options=trusting), given)
    assert load(given).trusts_code(NAME)
    assert not load(with_transformers(), TWINKLE_TRUST_REMOTE_CODE="1").trusts_code(NAME)
    plain = changed(lambda apps: [app["deployments"].clear() for app in apps])
    assert not load(plain).trusts_code(NAME)
    assert not load(plain, TWINKLE_TRUST_REMOTE_CODE="0").trusts_code(NAME)
    assert load(plain, TWINKLE_TRUST_REMOTE_CODE="1").trusts_code(NAME)
    assert not load(plain, TWINKLE_TRUST_REMOTE_CODE="1", TUFT_TRUST_REMOTE_CODE="0").trusts_code(NAME)


def test_keys_of_our_own_notation_may_stand_beside_the_applications(load: Load, tmp_path: Path) -> None:
    """S2-18, S2-23: the journal, keys and limits that Twinkle has no word for; paths are seen from the file."""
    more = {
        "checkpoint_dir": "c",
        "max_lora_rank": 8,
        "persistence": {"mode": "file", "file_path": "j.sqlite"},
    }
    settings = load({**with_transformers(), **more})
    assert settings.checkpoint_dir == tmp_path / "c"
    assert settings.persistence.file_path == tmp_path / "j.sqlite"
    assert settings.rank_limit(NAME) == 8


def test_a_flag_and_the_environment_win_over_the_file(load: Load, tmp_path: Path) -> None:
    """S2-26."""
    assert load(with_transformers(), TUFT_PORT="7").port == 7
    path = tmp_path / "server_config.yaml"
    assert load_settings(path, {"TUFT_HOME": str(tmp_path)}, {"port": 8}).port == 8


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
