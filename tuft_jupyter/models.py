"""Base models by name: what ``base_model`` may be, and the card of each.

A name is ``tuft/demo`` (the bundled model), a directory on this machine, or a Hugging Face id whose files lie in
the local cache; with ``hf://`` before it no directory is meant, with ``ms://`` an id of ModelScope. Standard library
only, and nothing is ever downloaded: :func:`resolve` reads ``config.json`` and looks at file names. It promises that a
card it returns stands for a directory with a configuration, a tokenizer and weights, and that a refusal names what was
looked for, where, and how to mend it. :func:`context_offered` asks for less, since a configuration is generated before
anybody looks at the model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuft_jupyter import modelscope
from tuft_jupyter.core.errors import UserError

if TYPE_CHECKING:
    from tuft_jupyter.core.types import ModelCard

DEMO = "tuft/demo"
MODELSCOPE, HUGGING_FACE = "ms://", "hf://"
CONTEXT_LIMIT = 32768
"""Tokens of context offered unless configured, however far the model itself goes."""
CONTEXT_ASSUMED = 4096
"""Tokens of context where nothing here says how far a model goes."""

TOKENIZER_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.*",
)
"""Text files from which a client can build the tokenizer (transformers also wants ``config.json``)."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def resolve(name: str, env: Mapping[str, str] = os.environ) -> ModelCard:
    """The card of a base model.

    A directory wins over a hub id of the same name and is served under the last part of its path. UserError if
    there is no such model here, or something is missing from it.
    """
    return _card(*_place(name, env))


def context_offered(name: str, env: Mapping[str, str] = os.environ) -> int:
    """Tokens of context that a generated configuration offers: what ``config.json`` says, within CONTEXT_LIMIT.

    CONTEXT_ASSUMED if it does not say, or if there is no such model here: it may come later.
    """
    try:
        return min(context_trained(name, env), CONTEXT_LIMIT)
    except UserError:
        return CONTEXT_ASSUMED


def context_trained(name: str, env: Mapping[str, str] = os.environ) -> int:
    """Tokens of context that a model's ``config.json`` says it was made for. UserError if it does not say."""
    directory = _place(name, env)[1]
    return _context(name, _config(name, directory))


def without_scheme(name: str) -> str:
    """``ms://`` and ``hf://`` say on which hub an id is; the rest of it is what the model is called."""
    return name.removeprefix(MODELSCOPE).removeprefix(HUGGING_FACE)


def _place(name: str, env: Mapping[str, str]) -> tuple[str, Path]:
    """What a model is served as, and the directory of its files. UserError if there is none."""
    if name == DEMO:
        return DEMO, Path(__file__).parent / "demo"
    if name.startswith(MODELSCOPE):
        return without_scheme(name), modelscope.directory(_hub_id(without_scheme(name)))
    if name.startswith(HUGGING_FACE):
        plain = _hub_id(without_scheme(name))
        return plain, _snapshot(plain, hub_cache(env))
    directory = Path(name).expanduser()
    if name and directory.is_dir():
        directory = directory.resolve()
        return directory.name, directory
    return name, _snapshot(_hub_id(name), hub_cache(env))


def _hub_id(name: str) -> str:
    if name.startswith((".", "~", os.sep)) or not _HUB_ID.fullmatch(name) or ".." in name:
        raise UserError(
            f"base model {name!r}: there is no such directory on the server; give {DEMO!r}, a directory, or a "
            "Hugging Face id such as 'Qwen/Qwen3-0.6B'"
        )
    return name


def tokenizer_files(card: ModelCard) -> list[Path]:
    """The files from which a client can build the model's tokenizer, sorted by name."""
    directory = Path(card.path)
    found = {path for pattern in TOKENIZER_PATTERNS for path in directory.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not path.name.endswith(".index.json"))


def hub_cache(env: Mapping[str, str] = os.environ) -> Path:
    """The Hugging Face cache directory, by the rules of ``huggingface_hub``."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if env.get(variable):
            return Path(env[variable]).expanduser()
    if env.get("HF_HOME"):
        return Path(env["HF_HOME"]).expanduser() / "hub"
    return Path(env.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def _snapshot(name: str, cache: Path) -> Path:
    """The directory in the cache that ``refs/main`` of a hub id names."""
    folder = cache / f"models--{name.replace('/', '--')}"
    fix = f"download it first, for example with: hf download {name}"
    if not folder.is_dir():
        raise UserError(
            f"base model {name!r}: neither a directory on the server nor in its Hugging Face cache {cache}; {fix}"
        )
    try:
        commit = (folder / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        commit = ""
    snapshot = folder / "snapshots" / commit
    if not commit or not snapshot.is_dir():
        raise UserError(f"base model {name!r}: {folder} holds no whole snapshot of 'main'; {fix}")
    return snapshot


def _card(name: str, directory: Path) -> ModelCard:
    # Imported here: numpy comes with it, which importing the package must not load.
    from tuft_jupyter.core.types import ModelCard

    config = _config(name, directory)
    _check_tokenizer(name, directory)
    _check_weights(name, directory)
    architectures = config.get("architectures") or ["unknown"]
    return ModelCard(
        name=name,
        path=str(directory),
        max_context_length=min(_context(name, config), CONTEXT_LIMIT),
        vocab_size=_number(name, config, "vocab_size"),
        arch=str(architectures[0]),
    )


def _config(name: str, directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"base model {name!r}: {directory} has no config.json, so it is not a Hugging Face model; save one there "
            "with save_pretrained()"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"base model {name!r}: {path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"base model {name!r}: {path} holds no JSON object; save the model again")
    return config


def _context(name: str, config: dict[str, Any]) -> int:
    """Positions; with LongRoPE, whose rotation depends on the longest sequence of a batch, the original ones."""
    longest = _number(name, config, "max_position_embeddings")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "longrope" not in (rope.get("rope_type"), rope.get("type")):
        return longest
    key = "original_max_position_embeddings"
    return min(longest, rope.get(key) or _number(name, config, key))


def _number(name: str, config: dict[str, Any], key: str) -> int:
    """A size from the configuration, or from its part about text in models that read more than text."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        value = part.get(key)
        if isinstance(value, int) and value > 0:
            return value
    raise UserError(
        f"base model {name!r}: its config.json has no {key}; only causal language models are served"
    )


def _check_tokenizer(name: str, directory: Path) -> None:
    whole = [("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",)]
    if not any(all((directory / file).is_file() for file in files) for files in whole):
        raise UserError(
            f"base model {name!r}: {directory} has no tokenizer files (looked for tokenizer.json, vocab.json with "
            "merges.txt, vocab.txt); save the tokenizer there with save_pretrained()"
        )


def _check_weights(name: str, directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        if not any(directory.glob("*.safetensors")):
            raise UserError(
                f"base model {name!r}: {directory} has no weights in *.safetensors; convert them with "
                "save_pretrained(), or download them again"
            )
        return
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"base model {name!r}: {index} cannot be read: {error}") from None
    missing = sorted(shard for shard in shards if not (directory / str(shard)).is_file())
    if missing:
        raise UserError(
            f"base model {name!r}: {directory} lacks {len(missing)} of {len(shards)} weight files, the first is "
            f"{missing[0]}; download it again"
        )
