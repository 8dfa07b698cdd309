"""Settings: where each value comes from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuft_jupyter import home as homes
from tuft_jupyter.config import (
    ConfigError,
    ModelSettings,
    PersistenceConfig,
    Settings,
    config_file,
    generated_config,
    load_settings,
    sampler_choice,
)

SEED = """
supported_models:
  - model_name: Qwen/Qwen3-8B
    model_path: Qwen/Qwen3-8B
    max_model_len: 32768
    tensor_parallel_size: 1
  - model_name: Qwen/Qwen3-32B
    model_path: Qwen/Qwen3-32B
    max_model_len: 32768
    tensor_parallel_size: 2
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"TUFT_HOME": str(tmp_path / "home")}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "models.yaml"
        path.write_text(text)
        return path

    return write


def test_the_readme_s_yaml_parses_verbatim(write: Any, env: dict[str, str]) -> None:
    """S1-16, S1-17, S1-19, S1-20: the file of TuFT's README as it is, names in the order of the file."""
    settings = load_settings(write(SEED), env)
    assert [m.model_name for m in settings.supported_models] == ["Qwen/Qwen3-8B", "Qwen/Qwen3-32B"]
    assert [m.tensor_parallel_size for m in settings.supported_models] == [1, 2]
    assert {m.max_model_len for m in settings.supported_models} == {32768}
    assert settings.supported_models[0].model_path == "Qwen/Qwen3-8B"


def test_model_keys_have_the_defaults_of_tuft() -> None:
    """S1-23: the further keys and their defaults."""
    model = ModelSettings("a")
    assert {k: getattr(model, k) for k in ("temperature", "top_p", "top_k", "logprobs", "seed")} == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "logprobs": 0,
        "seed": 42,
    }
    assert (model.min_response_tokens, model.max_lora_rank, model.max_loras) == (0, 16, 1)


def test_server_keys_have_the_defaults_of_tuft(write: Any, env: dict[str, str]) -> None:
    """S1-23: model_owner, toy_backend_seed, authorized_users; a toy seed is accepted."""
    settings = load_settings(write(SEED + "toy_backend_seed: 7\n"), env)
    assert (settings.model_owner, settings.toy_backend_seed) == ("local-user", 7)
    assert settings.authorized_users == {}
    assert load_settings(write(SEED), env).toy_backend_seed == 0


def test_a_rank_limit_in_the_file_wins_over_the_server_s(write: Any, env: dict[str, str]) -> None:
    settings = load_settings(
        write("supported_models:\n- {model_name: a, max_lora_rank: 128}\n- {model_name: b}"), env
    )
    assert [settings.rank_limit(name) for name in ("a", "b", "tuft/demo")] == [128, 16, 64]


def test_each_source_wins_over_the_one_before(write: Any, env: dict[str, str]) -> None:
    path = write(SEED + "port: 2\n")
    assert load_settings(write(SEED), env).port == 10610
    path = write(SEED + "port: 2\n")
    assert load_settings(path, env).port == 2
    assert load_settings(path, env | {"TUFT_PORT": "3"}).port == 3
    assert load_settings(path, env | {"TUFT_PORT": "3"}, {"port": 4}).port == 4
    assert load_settings(path, env | {"TUFT_PORT": ""}, {}).port == 2


def test_the_checkpoint_directory_is_under_home_unless_told(
    write: Any, env: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """S1-13: YAML key, environment and flag; ``~`` expanded; relative to the file that says it."""
    monkeypatch.setenv("HOME", "/home/ada")
    assert load_settings(write(SEED), env).checkpoint_dir == tmp_path / "home" / "checkpoints"
    assert load_settings(write(SEED + "checkpoint_dir: c"), env).checkpoint_dir == tmp_path / "c"
    assert load_settings(write(SEED + "checkpoint_dir: ~/c"), env).checkpoint_dir == Path("/home/ada/c")
    settings = load_settings(write(SEED + "checkpoint_dir: c"), env, {"checkpoint_dir": "/flag"})
    assert settings.checkpoint_dir == Path("/flag")


def test_a_local_directory_wins_over_a_hub_id_of_the_same_name(
    write: Any, env: dict[str, str], tmp_path: Path
) -> None:
    """S1-18: local path preferred if it exists, seen from the file."""
    path = write("supported_models: [{model_name: Qwen/Qwen3-8B, model_path: Qwen/Qwen3-8B}]")
    assert load_settings(path, env).supported_models[0].model_path == "Qwen/Qwen3-8B"
    (tmp_path / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    assert load_settings(path, env).supported_models[0].model_path == str(tmp_path / "Qwen" / "Qwen3-8B")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("suported_models: []", ["models.yaml", "suported_models", "did you mean 'supported_models'"]),
        (
            "supported_models: [{model_name: a, max_model_length: 5}]",
            ["supported_models[0].max_model_length", "did you mean 'max_model_len'"],
        ),
        ("supported_models: [{model_name: a, zzzzzz: 5}]", ["supported_models[0].zzzzzz", "known keys"]),
        ("supported_models: [{model_path: a}]", ["supported_models[0] lacks 'model_name'"]),
        ("supported_models: [{model_name: 7}]", ["supported_models[0].model_name must be text, not 7"]),
        (
            "supported_models: [{model_name: a, max_model_len: long}]",
            ["supported_models[0].max_model_len must be a whole number, not 'long'"],
        ),
        ("supported_models: [{model_name: a, seed: true}]", ["seed must be a whole number, not True"]),
        ("supported_models: [{model_name: a, seed: 1.5}]", ["seed must be a whole number, not 1.5"]),
        (
            "supported_models: [{model_name: a, max_model_len: 0}]",
            ["supported_models[0].max_model_len must be at least 1, not 0"],
        ),
        ("supported_models: [{model_name: a}, {model_name: a}]", ["names 'a' twice"]),
        ("supported_models: []", ["must list at least one model"]),
        ("checkpoint_dir: x", ["must list at least one model"]),
        ("supported_models: a", ["supported_models must be a list"]),
        ("supported_models: [a]", ["supported_models[0] must hold keys and values, not 'a'"]),
        (SEED + "port: 70000", ["port must be 0 (any free one) to 65535, not 70000"]),
        (SEED + "adapter_timeout: -1", ["adapter_timeout must be at least 0, not -1"]),
        (SEED + "rps_limit: .nan", ["rps_limit must be at least 0, not nan"]),
        (SEED + "port: http", ["port must be a whole number, not 'http'"]),
        (SEED + "log_level: loud", ["log_level must be one of debug"]),
        (SEED + "authorized_users: {tml-1: 7}", ["authorized_users must map text to text"]),
        (SEED + "authorized_users: {alice: tml-1}", ["authorized_users", "write KEY: NAME"]),
        (SEED + "persistence: {mode: cloud}", ["persistence.mode must be disabled, redis_url or file_redis"]),
        (SEED + "persistence: {mod: file}", ["persistence.mod", "did you mean 'mode'"]),
        (SEED + "home: /x", ["unknown key 'home'"]),
        ("- a", ["must hold keys and values"]),
        (SEED + "authorized_users: {tml-1: ''}", ["authorized_users", "write KEY: NAME"]),
        (SEED + "public_url: 'http://[::1'", ["public_url must be an address"]),
        (SEED + "backends: {training_url: 'http://a:99999'}", ["training_url must be an address"]),
        (SEED + "backends: false", ["backends must hold keys and values, not False"]),
        ("a: [", ["not valid YAML"]),
        (SEED + SEED, ["'supported_models' is given twice", "line"]),
        (SEED + "persistence: {mode: file, mode: redis}", ["'mode' is given twice"]),
        ("", ["must hold keys and values"]),
    ],
)
def test_a_wrong_file_is_refused_by_file_key_and_remedy(
    text: str, says: list[str], write: Any, env: dict[str, str]
) -> None:
    """S1-22: at least one model, unique names, unknown keys rejected; each error says where."""
    with pytest.raises(ConfigError) as caught:
        load_settings(write(text), env)
    message = str(caught.value)
    assert "models.yaml" in message
    for part in says:
        assert part in message


def test_a_missing_file_is_named(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"Config file not found: /no/such\.yaml"):
        load_settings("/no/such.yaml", env)


def test_wrong_environment_and_flags_are_named(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="environment variable TUFT_PORT: port must be a whole number"):
        load_settings(None, env | {"TUFT_PORT": "http"})
    with pytest.raises(ConfigError, match=r"command line or traits: unknown key 'prot'; did you mean 'port'"):
        load_settings(None, env, {"prot": 3})


def test_a_file_without_persistence_means_disabled(write: Any, env: dict[str, str]) -> None:
    """S1-51, S1-54: no section == disabled."""
    assert load_settings(write(SEED), env).persistence == PersistenceConfig.disabled()
    explicit = load_settings(write(SEED + "persistence: {mode: disabled}"), env)
    assert not explicit.persistence.enabled


def test_without_a_file_the_journal_is_a_file_under_home(env: dict[str, str], tmp_path: Path) -> None:
    """S1-54: generated configurations and hosted mode without a file use file_redis."""
    persistence = load_settings(None, env).persistence
    assert persistence.mode == "file_redis"
    assert persistence.file_path == tmp_path / "home" / "journal.sqlite"


def test_redis_settings_of_the_readme(write: Any, env: dict[str, str]) -> None:
    """S1-55: the seed's section, and its values as defaults."""
    text = 'persistence:\n  mode: redis_url\n  redis_url: "redis://localhost:6379/0"\n  namespace: "tuft"\n'
    full = load_settings(write(SEED + text), env).persistence
    short = load_settings(write(SEED + "persistence: {mode: redis_url}"), env).persistence
    assert full == short == PersistenceConfig.from_redis_url("redis://localhost:6379/0")


def test_file_settings_of_the_readme(
    write: Any, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """S1-57: the seed's section, ``~`` expanded, and its path as the default."""
    monkeypatch.setenv("HOME", "/home/ada")
    text = (
        'persistence:\n  mode: file_redis\n  file_path: "~/.cache/tuft/file_redis.json"\n  namespace: tuft\n'
    )
    full = load_settings(write(SEED + text), env).persistence
    short = load_settings(write(SEED + "persistence: {mode: file_redis}"), env).persistence
    assert full == short
    assert full.file_path == Path("/home/ada/.cache/tuft/file_redis.json")


def test_persistence_can_be_made_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """S1-58, S1-59, S1-60: three constructors; the seed's literal path; str and Path."""
    monkeypatch.setenv("HOME", "/home/ada")
    made = [
        PersistenceConfig.disabled(),
        PersistenceConfig.from_redis_url("redis://localhost:6379/0"),
        PersistenceConfig.from_file_redis("~/.cache/tuft/file_redis.json"),
    ]
    assert [p.enabled for p in made] == [False, True, True]
    assert made[2].file_path == Path("/home/ada/.cache/tuft/file_redis.json")
    assert PersistenceConfig.from_file_redis(Path("/x")).file_path == Path("/x")
    assert PersistenceConfig.from_redis_url("redis://h", namespace="n").namespace == "n"


@pytest.mark.parametrize(
    ("word", "mode"),
    [
        ("DISABLE", "disabled"), ("memory", "disabled"), ("REDIS", "redis_url"), ("redis", "redis_url"),
        ("FILE", "file_redis"), ("File", "file_redis"), ("File_Redis", "file_redis"),
    ],
)  # fmt: skip
def test_other_words_for_the_modes_are_understood(word: str, mode: str) -> None:
    """X3: TuFT's later words and Twinkle's, in any case."""
    assert PersistenceConfig(mode=word).mode == mode


def test_secrets_are_not_shown() -> None:
    """P5: neither keys nor the password in a Redis address appear where settings are printed."""
    settings = Settings(
        home=Path("/h"),
        checkpoint_dir=Path("/c"),
        authorized_users={"tml-secret": "ada"},
        persistence=PersistenceConfig.from_redis_url("redis://:hunter2@h/0"),
    )
    assert "tml-secret" not in repr(settings)
    assert "hunter2" not in repr(settings)


def test_the_generated_configuration_is_minimal_and_says_what_was_derived(
    env: dict[str, str], tmp_path: Path
) -> None:
    """S0-29: basename, context from the model's own config, one key, file_redis under $TUFT_HOME."""
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    (tiny / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    document = generated_config(str(tiny), env)
    assert document["supported_models"] == [
        {
            "model_name": "tiny",
            "model_path": str(tiny),
            "max_model_len": 512,
            "tensor_parallel_size": 1,
            "max_lora_rank": 64,
        }
    ]
    assert document["persistence"]["mode"] == "file_redis"
    assert document["persistence"]["file_path"].startswith(env["TUFT_HOME"])
    (key,) = document["authorized_users"]
    assert key == homes.ensure_key(Path(env["TUFT_HOME"]))

    path = tmp_path / "generated.yaml"
    path.write_text(yaml.safe_dump(document))
    assert load_settings(path, env).supported_models[0].max_model_len == 512


@pytest.mark.parametrize(
    ("config", "length"), [({"max_position_embeddings": 131072}, 32768), ({}, 4096), (None, 4096)]
)
def test_the_generated_context_length_is_bounded(
    config: dict[str, int] | None, length: int, env: dict[str, str], tmp_path: Path
) -> None:
    """S0-29: min(max_position_embeddings, 32768), else 4096."""
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert generated_config(str(tmp_path), env)["supported_models"][0]["max_model_len"] == length


@pytest.mark.parametrize(("positions", "length"), [(512, 512), (131072, 32768), (None, 4096)])
def test_the_generated_context_length_of_a_hub_id_is_the_cached_model_s(
    positions: int | None, length: int, env: dict[str, str], tmp_path: Path
) -> None:
    """S0-29: of what the local cache holds; 4096 where it holds nothing."""
    env = {**env, "HF_HUB_CACHE": str(tmp_path)}
    if positions is not None:
        cached = tmp_path / "models--acme--tiny"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("abc")
        (cached / "snapshots" / "abc").mkdir(parents=True)
        described = json.dumps({"max_position_embeddings": positions})
        (cached / "snapshots" / "abc" / "config.json").write_text(described)
    (entry,) = generated_config("acme/tiny", env)["supported_models"]
    assert (entry["model_path"], entry["max_model_len"]) == ("acme/tiny", length)


def test_a_given_key_is_the_generated_configuration_s_key(env: dict[str, str]) -> None:
    """S0-34: TUFT_API_KEY is also the key of a server that is started for the user."""
    assert generated_config("tuft/demo", env | {"TUFT_API_KEY": "tml-mine"})["authorized_users"] == {
        "tml-mine": "local-user"
    }
    assert not homes.credentials_path(Path(env["TUFT_HOME"])).exists()


def test_a_model_path_in_the_environment_is_served_without_a_file(
    env: dict[str, str], tmp_path: Path
) -> None:
    """S0-30: TUFT_MODEL_PATH alone makes a configuration."""
    settings = load_settings(None, env | {"TUFT_MODEL_PATH": str(tmp_path)})
    assert [m.model_name for m in settings.supported_models] == [tmp_path.name]
    assert load_settings(None, env).supported_models == ()


def test_merged_keys_may_be_said_again(write: Any, env: dict[str, str]) -> None:
    """YAML's own way to say what differs is no second saying."""
    text = "supported_models:\n- &demo {model_name: tuft/demo, max_lora_rank: 4}\n- {<<: *demo, model_name: other}\n"
    assert [(m.model_name, m.max_lora_rank) for m in load_settings(write(text), env).supported_models] == [
        ("tuft/demo", 4),
        ("other", 4),
    ]


def test_the_file_of_a_server_that_was_named_none(
    env: dict[str, str], write: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """S0-28, S0-31: TUFT_CONFIG, then the Jupyter trait, then the default place."""
    given, trait = write(SEED), tmp_path / "trait.yaml"
    trait.write_text(SEED)
    assert config_file(env) is None
    default = homes.default_config(Path(env["TUFT_HOME"]))
    default.parent.mkdir(parents=True)
    default.write_text(SEED)
    assert config_file(env) == default
    assert config_file(env, str(trait)) == trait
    assert config_file(env | {"TUFT_CONFIG": str(given)}, str(trait)) == given
    assert config_file(env | {"TUFT_CONFIG": "/no/such.yaml"}, "") == default
    assert "TUFT_CONFIG names /no/such.yaml, which does not exist; looking further" in caplog.text


def test_the_sampler_is_chosen_by_what_is_there(write: Any, env: dict[str, str]) -> None:
    """S2-51: vllm or torch; left to itself, vLLM where it is installed and there is a GPU."""
    assert sampler_choice("auto", installed=True, gpu=True)[0] == "vllm"
    assert sampler_choice("auto", installed=True, gpu=False) == ("torch", "there is no GPU")
    assert sampler_choice("auto", installed=False, gpu=True) == ("torch", "vLLM is not installed")
    assert sampler_choice("vllm", installed=False, gpu=False)[0] == "vllm"
    text = "supported_models:\n- {model_name: a, sampler_type: vllm, gpu_memory_utilization: 0.2}\n- {model_name: b}"
    settings = load_settings(write(text), env)
    assert [m.sampler_type for m in settings.supported_models] == ["vllm", None]
    assert settings.model("a").gpu_memory_utilization == 0.2
    with pytest.raises(ConfigError, match="sampler_type must be one of auto, torch, vllm, not 'vlm'"):
        load_settings(write("supported_models: [{model_name: a, sampler_type: vlm}]"), env)
    with pytest.raises(ConfigError, match="gpu_memory_utilization must be above 0"):
        load_settings(write("supported_models: [{model_name: a, gpu_memory_utilization: 0}]"), env)


def test_the_limits_of_a_model_that_no_file_lists_are_the_servers(write: Any, env: dict[str, str]) -> None:
    """S4-19: a rank over the limit is refused when the run is created; the sampler is built for the same limit."""
    settings = load_settings(write("supported_models: [{model_name: a}]"), env | {"TUFT_MAX_LORA_RANK": "24"})
    assert (settings.model("a").max_lora_rank, settings.model("b").max_lora_rank) == (16, 24)
    assert settings.rank_limit("b") == 24
