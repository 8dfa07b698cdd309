"""What lives under ``$TUFT_HOME`` (default ``~/.tuft``): the key, the address of the running server, files.

Standard library only, so that a kernel, the notebook server and the daemon can share it. It knows neither
settings nor HTTP. It promises that secrets and addresses are readable by their owner alone, and that a file
is either whole or absent.

::

    credentials            the key that servers of this user accept, ``tml-`` + 32 hex digits (0600)
    signing_secret         what servers of this user sign download addresses and tokens with (0600)
    tuft_current_server    the address of the server that was started last (0600)
    configs/               ``tuft_config.yaml`` (yours), ``generated.yaml`` (the last one made for you, 0600)
    checkpoints/           saved adapters
    journal.sqlite         the journal of servers without a configuration file
    logs/                  what servers started by a kernel print
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

KEY_PREFIX = "tml-"
"""The Tinker SDK refuses keys that begin otherwise."""


def home_dir(env: Mapping[str, str] = os.environ) -> Path:
    """``$TUFT_HOME`` with ``~`` expanded, absolute; it need not exist."""
    return Path(env.get("TUFT_HOME") or "~/.tuft").expanduser().absolute()


def default_config(home: Path) -> Path:
    return home / "configs" / "tuft_config.yaml"


def journal_path(home: Path) -> Path:
    return home / "journal.sqlite"


def credentials_path(home: Path) -> Path:
    return home / "credentials"


def address_path(home: Path) -> Path:
    return home / "tuft_current_server"


def secret_path(home: Path) -> Path:
    return home / "signing_secret"


def ensure_key(home: Path) -> str:
    """The user's own key; made at the first call, the same ever after, whoever asks first."""
    return _ensure(credentials_path(home), KEY_PREFIX + secrets.token_hex(16))


def ensure_secret(home: Path) -> str:
    """What servers of this user sign with (64 hex digits), made at the first call; it never leaves the machine."""
    return _ensure(secret_path(home), secrets.token_hex(32))


def _ensure(path: Path, value: str) -> str:
    """What a private file holds; ``value``, written now, where it is missing or empty."""
    private_directory(path.parent)
    with _alone_in(path.parent):
        found = _read(path)
        if found:
            path.chmod(0o600)
            return found
        write_private(path, value + "\n")
        return value


def private_directory(path: Path) -> Path:
    """The directory, made for its owner alone where it is missing; one that is there stays as it is."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)
    return path


def private_file(path: Path) -> Path:
    """The file, made empty where it is missing, readable by its owner alone."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    path.chmod(0o600)
    return path


def reached_at(host: str, port: int | str) -> str:
    """Where this machine's own programs reach a server that listens on ``host``, or on all addresses there are."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def write_address(home: Path, address: str) -> None:
    """Say where the server that just started listens."""
    private_directory(home)
    write_private(address_path(home), address + "\n")


def read_address(home: Path) -> str | None:
    return _read(address_path(home)) or None


def remove_address(home: Path, address: str) -> None:
    """Take the address back, unless another server wrote its own meanwhile."""
    if read_address(home) == address:
        address_path(home).unlink(missing_ok=True)


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600 so that readers see the old text or the new, never a part."""
    fresh = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""


@contextlib.contextmanager
def _alone_in(home: Path) -> Iterator[None]:
    """One thread of one process at a time."""
    descriptor = os.open(home, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
