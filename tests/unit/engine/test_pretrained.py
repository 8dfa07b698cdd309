"""Code that a model brings: never run unless its owner said so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.tiny_models import make_model
from tuft_jupyter.config import load_settings
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.engine.base import load_base
from tuft_jupyter.engine.text import TextModel

ROOT = Path(__file__).parents[3]


def hostile(directory: Path) -> Path:
    """A model of a type that only the code beside it defines; its code leaves ``ran`` behind when it is imported."""
    make_model(directory)
    code = [
        "import pathlib",
        f"pathlib.Path({str(directory / 'ran')!r}).touch()",
        "from transformers import Qwen3Config, Qwen3ForCausalLM",
        "class OwnConfig(Qwen3Config): model_type = 'own'",
        "class OwnModel(Qwen3ForCausalLM): config_class = OwnConfig",
    ]
    (directory / "own.py").write_text("\n".join(code))
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    path.write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("said", [None, "0"])
def test_code_beside_a_model_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    """S2-07: neither by default nor with 0, for the model or for its tokenizer; the refusal names the setting."""
    if said is None:
        monkeypatch.delenv("TUFT_TRUST_REMOTE_CODE", raising=False)
    else:
        monkeypatch.setenv("TUFT_TRUST_REMOTE_CODE", said)
    directory = hostile(tmp_path / "own")
    with pytest.raises(UserError, match="trust_remote_code: true"):
        load_base(directory)
    TextModel(directory)
    assert not (directory / "ran").exists()


def test_code_beside_a_trusted_model_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S2-07: only with 1."""
    monkeypatch.setenv("TUFT_TRUST_REMOTE_CODE", "1")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = hostile(tmp_path / "own")
    assert load_base(directory).vocab_size > 0
    assert (directory / "ran").exists()


def test_trust_is_said_for_all_and_otherwise_for_one(tmp_path: Path) -> None:
    """S2-07: false unless said; a model's own word wins over the word for all, the environment over the file."""
    file = tmp_path / "tuft.yaml"
    models = "supported_models: [{model_name: a, trust_remote_code: true}, {model_name: b}]\n"
    file.write_text(models)
    plain = load_settings(file, {})
    assert [plain.trusts_code(name) for name in "abc"] == [True, False, False]
    env = {"TUFT_TRUST_REMOTE_CODE": "1"}
    assert [load_settings(file, env).trusts_code(name) for name in "abc"] == [True, True, True]
    file.write_text(models.replace("true", "false") + "trust_remote_code: true\n")
    assert [load_settings(file, {}).trusts_code(name) for name in "ab"] == [False, True]


def test_nothing_in_the_tree_unpacks_code_or_trusts_it_elsewhere() -> None:
    """H7, S2-07: no pickle, no torch.load, no extractall; trust is decided in one place."""
    told = re.compile(r"trust_remote_code\s*=|\"trust_remote_code\"")
    loads = re.compile(
        r"\bpickle\b|(?<!safetensors\.)torch\.load\(|\bextractall\b|(?<!Propagator\(\)\.)\bextract\("
    )
    for folder in ("tuft_jupyter", "server_ext"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            if path.name != "pretrained.py":
                assert not told.search(text), path
            assert not loads.search(text), path
