"""What a user can type, set or call is documented, or the build fails."""

from __future__ import annotations

import argparse
import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from scripts import api_docs
from tuft_jupyter import cli
from tuft_jupyter.config import (
    BackendsConfig,
    ModelSettings,
    PersistenceConfig,
    PlacementConfig,
    Settings,
    TenantSettings,
)
from tuft_jupyter.core import state
from tuft_jupyter.kernel import magic
from tuft_jupyter.wire.routes import ROUTES
from tuft_jupyter_server.app import TuftExtension

ROOT = Path(__file__).parents[2]
SETTINGS = (ROOT / "docs" / "settings.md").read_text()
COMMANDS = (ROOT / "docs" / "commands.md").read_text()
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def test_whoever_reports_or_contributes_is_told_how() -> None:
    """S1-72: CONTRIBUTING and forms for issues, of which each asks for something."""
    assert "make check" in (ROOT / "CONTRIBUTING.md").read_text()
    forms = [yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")]
    assert len(forms) == 2
    for form in forms:
        assert form["name"]
        assert any(part.get("validations", {}).get("required") for part in form["body"])


def test_the_api_reference_is_the_route_table() -> None:
    assert (ROOT / "docs" / "api.md").read_text() == api_docs.text(), "run: python scripts/api_docs.py"


@pytest.mark.parametrize(
    "kind", [Settings, ModelSettings, PersistenceConfig, TenantSettings, BackendsConfig, PlacementConfig]
)
def test_every_setting_is_documented(kind: type) -> None:
    known = {field.name for field in dataclasses.fields(kind)} - {"home", "file", "notes", "applications"}
    assert not [name for name in known if f"`{name}`" not in SETTINGS]


def test_every_environment_variable_is_documented() -> None:
    named = set()
    for root in ("tuft_jupyter", "server_ext"):
        for path in (ROOT / root).rglob("*.py"):
            named |= set(re.findall(r'"((?:TUFT|TINKER|HF|JUPYTERHUB)_[A-Z_]+)"', path.read_text()))
    assert named
    assert not [name for name in named if f"`{name}`" not in SETTINGS]


def test_every_trait_is_documented() -> None:
    ours = [name for name, trait in TuftExtension.class_own_traits(config=True).items() if trait.help]
    assert ours
    assert not [name for name in ours if f"c.TuftExtension.{name}`" not in SETTINGS]


def options_of(parser: argparse.ArgumentParser) -> tuple[set[str], set[str]]:
    """(sub-commands, options) of a parser and everything below it."""
    commands: set[str] = set()
    options: set[str] = set()
    for action in parser._actions:
        options |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                inner_commands, inner_options = options_of(below)
                commands |= {name} | inner_commands
                options |= inner_options
    return commands, options


@pytest.mark.parametrize(("prefix", "parser"), [("tuft", cli.parser()), ("%tuft", magic.parser())])
def test_every_command_and_option_is_documented(prefix: str, parser: argparse.ArgumentParser) -> None:
    commands, options = options_of(parser)
    assert commands
    assert not [name for name in commands if f"`{prefix} {name}`" not in COMMANDS]
    assert not [name for name in options if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", COMMANDS)]


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_line_of_tuft_in_a_cell_can_be_typed_as_it_stands(page: Path) -> None:
    """With the comment behind it, as in the first lines of the README."""
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in re.findall(r"(?<!%)%tuft (.+)", block):
            assert magic.parser().parse_args(magic.split("%tuft", line)).verb


def test_every_command_of_the_panel_has_its_equal_in_code() -> None:
    """S1-64: a table row for each, and what the panel calls is a route of the table that keys may use as well."""
    source = ROOT / "labextension" / "src"
    commands = re.findall(r"'(tuft:[a-z-]+)'", (source / "commandids.ts").read_text())
    rows = dict(re.findall(r"^\| (`tuft:.*?) \| (.+) \|$", COMMANDS, re.MULTILINE))
    named = {name: equal for cell, equal in rows.items() for name in re.findall(r"`(tuft:[a-z-]+)`", cell)}
    assert commands
    assert not [name for name in commands if "`" not in named.get(name, "")]
    calls = re.findall(r"_?api\s*\.call\(\s*'([A-Z]+)',\s*'([\w/]+)'", (source / "actions.ts").read_text())
    assert calls
    assert set(calls) <= {(route.method, route.path.removeprefix("/")) for route in ROUTES}


def test_every_record_kind_is_described_where_records_are_folded() -> None:
    assert state.__doc__ is not None
    assert not [kind for kind in state._HANDLERS if f"``{kind}``" not in state.__doc__]


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_make_target_that_is_mentioned_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    mentioned = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE))
    assert not mentioned - targets


def test_the_files_that_architecture_names_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for path in re.findall(r"`((?:core|wire|engine|tests)/[\w/]+\.py)`", text):
        base = ROOT if path.startswith("tests") else ROOT / "tuft_jupyter"
        assert (base / path).exists(), path


def test_every_extra_is_documented() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT / "docs" / "installation.md").read_text()
    assert not {extra for extra in extras if extra != "dev" and f"| `{extra}` |" not in page}
