"""The file in Twinkle's form: what its keys come to, and what is noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.server_configs import (
    EXAMPLE,
    MEGATRON,
    MODEL,
    NAME,
    SAMPLER,
    SERVER,
    Load,
    args,
    changed,
    deployed,
    with_megatron,
    with_transformers,
)
from tuft_jupyter.config import ConfigError, ModelSettings, Settings, load_settings
from tuft_jupyter.config.sections import QueueSettings


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
