"""One connection per kernel: found or started, kept, and given to the stock SDK through its own environment
variables.

:func:`init` goes through four phases (discovered, generated config, started, connected) and tells each to
``report``. It promises to be idempotent and safe from many threads, to leave nothing behind when it fails (so
it can simply be called again), and to import the SDK only when a client is asked for.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tuft_jupyter import home as homes
from tuft_jupyter.config import ConfigError, load_settings
from tuft_jupyter.kernel import launch, models
from tuft_jupyter.kernel.client import (
    CALL_SECONDS,
    PROBE_SECONDS,
    Client,
    Refused,
    Unreachable,
    is_loopback,
    normal,
)
from tuft_jupyter.kernel.discovery import PATIENCE, Found, check, discover
from tuft_jupyter.kernel.errors import TuftConnectionError
from tuft_jupyter.kernel.launch import OwnedServer
from tuft_jupyter.kernel.report import Progress, Table, status_table
from tuft_jupyter.kernel.versions import notes as version_notes
from tuft_jupyter.kernel.versions import sdk_refusal, sdk_version

Report = Callable[[str, str], None]

PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


@dataclass(slots=True)
class Connection:
    """A server that this kernel is connected to. ``model`` is the one that :func:`init` was asked for."""

    client: Client
    source: str
    model: str | None = None
    server: OwnedServer | None = None
    before: dict[str, str | None] = field(default_factory=dict, repr=False)
    """environment variables as they were, to be put back"""
    sdk: Any = field(default=None, repr=False)

    @property
    def address(self) -> str:
        return self.client.address

    def status(self) -> dict[str, Any] | None:
        """What the server says of itself; None if it is not a server of ours."""
        try:
            return self.client.status()
        except Refused as error:
            if error.status == 404:
                return None
            raise TuftConnectionError(f"The TuFT server at {self.address} refuses: {error}.") from None
        except Unreachable as error:
            raise TuftConnectionError(
                f"The TuFT server at {self.address} does not answer ({error}). If it was restarted, "
                "run the cell again; otherwise `%tuft shutdown` and `%tuft init` connect anew."
            ) from None

    def table(self) -> Table:
        return status_table(self.address, self.source, self.status(), self.server is not None)


_lock = threading.RLock()
_connection: Connection | None = None


def init(
    model: str | os.PathLike[str] | None = None,
    address: str | None = None,
    config: str | os.PathLike[str] | None = None,
    api_key: str | None = None,
    ignore_reinit_error: bool = True,
    *,
    here: bool = False,
    report: Report | None = None,
) -> None:
    """Connect this process to a TuFT server, or start one; afterwards ``tinker.ServiceClient()`` works.

    ``model`` is a directory, a hub id or ``tuft/demo``; the server loads it, and init returns when it is
    ready. ``address`` connects to that server or fails; ``config`` starts a server with that YAML file where
    none runs. ``here`` ignores a ``TINKER_BASE_URL`` of your own. ``report(phase, text)`` is told the
    progress; by default it is shown. Calling it again is safe: with another model, that model is added;
    ``ignore_reinit_error=False`` makes a second call a RuntimeError. TuftConnectionError (a RuntimeError)
    says in a sentence what is wrong and what to do.
    """
    wish = _Wish(None if model is None else os.fspath(model), address, config, api_key, here)
    with _lock:
        try:
            _init(wish, ignore_reinit_error, report or Progress())
        except Refused as error:
            raise TuftConnectionError(f"The TuFT server refuses: {error}.") from None
        except Unreachable as error:
            raise TuftConnectionError(f"The TuFT server went away ({error}); run the cell again.") from None
        except OSError as error:
            raise TuftConnectionError(f"{error}. Is $TUFT_HOME ({homes.home_dir()}) writable?") from None


@dataclass(frozen=True, slots=True)
class _Wish:
    """What :func:`init` was asked for."""

    model: str | None
    address: str | None
    config: str | os.PathLike[str] | None
    api_key: str | None = field(repr=False)
    here: bool


def _init(wish: _Wish, again: bool, report: Report) -> None:
    global _connection
    if _connection is not None and not _answers(_connection):
        report("note", f"{_connection.address} no longer answers; connecting anew")
        shutdown()
    if _connection is None:
        connection = _connect(wish, report)
        try:
            _finish(connection, wish.model, report)
        except BaseException:
            _release(connection)
            raise
        _connection = connection
        return
    if not again:
        raise TuftConnectionError(
            f"TuFT is already initialized, with {_connection.address}; call shutdown() first, "
            "or pass ignore_reinit_error=True."
        )
    if wish.address is not None and normal(wish.address) != _connection.address:
        raise TuftConnectionError(
            f"TuFT is already initialized, with {_connection.address}; "
            f"`%tuft shutdown` first, then connect to {normal(wish.address)}."
        )
    key = wish.api_key or os.environ.get("TUFT_API_KEY")
    if key and key != _connection.client.key:
        raise TuftConnectionError(
            f"TuFT is already initialized, with {_connection.address} and another key; "
            "`%tuft shutdown` first, then init with this one."
        )
    if wish.config is not None:
        launch.existing_config(wish.config)
        report("note", f"config={os.fspath(wish.config)} is not used, because {_connection.address} is; "
                       "`%tuft shutdown` first, then init with it")  # fmt: skip
    _finish(_connection, wish.model, report)


def _answers(connection: Connection) -> bool:
    """Whether the server is there; one of our own whose process lives is only busy, and is not ended for that."""
    runs = connection.server is not None and connection.server.process.poll() is None
    return connection.client.alive(CALL_SECONDS if runs else PROBE_SECONDS)


def is_initialized() -> bool:
    return _connection is not None


def current() -> Connection | None:
    """The connection, if there is one."""
    return _connection


def shutdown() -> None:
    """Disconnect; a server that this kernel started is stopped. The environment is put back. Safe at any
    time.
    """
    global _connection
    with _lock:
        connection, _connection = _connection, None
        if connection is not None:
            _release(connection)


def get_service_client() -> Any:
    """The one ``tinker.ServiceClient`` of this connection; without one it connects
    (TUFT_ENABLE_AUTO_CONNECT).
    """
    with _lock:
        if _connection is None:
            if os.environ.get("TUFT_ENABLE_AUTO_CONNECT", "1") != "1":
                raise TuftConnectionError(
                    "TuFT is not initialized and auto-connect is disabled (TUFT_ENABLE_AUTO_CONNECT=0). "
                    "Call tuft_jupyter.init() explicitly."
                )
            init()
        assert _connection is not None
        if _connection.sdk is None:
            refusal = sdk_refusal(sdk_version())
            if refusal:
                raise TuftConnectionError(refusal)
            try:
                import tinker
            except ImportError:
                raise TuftConnectionError(sdk_refusal(None)) from None
            _connection.sdk = tinker.ServiceClient(
                base_url=_connection.address, api_key=_connection.client.key
            )
        return _connection.sdk


def create_training_client(base_model: str | None = None, rank: int | None = None, **options: Any) -> Any:
    """The SDK's ``create_lora_training_client``; ``base_model`` is a name or a directory (default: init's
    model).

    ``options`` go to the SDK as they are (``seed``, ``train_mlp``, ``user_metadata`` ...).
    """
    service = get_service_client()
    connection = _connection
    assert connection is not None
    name = base_model or connection.model or models.only_model(connection.client)
    if base_model is not None and base_model not in connection.client.models():
        name = models.serve(connection.client, base_model)
    return service.create_lora_training_client(
        base_model=name, **({} if rank is None else {"rank": rank}), **options
    )


def _connect(wish: _Wish, report: Report) -> Connection:
    """Find a server or start one, and point the environment at it."""

    def note(text: str) -> None:
        report("note", text)

    if wish.config is not None:
        launch.existing_config(wish.config)
    found = discover(wish.address, wish.api_key, here=wish.here, note=note)
    server = None
    if found is None:
        found, server = _start(wish, report, note)
    else:
        report("discovered", f"{found.address} ({found.source})")
        if wish.config is not None:
            note(f"config={os.fspath(wish.config)} is not used, because a server is running already")
    connection = Connection(found.client, found.source, server=server)
    try:
        _check_key(found.key)
        connection.before = _point_environment_at(found)
    except BaseException:
        _release(connection)
        raise
    return connection


def _start(wish: _Wish, report: Report, note: Callable[[str], None]) -> tuple[Found, OwnedServer]:
    """Start a server of this kernel's own; it takes the key we connect with."""
    key = wish.api_key or os.environ.get("TUFT_API_KEY") or homes.ensure_key(homes.home_dir())
    env = {**os.environ, "TUFT_API_KEY": key}
    source = launch.choose_config(wish.config, wish.model, env, note)
    phase = "generated config" if source.generated else "config"
    report(phase, f"{source.path} (from {source.words}); {_persistence_of(source)}")
    report("started", "a server of this kernel is starting ...")
    began = time.monotonic()
    server = launch.start(source.path, env)
    report("started", f"{server.address} in {time.monotonic() - began:.1f} s (ends with this kernel)")
    offered = check(server.address, key, patience=PATIENCE)
    if isinstance(offered, str):
        server.stop()
        raise TuftConnectionError(f"The server that was started at {server.address} is of no use: {offered}.")
    return Found(server.address, "started by this kernel", offered, key), server


def _finish(connection: Connection, model: str | None, report: Report) -> None:
    """Have the model served, lay the tokenizers, say that all is well."""
    if model is not None:
        connection.model = models.serve(connection.client, model)
        models.wait_until_ready(connection.client, connection.model, report)
    offered = connection.client.models()
    for text in models.lay_tokenizers(connection.client, [connection.model] if connection.model else offered):
        report("note", text)
    status = connection.status() or {}
    for text in version_notes(sdk_version(), str(status.get("version") or "")):
        report("note", text)
    chosen = f"base model {connection.model}" if connection.model else f"base models: {', '.join(offered)}"
    report("connected", f"{connection.address}; {chosen or 'no base model is offered yet'}")


def _point_environment_at(found: Found) -> dict[str, str | None]:
    values = {
        "TUFT_ADDRESS": found.address,
        "TUFT_API_KEY": found.key,
        "TINKER_BASE_URL": found.address,
        "TINKER_API_KEY": found.key,
    }
    exempt = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if is_loopback(found.address) and any(os.environ.get(p) for p in PROXIES) and "127.0.0.1" not in exempt:
        # The SDK would ask the proxy for our own loopback address.
        values |= dict.fromkeys(
            ("no_proxy", "NO_PROXY"), ",".join(filter(None, (exempt, "127.0.0.1,localhost")))
        )
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    return before


def _release(connection: Connection) -> None:
    for name, value in connection.before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if connection.server is not None:
        connection.server.stop()


def _check_key(key: str) -> None:
    if not key.startswith(("tml-", "eyJ")):
        raise TuftConnectionError(
            "The Tinker SDK takes only keys that begin with tml-; "
            "ask for such a key, or name one in authorized_users of the server's configuration."
        )


def _persistence_of(source: launch.Source) -> str:
    try:
        kept = load_settings(source.path).persistence
    except ConfigError as error:
        raise TuftConnectionError(f"{error}.") from None
    if kept.mode == "file_redis":
        return f"the journal is kept in {kept.file_path} (file_redis)"
    return "nothing is kept (persistence: disabled)" if not kept.enabled else "the journal is kept in Redis"
