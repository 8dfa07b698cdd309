"""What ``base_model`` may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuft_jupyter import models
from tuft_jupyter.config import load_settings
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.journal import MemoryJournal
from tuft_jupyter.core.ledger import Ledger
from tuft_jupyter_server.catalog import ServerCatalog

CONFIG = {"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 40960, "vocab_size": 151936}


def make(directory: Path, config: dict[str, Any] | None = None) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config or CONFIG))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"")
    return directory


def in_cache(cache: Path, name: str, commit: str = "a" * 40) -> Path:
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    return make(folder / "snapshots" / commit)


def test_a_context_longer_than_the_model_s_own_is_offered_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rotary models can be stretched on purpose; by mistake it should not go unseen."""
    listed = {"model_name": "tiny", "model_path": str(make(tmp_path / "tiny")), "max_model_len": 100_000}
    (tmp_path / "tuft.yaml").write_text(json.dumps({"supported_models": [listed]}))
    settings = load_settings(tmp_path / "tuft.yaml", {"TUFT_HOME": str(tmp_path)})
    assert ServerCatalog(settings, Ledger(MemoryJournal())).cards()[0].max_context_length == 100_000
    assert "100000 tokens of tiny are more than the 40960" in caplog.text


def test_the_demo_model_is_in_the_package() -> None:
    card = models.resolve("tuft/demo")
    assert (card.name, card.arch) == ("tuft/demo", "Qwen3ForCausalLM")
    names = {path.name for path in models.tokenizer_files(card)}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names


def test_a_directory_is_served_under_its_basename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S0-15, S1-18: the directory's name and its path give the same card."""
    make(tmp_path / "tiny")
    by_path = models.resolve(str(tmp_path / "tiny"))
    assert (by_path.name, by_path.vocab_size, by_path.arch) == ("tiny", 151936, "Qwen3ForCausalLM")
    monkeypatch.chdir(tmp_path)
    assert models.resolve("tiny") == by_path


def test_context_is_bounded(tmp_path: Path) -> None:
    make(tmp_path / "long")
    make(tmp_path / "short", {**CONFIG, "max_position_embeddings": 512})
    assert models.resolve(str(tmp_path / "long")).max_context_length == 32768
    assert models.resolve(str(tmp_path / "short")).max_context_length == 512


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_with_longrope_the_original_context_is_offered(key: str, tmp_path: Path) -> None:
    """As its trainer has it, and vLLM."""
    make(tmp_path / "phi", {**CONFIG, "original_max_position_embeddings": 4096, key: {"type": "longrope"}})
    assert models.resolve(str(tmp_path / "phi")).max_context_length == 4096
    assert models.context_trained(str(tmp_path / "phi")) == 4096


def test_sizes_are_found_in_the_text_part_of_the_configuration(tmp_path: Path) -> None:
    text = {"max_position_embeddings": 64, "vocab_size": 100}
    make(tmp_path / "vision", {"architectures": ["X"], "text_config": text})
    assert models.resolve(str(tmp_path / "vision")).vocab_size == 100


@pytest.mark.parametrize("variables", [{"HF_HUB_CACHE": "hub"}, {"HF_HOME": "."}])
def test_a_hub_id_is_found_in_the_local_cache(tmp_path: Path, variables: dict[str, str]) -> None:
    """S1-18: offline, by refs/main."""
    snapshot = in_cache(tmp_path / "hub", "acme/tiny")
    env = {name: str(tmp_path / value) for name, value in variables.items()}
    card = models.resolve("acme/tiny", env)
    assert (card.name, card.path) == ("acme/tiny", str(snapshot))


def test_a_directory_wins_over_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_cache(tmp_path / "hub", "acme/tiny")
    make(tmp_path / "acme" / "tiny")
    monkeypatch.chdir(tmp_path)
    card = models.resolve("acme/tiny", {"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert card.path == str((tmp_path / "acme" / "tiny").resolve())


@pytest.mark.parametrize(
    "name", ["", "/no/such/place", "./tiny", "../../no/such", "a/../b", "a/b/c", "http://x/y", "a\0b"]
)
def test_what_is_no_model_name_is_refused_without_looking_it_up(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        models.resolve(name, {"HF_HUB_CACHE": str(tmp_path)})


def test_a_hub_id_that_is_not_here_says_to_download_it(tmp_path: Path) -> None:
    env = {"HF_HUB_CACHE": str(tmp_path)}
    with pytest.raises(UserError, match=rf"{tmp_path}.*hf download acme/tiny"):
        models.resolve("acme/tiny", env)
    (tmp_path / "models--acme--tiny" / "refs").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no whole snapshot.*hf download acme/tiny"):
        models.resolve("acme/tiny", env)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer files"),
        ("model.safetensors", "has no weights"),
    ],
)
def test_what_a_directory_lacks_is_named(missing: str, said: str, tmp_path: Path) -> None:
    make(tmp_path / "tiny")
    (tmp_path / "tiny" / missing).unlink()
    with pytest.raises(UserError, match=said):
        models.resolve(str(tmp_path / "tiny"))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make(tmp_path / "tiny")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "tiny" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks 1 of 2.*model-2\.safetensors"):
        models.resolve(str(tmp_path / "tiny"))


@pytest.mark.parametrize("text", ["{", "[]", '{"vocab_size": 5}'])
def test_a_configuration_that_cannot_be_used_is_refused(text: str, tmp_path: Path) -> None:
    make(tmp_path / "tiny")
    (tmp_path / "tiny" / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        models.resolve(str(tmp_path / "tiny"))


def test_tokenizer_files_hold_no_weights(tmp_path: Path) -> None:
    make(tmp_path / "tiny")
    for name in ("model.safetensors.index.json", "merges.txt", "chat_template.jinja", "README.md"):
        (tmp_path / "tiny" / name).write_text('{"weight_map": {}}')
    names = [path.name for path in models.tokenizer_files(models.resolve(str(tmp_path / "tiny")))]
    assert names == ["chat_template.jinja", "config.json", "merges.txt", "tokenizer.json"]


def test_a_scheme_says_on_which_hub_an_id_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S2-37: hf:// and a bare id, where a bare one may be a directory; ms:// asks the package modelscope."""
    cached = in_cache(tmp_path / "hub", "acme/tiny")
    env = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    assert models.resolve("hf://acme/tiny", env) == models.resolve("acme/tiny", env)
    assert models.resolve("hf://acme/tiny", env).name == "acme/tiny"
    monkeypatch.chdir(tmp_path)
    here = make(tmp_path / "acme" / "tiny")
    assert models.resolve("acme/tiny", env).path == str(here)
    assert models.resolve("hf://acme/tiny", env).path == str(cached)
    for wrong in ("hf://../x", "hf:///etc", "ms://a/b/c", "ms://", "s3://acme/tiny"):
        with pytest.raises(UserError, match="there is no such directory"):
            models.resolve(wrong, env)
    with pytest.raises(UserError, match=r"the package modelscope.* is not installed: pip install modelscope"):
        models.resolve("ms://acme/tiny", env)


def test_a_model_of_modelscope_is_where_its_package_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S2-37: the package is asked for what it has, and never to download."""
    package = tmp_path / "packages" / "modelscope"
    package.mkdir(parents=True)
    kept = make(tmp_path / "cache" / "acme" / "tiny")
    (package / "__init__.py").write_text(
        "import os\n"
        "def snapshot_download(model_id, local_files_only=False):\n"
        "    assert local_files_only\n"
        f"    path = os.path.join({str(tmp_path / 'cache')!r}, model_id)\n"
        "    if not os.path.isdir(path):\n"
        "        raise ValueError('not in the cache')\n"
        "    print('some progress')\n"
        "    return path\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    card = models.resolve("ms://acme/tiny")
    assert (card.name, card.path) == ("acme/tiny", str(kept))
    with pytest.raises(UserError, match=r"not in ModelScope's cache.*modelscope download --model acme/other"):
        models.resolve("ms://acme/other")
