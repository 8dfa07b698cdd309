"""Tokenizers of served models, in the layout of the hub client's cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stub_hub import StubHub
from tuft_jupyter.kernel import hub, tokenizers
from tuft_jupyter.kernel.tokenizers import cache_dir, digest, lay, repository

FILES = {"config.json": json.dumps({"model_type": "qwen3", "vocab_size": 320}), "tokenizer.json": "{}"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "name",
    ["/models/tiny", "/data/models/tiny", "./tiny", "my model", "a--b", "..", "moonshotai/Kimi-K3", ""],
)
def test_what_is_no_repository_is_not_laid(name: str) -> None:
    """tinker_wire 5: of ``/models/tiny`` the SDK would load ``/models``; such a model is served as ``tiny``."""
    assert repository(name) is None


def test_laying_follows_the_hub_client_s_layout(cache: Path) -> None:
    assert lay("tuft/demo", FILES, cache)
    folder = cache / "models--tuft--demo"
    commit = (folder / "refs" / "main").read_text()
    assert len(bytes.fromhex(commit)) == 20
    assert {p.name: p.read_text() for p in (folder / "snapshots" / commit).iterdir()} == FILES


def test_laying_again_changes_nothing(cache: Path) -> None:
    def picture() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in cache.rglob("*")}

    lay("tiny", FILES, cache)
    before = picture()
    assert lay("tiny", FILES, cache)
    assert picture() == before


def test_a_new_version_is_laid_beside_the_old_and_taken(cache: Path) -> None:
    lay("tiny", FILES, cache)
    newer = {**FILES, "tokenizer.json": '{"version": 2}'}
    assert lay("tiny", newer, cache)
    folder = cache / "models--tiny"
    assert (folder / "refs" / "main").read_text() == digest(newer)
    assert len(list((folder / "snapshots").iterdir())) == 2


def test_a_real_download_is_never_touched(cache: Path) -> None:
    """A snapshot the hub client made stays; a different tokenizer is told, the same one is not."""
    folder = cache / "models--acme--tiny"
    real = folder / "snapshots" / ("a" * 40)
    real.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    blob = folder / "blobs" / "b"
    blob.parent.mkdir()
    blob.write_text("{}")
    (real / "tokenizer.json").symlink_to(blob)
    before = sorted(str(p) for p in folder.rglob("*"))
    assert lay("acme/tiny", FILES, cache)
    assert not lay("acme/tiny", {**FILES, "tokenizer.json": "other"}, cache)
    assert sorted(str(p) for p in folder.rglob("*")) == before
    assert (folder / "refs" / "main").read_text() == "a" * 40


def test_a_damaged_snapshot_of_ours_is_mended(cache: Path) -> None:
    lay("tiny", FILES, cache)
    snapshot = cache / "models--tiny" / "snapshots" / digest(FILES)
    (cache / "models--tiny" / "refs" / "main").unlink()
    (snapshot / "tokenizer.json").write_text("cut")
    assert lay("tiny", FILES, cache)
    assert (snapshot / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["../evil.json", "a/b.json", "tokenizer.py", ".hidden.json", "weights.bin"])
def test_only_plain_text_files_of_a_tokenizer_are_laid(name: str, cache: Path) -> None:
    """A server elsewhere cannot write outside the cache, nor place code in it."""
    with pytest.raises(ValueError, match="not a tokenizer file"):
        lay("tiny", {**FILES, name: "x"}, cache)
    assert not cache.exists()


def test_the_cache_is_the_hub_client_s(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("huggingface_hub")]:
        monkeypatch.delitem(sys.modules, module)
    assert cache_dir({"HF_HUB_CACHE": "/c"}) == Path("/c")
    assert cache_dir({"HUGGINGFACE_HUB_CACHE": "/c"}) == Path("/c")
    assert cache_dir({"HF_HOME": "/h"}) == Path("/h/hub")
    assert cache_dir({"XDG_CACHE_HOME": "/x"}) == Path("/x/huggingface/hub")
    assert cache_dir({"HOME": "/"}) == Path("~/.cache/huggingface/hub").expanduser()


@pytest.mark.parametrize(
    ("path", "repo"),
    [
        ("/api/models/tuft/demo", "tuft/demo"),
        ("/api/models/tiny", "tiny"),
        ("/api/models/tiny/revision/main", "tiny"),
        ("/api/models/tuft/demo/tree/main/additional_chat_templates", "tuft/demo"),
        ("/tuft/demo/resolve/main/config.json", "tuft/demo"),
        ("/tiny/resolve/main/config.json", "tiny"),
        ("/api/models/tiny/other", "tiny/other"),
        ("/datasets/tuft/demo/resolve/main/x.json", "datasets/tuft/demo"),
        ("/api/datasets/tuft/demo", None),
        ("/api/whoami-v2", None),
    ],
)
def test_a_request_to_the_hub_is_told_by_its_repository(path: str, repo: str | None) -> None:
    assert hub.asked_about(path) == repo


@pytest.fixture
def fake_hub() -> Iterator[StubHub]:
    with StubHub() as running:
        yield running


def test_a_model_that_the_hub_knows_is_left_to_the_hub(fake_hub: StubHub, dead: str) -> None:
    asked = hub._not_on_the_hub(["acme/known", "acme/unknown", "tiny", "tuft/demo"], fake_hub.address)
    assert asked == ["acme/unknown", "tiny", "tuft/demo"]
    assert fake_hub.paths == ["/api/models/acme/known", "/api/models/acme/unknown"]
    for endpoint in (dead, "hub.example"):  # the latter has no scheme
        assert hub._not_on_the_hub(["acme/known"], endpoint) == ["acme/known"]


def test_a_server_s_tokenizers_are_laid_into_the_cache_of_the_environment(tmp_path: Path) -> None:
    constants = sys.modules.get("huggingface_hub.constants")
    expected = Path(constants.HF_HUB_CACHE) if constants else tmp_path / "hf" / "hub"
    assert tokenizers.cache_dir() == expected
