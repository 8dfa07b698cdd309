"""The section ``backends``: its environment variables, their defaults, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuft_jupyter.config import BackendsConfig, ConfigError, Settings, load_settings

MODE_1 = {
    "USE_MEGATRON": "true",
    "USE_VLLM": "true",
    "MEGATRON_SERVER_URL": "http://localhost:5000",
    "VLLM_BASE_URL": "http://localhost:8000",
    "VLLM_ENABLE_LORA": "true",
    "VLLM_MAX_LORAS": "4",
}


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"TUFT_HOME": str(tmp_path / "home")}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(f"supported_models: [{{model_name: tuft/demo, max_lora_rank: 128}}]\n{text}")
    return path


def test_with_nothing_set_the_defaults_are_these(home: dict[str, str]) -> None:
    """S4-08, S4-09, S4-10, S4-11, S4-15, S4-16, S4-17, S4-18, S4-19, X9, X10."""
    assert load_settings(None, home).backends == BackendsConfig(
        training="peft",
        sampling="auto",
        training_url="http://localhost:5000",
        vllm_url="http://127.0.0.1:8000",
        vllm_group_port=51216,
        gpu_memory_utilization=0.2,
        enable_lora=True,
        max_loras=4,
        max_lora_rank=64,
        max_workers=4,
    )


@pytest.mark.parametrize(
    ("env", "training", "sampling"),
    [
        (MODE_1, "external", "external"),
        ({"USE_MEGATRON": "TRUE", "USE_VLLM": "False"}, "external", "auto"),
        ({"USE_VLLM": "true", "VLLM_BASE_URL": "http://gpu:8000"}, "none", "external"),
        ({"USE_MEGATRON": "false", "USE_VLLM": "true", "VLLM_PORT": "8000"}, "none", "external"),
        ({"USE_VLLM": "true"}, "none", "vllm"),
        ({"USE_MEGATRON": "true", "USE_VLLM": "true"}, "external", "vllm"),
        ({"USE_MEGATRON": "true"}, "external", "auto"),
        ({"USE_MEGATRON": "false", "USE_VLLM": "false"}, "peft", "torch"),
        ({"USE_MEGATRON": "", "USE_VLLM": ""}, "peft", "auto"),
        ({"MEGATRON_SERVER_URL": "http://gpu:5000", "VLLM_BASE_URL": "http://gpu:8000"}, "peft", "auto"),
    ],
)
def test_the_flags_choose_the_mode(
    home: dict[str, str], env: dict[str, str], training: str, sampling: str
) -> None:
    """S4-08, S4-09, S4-20, S4-41: the three modes, and an address alone changes nothing."""
    backends = load_settings(None, home | env).backends
    assert (backends.training, backends.sampling) == (training, sampling)


@pytest.mark.parametrize(
    ("env", "url"),
    [
        (
            {"VLLM_BASE_URL": "http://gpu:9000/", "VLLM_HOST": "other", "VLLM_PORT": "1"},
            "http://gpu:9000",
        ),
        ({"VLLM_BASE_URL": "http://gpu:9000/v1/"}, "http://gpu:9000"),
        ({"VLLM_PORT": "9000"}, "http://127.0.0.1:9000"),
        ({"VLLM_HOST": "0.0.0.0"}, "http://127.0.0.1:8000"),
        ({"VLLM_HOST": "gpu", "VLLM_PORT": "81"}, "http://gpu:81"),
        ({"VLLM_HOST": "fd00::7"}, "http://[fd00::7]:8000"),
    ],
)
def test_the_address_of_vllm_follows_from_three_variables(
    home: dict[str, str], env: dict[str, str], url: str
) -> None:
    """S4-12, S4-13, S4-14."""
    backends = load_settings(None, home | env | {"USE_VLLM": "true"}).backends
    assert (backends.sampling, backends.vllm_url) == ("external", url)


def test_every_other_variable_is_one_key(home: dict[str, str]) -> None:
    """S4-10, S4-11, S4-15, S4-16, S4-17, S4-18, S4-19."""
    env = {
        "MEGATRON_SERVER_URL": "http://gpu:5001/", "MEGATRON_SERVER_KEY": "tml-there", "VLLM_API_KEY": "secret",
        "VLLM_GROUP_PORT": "51217", "VLLM_GPU_MEMORY_UTIL": "0.05", "VLLM_ENABLE_LORA": "False",
        "VLLM_MAX_LORAS": "2", "VLLM_MAX_LORA_RANK": "8", "MAX_WORKERS": "3",
    }  # fmt: skip
    assert load_settings(None, home | env).backends == BackendsConfig(
        "peft", "auto", "http://gpu:5001", "tml-there", BackendsConfig().vllm_url, "secret",
        51217, 0.05, False, 2, 8, 3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("USE_VLLM", "maybe", "USE_VLLM must be true or false, not 'maybe'"),
        ("USE_MEGATRON", "yes", "USE_MEGATRON must be true or false"),
        ("VLLM_ENABLE_LORA", "2", "enable_lora must be true or false"),
        ("MAX_WORKERS", "0", "max_workers must be at least 1"),
        ("MAX_WORKERS", "many", "max_workers must be a whole number"),
        ("VLLM_PORT", "http", "VLLM_PORT must be a whole number"),
        ("VLLM_GROUP_PORT", "70000", "vllm_group_port must be 1 to 65535"),
        ("VLLM_GPU_MEMORY_UTIL", "20", "gpu_memory_utilization must be above 0 and at most 1"),
        ("MEGATRON_SERVER_URL", "localhost:5000", "training_url must be an address"),
    ],
)
def test_a_variable_that_is_wrong_is_named(
    home: dict[str, str], variable: str, value: str, message: str
) -> None:
    """S4-15, S4-20."""
    with pytest.raises(ConfigError, match=f"environment variable {variable}: .*{message}"):
        load_settings(None, home | {variable: value})


def test_the_file_says_the_same_and_the_environment_goes_before_it(
    tmp_path: Path, home: dict[str, str]
) -> None:
    """S4-08, S4-09, S4-12."""
    section = "backends: {training: peft, sampling: external, vllm_url: 'http://gpu:8000'}"
    path = written(tmp_path, section)
    assert load_settings(path, home).backends.vllm_url == "http://gpu:8000"
    kept = load_settings(path, home | {"USE_VLLM": "true"}).backends
    assert (kept.training, kept.sampling, kept.vllm_url) == ("peft", "external", "http://gpu:8000")
    off = load_settings(path, home | {"USE_VLLM": "false"}).backends
    assert (off.training, off.sampling) == ("peft", "torch")
    both = load_settings(path, home | MODE_1).backends
    assert (both.training, both.vllm_url) == ("external", "http://localhost:8000")
    gone = written(tmp_path, "backends: {training: external}")
    assert load_settings(gone, home | {"USE_MEGATRON": "false"}).backends.training == "none"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("backends: {training: deepspeed}", "backends.training must be one of peft, external, none"),
        ("backends: {sampling: sglang}", "backends.sampling must be one of auto, torch"),
        ("backends: {vllm_adress: x}", "unknown key 'backends.vllm_adress'"),
        ("backends: external", "backends must hold keys and values"),
    ],
)
def test_a_section_that_is_wrong_is_named(
    tmp_path: Path, home: dict[str, str], section: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(written(tmp_path, section), home)


def test_a_rank_that_vllm_could_not_sample_is_over_the_limit(tmp_path: Path, home: dict[str, str]) -> None:
    """S4-19: the limit holds at create; without vLLM the model's own stays."""

    def limit(env: dict[str, str]) -> int:
        settings: Settings = load_settings(written(tmp_path, ""), home | env)
        return settings.rank_limit("tuft/demo")

    assert limit({}) == 128
    assert limit(MODE_1) == 64
    assert limit(MODE_1 | {"VLLM_MAX_LORA_RANK": "256"}) == 128


def test_keys_are_not_printed(home: dict[str, str]) -> None:
    shown = repr(load_settings(None, home | {"MEGATRON_SERVER_KEY": "tml-there", "VLLM_API_KEY": "secret"}))
    assert "tml-there" not in shown
    assert "secret" not in shown
