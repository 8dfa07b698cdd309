"""What lives under $TUFT_HOME."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tuft_jupyter import home as homes


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_home_is_where_the_environment_says() -> None:
    """S0-38: TUFT_HOME, default ~/.tuft."""
    assert homes.home_dir({"TUFT_HOME": "/x"}) == Path("/x")
    assert homes.home_dir({}) == Path("~/.tuft").expanduser()
    assert homes.home_dir({"TUFT_HOME": ""}) == Path("~/.tuft").expanduser()


def test_the_key_is_made_once_and_private(tmp_path: Path) -> None:
    """S0-34: tml- and 32 hex digits, mode 0600, the same for every process of the user."""
    home = tmp_path / "deep" / "home"
    key = homes.ensure_key(home)
    assert key.startswith("tml-")
    assert len(bytes.fromhex(key.removeprefix("tml-"))) == 16
    assert homes.ensure_key(home) == key
    assert mode(homes.credentials_path(home)) == 0o600
    assert sorted(p.name for p in home.iterdir()) == ["credentials"]


def test_many_at_once_get_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: homes.ensure_key(tmp_path / "home"), range(32)))
    assert len(keys) == 1


def test_a_readable_key_is_made_private_again(tmp_path: Path) -> None:
    key = homes.ensure_key(tmp_path)
    homes.credentials_path(tmp_path).chmod(0o644)
    assert homes.ensure_key(tmp_path) == key
    assert mode(homes.credentials_path(tmp_path)) == 0o600


def test_an_empty_key_file_is_replaced(tmp_path: Path) -> None:
    homes.credentials_path(tmp_path).write_text("\n")
    assert homes.ensure_key(tmp_path).startswith("tml-")


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("gpu.example", "http://gpu.example:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("fe80::1", "http://[fe80::1]:80"),
    ],
)
def test_where_a_server_listens_is_where_this_machine_reaches_it(host: str, address: str) -> None:
    assert homes.reached_at(host, 80) == address


def test_an_address_is_private_and_taken_back_only_by_its_writer(tmp_path: Path) -> None:
    """S0-22: mode 0600; removed only if it still holds our own address."""
    assert homes.read_address(tmp_path) is None
    homes.write_address(tmp_path, "http://127.0.0.1:1")
    assert mode(homes.address_path(tmp_path)) == 0o600
    homes.write_address(tmp_path, "http://127.0.0.1:2")
    homes.remove_address(tmp_path, "http://127.0.0.1:1")
    assert homes.read_address(tmp_path) == "http://127.0.0.1:2"
    homes.remove_address(tmp_path, "http://127.0.0.1:2")
    assert homes.read_address(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
