"""Served models' tokenizers, laid where ``get_tokenizer()`` of an unmodified SDK looks for them.

The SDK fetches no tokenizer from the server: it asks transformers for a *name*, and transformers asks the
Hugging Face cache. :func:`lay` puts the files the server sent into that cache, in the hub client's own layout
(``models--org--name/refs/main`` naming ``snapshots/<40 hex>/``). The snapshot's name is a digest of its
files, so a snapshot of ours can be told from a real one, laying again changes nothing, and a new version is a
new directory.

It knows the cache's layout and how the SDK turns model names into repository names. It promises to write
atomically, never to touch a snapshot that a real download made, and to lay text files only, never code.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

SUFFIXES = (".json", ".txt", ".jinja")
LLAMA_3 = "thinkingmachineslabinc/meta-llama-3-instruct-tokenizer"
HUB_ONLY = ("TML/", "thinkingmachines/", "moonshotai/Kimi-K")
"""Names for which the SDK uses code of its own, or a pinned revision."""


def repository(model: str) -> str | None:
    """The hub repository whose tokenizer the SDK loads for a model name, None if it looks elsewhere.

    As in SDK 0.38: cut at a colon; the Llama 3 family shares one repository; of ``org/model/variant`` the
    variant is dropped. What then is no valid repository name (a path, a space) transformers cannot look up at
    all.
    """
    name = model.split(":")[0]
    if name.startswith(HUB_ONLY):
        return None
    if name.startswith("meta-llama/Llama-3"):
        return LLAMA_3
    if name.count("/") == 2:
        name = name.rpartition("/")[0]
    parts = name.split("/")
    valid = len(parts) <= 2 and len(name) <= 96 and "--" not in name and ".." not in name
    return name if valid and all(re.fullmatch(r"\w([\w.-]*\w)?", part, re.ASCII) for part in parts) else None


def cache_dir(env: Mapping[str, str] = os.environ) -> Path:
    """The hub client's cache: what it already decided if it is loaded, else what it will read from
    ``env``.
    """
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        return Path(constants.HF_HUB_CACHE)
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if env.get(variable):
            return Path(env[variable]).expanduser()
    if env.get("HF_HOME"):
        return Path(env["HF_HOME"]).expanduser() / "hub"
    return Path(env.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def lay(repo: str, files: Mapping[str, str], cache: Path) -> bool:
    """Lay tokenizer files as ``repo``; False if a real download of another content is there and stays.

    OSError if the cache cannot be written, ValueError if the files are not those of a tokenizer.
    """
    _check(files)
    folder = cache / f"models--{repo.replace('/', '--')}"
    commit = digest(files)
    current = _current(folder)
    if current is not None and not _is_ours(folder / "snapshots" / current):
        return _same(folder / "snapshots" / current, files)
    _write_snapshot(folder / "snapshots" / commit, files)
    if current != commit:
        reference = folder / "refs" / "main"
        reference.parent.mkdir(parents=True, exist_ok=True)
        fresh = reference.with_name(f".main-{secrets.token_hex(4)}")
        fresh.write_text(commit, encoding="ascii")
        fresh.replace(reference)
    return True


def digest(files: Mapping[str, str]) -> str:
    """40 hex digits that name these files with this content."""
    total = hashlib.sha1(b"tuft tokenizer\0", usedforsecurity=False)
    for name in sorted(files):
        for part in (name.encode(), files[name].encode()):
            total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()


def _check(files: Mapping[str, str]) -> None:
    for name in files:
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII) or not name.endswith(SUFFIXES):
            raise ValueError(f"the server sent {name!r}, which is not a tokenizer file")
    if "config.json" not in files:
        raise ValueError("the server sent no config.json, without which transformers finds no tokenizer")


def _current(folder: Path) -> str | None:
    try:
        commit = (folder / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return commit if (folder / "snapshots" / commit).is_dir() else None


def _is_ours(snapshot: Path) -> bool:
    if any(path.is_symlink() or not path.is_file() for path in snapshot.iterdir()):
        return False
    try:
        found = {path.name: path.read_bytes().decode() for path in snapshot.iterdir()}
    except UnicodeDecodeError:
        return False
    return digest(found) == snapshot.name


def _same(snapshot: Path, files: Mapping[str, str]) -> bool:
    """Whether a real snapshot tokenizes as the served files do."""
    try:
        return (snapshot / "tokenizer.json").read_bytes() == files.get("tokenizer.json", "").encode()
    except OSError:
        return False


def _write_snapshot(target: Path, files: Mapping[str, str]) -> None:
    if target.is_dir():
        if _is_ours(target):
            return
        shutil.rmtree(target)
    fresh = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    fresh.mkdir(parents=True)
    try:
        for name, text in files.items():
            (fresh / name).write_bytes(text.encode())
        fresh.rename(target)
    except OSError:
        # Another kernel laid the same files meanwhile; anything else is a real failure.
        if not (target.is_dir() and _is_ours(target)):
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
