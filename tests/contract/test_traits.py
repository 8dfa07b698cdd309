"""Settings given as a notebook server's own configuration has them: as traits."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.run_on_server import Server
from tests.support.live import ask, environment, key_of


def logged(home: Path, *options: str, **more: str) -> str:
    """What a notebook server with these options prints while one request is answered."""
    root = home / "notebooks"
    root.mkdir(parents=True)
    spelled = "--TuftExtension.log_format=%(levelname)s %(name)s: %(message)s"
    with Server(root, home, env=environment(home, **more), options=(spelled, *options)) as server:
        ask(f"{server.url.rstrip('/')}/tuft", "sessions", key_of(home))
    return server.log.read_text()


@pytest.mark.parametrize(
    ("option", "levels"),
    [
        ("--TuftExtension.log_level=WARN", set()),
        ("--TuftExtension.log_level=INFO", {"INFO"}),
        ("--debug", {"INFO", "DEBUG"}),
    ],
)
def test_the_log_level_is_a_trait_of_the_extension(option: str, levels: set[str], tmp_path: Path) -> None:
    """S2-22: as much is printed as is asked for; a trait goes before the variable, as every trait does."""
    text = logged(tmp_path, option, TUFT_LOG_LEVEL="error")
    assert ("INFO tuft_jupyter: tuft-jupyter keeps its journal in" in text) == ("INFO" in levels)
    assert ("DEBUG tuft_jupyter.http: 200 GET /sessions" in text) == ("DEBUG" in levels)
