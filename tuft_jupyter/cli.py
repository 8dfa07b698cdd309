"""``tuft``: the server as a daemon, and a look at it. Also ``jupyter tuft``, ``python -m
tuft_jupyter_server``.

Without a verb, ``--config`` means ``launch``, and anything else is the form of TuFT's README:
``tuft --port 8080 --checkpoint-dir d --model-config m.yaml``. Flags win over the environment and the file.
Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from tuft_jupyter import cli_check, cli_keys, cli_runs
from tuft_jupyter._version import __version__
from tuft_jupyter.config import (
    DEFAULT_PORT,
    LOG_LEVELS,
    RAY_NAMESPACE,
    ConfigError,
    Settings,
    config_file,
    load_settings,
)
from tuft_jupyter.core.errors import TuftError
from tuft_jupyter.kernel import doctor
from tuft_jupyter.kernel.errors import TuftConnectionError
from tuft_jupyter.kernel.report import Table, status_table
from tuft_jupyter.kernel.versions import difference
from tuft_jupyter.serving import serve

VERBS = (
    "launch", "check-config", "status", "runs", "export", "keys", "hub-service", "doctor", "config", "stop"
)  # fmt: skip
NO_MODEL_CONFIG = "Model configuration file must be provided via --model-config"
OTHERS = {
    "runs": cli_runs.runs,
    "export": cli_runs.export,
    "stop": cli_runs.stop,
    "keys": cli_keys.run,
    "check-config": cli_check.run,
}
OVERRIDES = ("host", "port", "checkpoint_dir", "log_level", "ray_namespace")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="tuft", description="Fine-tuning as a notebook primitive.")
    top.add_argument("--version", action="version", version=f"tuft-jupyter {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="{" + ",".join(VERBS) + "}")
    launch = verbs.add_parser("launch", help="serve without a notebook server, until stopped")
    launch.add_argument(
        "--config",
        "-c",
        metavar="FILE",
        help="YAML configuration (default: TUFT_CONFIG, then "
        "$TUFT_HOME/configs/tuft_config.yaml; without any, tuft/demo is offered)",
    )
    _server_options(launch)
    status = verbs.add_parser("status", help="what the running server says of itself")
    status.add_argument(
        "--address", metavar="URL", help="of this server (default: the one that %%tuft init finds)"
    )
    cli_check.add_parser(verbs)
    cli_runs.add_parsers(verbs)
    cli_keys.add_parser(verbs)
    service = verbs.add_parser("hub-service", help="serve all users of a JupyterHub, as a service of it")
    service.add_argument("--config", "-c", metavar="FILE", help="YAML configuration")
    verbs.add_parser("doctor", help="versions, interpreters and what is missing")
    config = verbs.add_parser("config", help="print the configuration that is generated for a model")
    config.add_argument("--show", action="store_true", help="print it (the default)")
    config.add_argument("model", nargs="?", help="a directory, a hub id or tuft/demo")
    return top


def legacy_parser() -> argparse.ArgumentParser:
    """The command line of TuFT 0.1."""
    top = argparse.ArgumentParser(
        prog="tuft",
        description="Serve base models for fine-tuning (short for `tuft launch`).",
        epilog="`tuft launch --help`, `tuft status`, `tuft doctor` and `tuft config` do more.",
    )
    _server_options(top)
    return top


def _server_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--model-config", metavar="FILE", help="YAML file with supported_models")
    options.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    options.add_argument("--port", "-p", type=int, help=f"port (default: {DEFAULT_PORT}; 0: any free one)")
    options.add_argument(
        "--checkpoint-dir", metavar="DIR", help="where checkpoints are kept; made if missing"
    )
    options.add_argument("--log-level", type=str.lower, choices=LOG_LEVELS, help="(default: info)")
    options.add_argument(
        "--namespace", dest="ray_namespace", metavar="NAME", help=f"Ray namespace (default: {RAY_NAMESPACE})"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 it failed, 2 it was asked wrongly."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except (ConfigError, TuftConnectionError, TuftError, OSError) as error:
        print(f"tuft: {error}", file=sys.stderr)
        return 1


def _run(words: list[str]) -> int:
    if words and words[0] not in VERBS and not {"--version", "--help", "-h"} & set(words):
        if any(word.partition("=")[0] in ("--config", "-c") for word in words):
            words = ["launch", *words]
        elif words[0].startswith("-"):
            return _legacy(words)
    options = parser().parse_args(words or ["--help"])
    match options.verb:
        case "launch":
            return _serve(_settings(options, options.config or options.model_config))
        case "hub-service":
            return _hub_service(options.config)
        case "status":
            return _status(options.address)
        case verb if verb in OTHERS:
            return OTHERS[verb](options)
        case "doctor":
            print(Table("TuFT doctor", doctor.findings()))
        case "config":
            print(doctor.shown_config(options.model), end="")
    return 0


def _legacy(words: list[str]) -> int:
    options = legacy_parser().parse_args(words)
    if not options.model_config:
        print(NO_MODEL_CONFIG, file=sys.stderr)
        return 2
    return _serve(_settings(options, options.model_config))


def _settings(options: argparse.Namespace, file: str | None) -> Settings:
    given: dict[str, Any] = {name: getattr(options, name) for name in OVERRIDES}
    overrides = {name: value for name, value in given.items() if value is not None}
    return load_settings(file or config_file(), overrides=overrides)


def _serve(settings: Settings) -> int:
    serve(settings)
    return 0


def _hub_service(file: str | None) -> int:
    try:
        from tuft_jupyter_server.hub import serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'{error.name} is not installed here: pip install "tuft-jupyter[hub,backend]"'
        ) from None
    serve(load_settings(file or config_file()))
    return 0


def _status(address: str | None) -> int:
    from tuft_jupyter.kernel.connect import Connection
    from tuft_jupyter.kernel.discovery import discover

    found = discover(address, None, note=lambda text: print(f"tuft: {text}", file=sys.stderr))
    if found is None:
        print("tuft: no server is running; `tuft launch` starts one", file=sys.stderr)
        return 1
    status = Connection(found.client, found.source).status()
    print(status_table(found.address, found.source, status, owned=False))
    unlike = difference("the server runs", str((status or {}).get("version") or ""), "this command")
    if unlike:
        print(f"tuft: {unlike}", file=sys.stderr)
    return 0
