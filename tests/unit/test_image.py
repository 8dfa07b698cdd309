"""The Dockerfile and the hooks: what they name exists, and they do what the checks of the project do."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "Dockerfile").read_text().replace("\\\n", "").splitlines()
STEPS = [line.split(maxsplit=1) for line in LINES if line and not line.startswith("#")]
RUN = [words for step, words in STEPS if step == "RUN"]
IGNORED = [
    line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
]


def ignored(path: str) -> bool:
    """Whether Docker leaves a path of the tree out of the build."""
    parts = [path, *(str(parent) for parent in Path(path).parents)]
    return any(
        fnmatch.fnmatch(part, rule.removeprefix("**/"))
        for rule in IGNORED
        for part in [*parts, Path(path).name]
    )


def test_the_image_is_jupyters_with_what_a_binder_builds() -> None:
    """S1-25: no step of its own: requirements and postBuild are run by ``make binder`` without Docker."""
    assert ["FROM", "$BASE"] in STEPS
    (base,) = [words for step, words in STEPS if step == "ARG" and words.startswith("BASE=")]
    assert "/jupyter/minimal-notebook" in base
    assert "binder/requirements.txt" in RUN[0]
    assert "binder/postBuild" in RUN[0]
    trial = (ROOT / "scripts" / "binder.py").read_text()
    assert "requirements.txt" in trial
    assert "postBuild" in trial


@pytest.mark.parametrize("script", RUN)
def test_what_the_image_runs_is_shell_over_files_that_are_there(script: str) -> None:
    """S1-25"""
    shell = shutil.which("bash")
    assert shell is not None
    assert subprocess.run([shell, "-n", "-c", script], check=False).returncode == 0
    for path in re.findall(r"(?<!\S)(?:binder|examples)\S*", script):
        assert (ROOT / path).exists()
        assert not ignored(path)


def test_nothing_of_this_machine_gets_into_the_image() -> None:
    """S1-25: nothing that git ignores, and everything that the package is built from."""
    local = [line for line in (ROOT / ".gitignore").read_text().split() if not line.startswith("ui-tests/")]
    assert not [rule for rule in local if not ignored(rule.rstrip("/").replace("*", "x"))]
    built_from = [
        "pyproject.toml",
        "package.json",
        "package-lock.json",
        "labextension/src/index.ts",
        "README.md",
    ]
    built_from += [
        "tuft_jupyter/__init__.py",
        "server_ext/tuft_jupyter_server/app.py",
        "scripts/widget_assets.mjs",
    ]
    assert not [path for path in built_from if ignored(path)]
    assert not [
        words for step, words in STEPS if step in ("ENV", "ARG") and re.search("KEY|TOKEN|PASSWORD", words)
    ]


def test_hooks_leave_generated_code_alone() -> None:
    """S1-73: pre-commit names every file, also those that ruff is told to leave out."""
    generated = ROOT / "tuft_jupyter" / "wire" / "tuft_wire_pb2.py"
    before = generated.read_bytes()
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    linters = [hook["entry"].split() for hook in local["hooks"] if hook["id"].startswith("ruff")]
    assert len(linters) == 2
    for words in linters:
        subprocess.run([*words, generated], cwd=ROOT, check=True)
    assert generated.read_bytes() == before


def test_the_hooks_of_a_commit_are_the_linters_of_make_check() -> None:
    """S1-73: pre-commit takes the file, and each hook is a program that ``make install`` brings."""
    file = ROOT / ".pre-commit-config.yaml"
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-config", file], check=True)
    (local,) = yaml.safe_load(file.read_text())["repos"]
    hooks = {hook["id"]: hook["entry"] for hook in local["hooks"]}
    check = (ROOT / "Makefile").read_text().split("\ncheck:")[1].split("\n\n")[0]
    for entry in hooks.values():
        program = entry.split()[0]
        assert (ROOT / program).exists() if "/" in program else shutil.which(program)
        wanted = entry.removeprefix(".venv/bin/").removesuffix(" --fix").removesuffix(" --force-exclude")
        assert wanted in check
    assert {"make check", "make test"} <= {*(ROOT / ".ci" / "run").read_text().splitlines()}
