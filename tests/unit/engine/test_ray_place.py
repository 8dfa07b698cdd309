"""Where Ray is looked for, and where ours keeps its files."""

from __future__ import annotations

import os
import shlex
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuft_jupyter.core.errors import ServerError
from tuft_jupyter.engine import ray_place
from tuft_jupyter.engine.ray_place import Place


@pytest.fixture
def listener() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_the_setting_wins_over_the_environment_and_local_is_the_default() -> None:
    """S3-22: and each says why."""
    env = {"RAY_ADDRESS": "there:6379"}
    assert ray_place.choose("here:6379", env) == Place("here:6379", "ray_address is set")
    assert ray_place.choose(None, env) == Place("there:6379", "RAY_ADDRESS is set")
    assert ray_place.choose(None, {}).local
    assert ray_place.choose(None, {"RAY_ADDRESS": "local"}).local


def test_auto_joins_our_own_cluster_and_falls_back_to_local(tmp_path: Path, listener: str) -> None:
    """S3-24: the fallback holds for auto alone."""
    current = tmp_path / "ray_current_cluster"
    assert ray_place.choose("auto", {}, current).local
    current.write_text(listener)
    assert ray_place.choose(None, {"RAY_ADDRESS": "auto"}, current).address == listener
    current.write_text("127.0.0.1:1")
    assert ray_place.choose("auto", {}, current).local


def test_another_users_cluster_is_not_joined_by_accident(
    tmp_path: Path, listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3-27."""
    current = tmp_path / "ray_current_cluster"
    current.write_text(listener)
    monkeypatch.setattr(os, "getuid", lambda: current.stat().st_uid + 1)
    with pytest.raises(ServerError, match=r"another user.*RAY_ADDRESS=local"):
        ray_place.choose("auto", {}, current)


def test_an_address_where_nobody_listens_is_named(listener: str) -> None:
    """S3-24, fact 6."""
    ray_place.probe(listener)
    ray_place.probe(f"ray://{listener}")
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "no port:x", ""):
        with pytest.raises(ServerError, match="cannot be reached"):
            ray_place.probe(address)


def test_the_temporary_directory_is_ours_alone_and_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3-31."""
    monkeypatch.setattr(ray_place, "TEMP_LENGTH", len(str(tmp_path)) + 20)
    made = ray_place.temp_dir(tmp_path)
    assert made == tmp_path / f"ray_{os.getuid()}"
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    made.chmod(0o755)
    assert stat.S_IMODE(ray_place.temp_dir(tmp_path).stat().st_mode) == 0o700

    monkeypatch.setattr(ray_place, "SYSTEM_TEMP", tmp_path)
    assert ray_place.temp_dir(tmp_path / ("long" * 10)) == made

    uid = made.stat().st_uid + 1
    monkeypatch.setattr(os, "getuid", lambda: uid)
    (tmp_path / f"ray_{uid}").mkdir()
    with pytest.raises(ServerError, match="belongs to somebody else"):
        ray_place.temp_dir(tmp_path)


def test_the_token_is_made_once_and_private(tmp_path: Path) -> None:
    path = ray_place.token_file(tmp_path)
    token = path.read_text()
    assert len(token) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert ray_place.token_file(tmp_path).read_text() == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("env", "mode"),
    [
        ({}, "disabled"),
        ({"RAY_AUTH_TOKEN": "x"}, "token"),
        ({"RAY_AUTH_TOKEN_PATH": "x"}, "token"),
        ({"RAY_AUTH_TOKEN": "x", "RAY_AUTH_MODE": "disabled"}, "disabled"),
    ],
)
def test_how_to_speak_to_a_named_cluster_is_always_said(
    env: dict[str, str], mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M6: Ray's command line and its library guess differently."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ray_place.auth_mode(env) == mode


def test_dead_sessions_are_pruned_but_for_the_newest(tmp_path: Path) -> None:
    dead = [tmp_path / f"session_2026-01-0{i}_00-00-00_000000_{2**22 + i}" for i in range(1, 6)]
    alive = tmp_path / f"session_2025-01-01_00-00-00_000000_{os.getpid()}"
    for age, path in enumerate([alive, *dead]):
        path.mkdir()
        os.utime(path, (1000 + age, 1000 + age))
    (tmp_path / "session_latest").symlink_to(dead[0])
    ray_place.prune_sessions(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        alive.name,
        *(path.name for path in dead[-3:]),
    ]


def test_a_cluster_that_was_started_as_documented_is_found(
    tmp_path: Path, listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3-33: with ``--temp-dir`` Ray writes the address there, and not into its own default place."""
    monkeypatch.setattr(ray_place, "SYSTEM_TEMP", tmp_path)
    monkeypatch.setattr(ray_place, "CURRENT_CLUSTER", tmp_path / "ray" / "ray_current_cluster")
    assert ray_place.choose("auto", {}).local
    own = tmp_path / f"ray_{os.getuid()}"
    own.mkdir()
    (own / "ray_current_cluster").write_text(listener)
    assert ray_place.choose("auto", {}).address == listener


def test_a_required_cluster_that_is_not_there_is_an_error_with_the_commands_that_start_one(
    tmp_path: Path, listener: str
) -> None:
    """S2-01, S3-29, S3-30: the lines are those of the documentation, filled in."""
    current = tmp_path / "ray_current_cluster"
    with pytest.raises(ServerError) as refusal:
        ray_place.choose("require", {}, current)
    for command in ray_place.start_commands().values():
        assert command in refusal.value.message
    current.write_text(listener)
    assert ray_place.choose("require", {}, current).address == listener


def test_the_commands_are_those_of_the_documentation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """S3-29, S3-30: and a shell reads them as one command each."""
    monkeypatch.setattr(ray_place, "outward_ip", lambda: "<HEAD_IP>")
    monkeypatch.setattr(ray_place, "GPU_DEVICES", tmp_path)
    (tmp_path / "0000:01:00.0").touch()
    head, worker = ray_place.start_commands().values()
    page = (Path(__file__).parents[3] / "docs" / "cluster.md").read_text()
    temp = f"/tmp/ray_{os.getuid()}"
    assert head.replace("--num-gpus 1", "--num-gpus <N>").replace(temp, "/tmp/ray_$(id -u)") in page
    assert worker.replace(temp, "/tmp/ray_$(id -u)") in page
    assert shlex.split(head)[:3] == ["ray", "start", "--head"]
    assert all(line.endswith(" \\") for line in worker.splitlines()[:-1])
