"""The recipes of tinker-cookbook run as they are: three here, all of them with ``make recipes``."""

from __future__ import annotations

import re

import pytest

from tests.support import cookbook
from tests.support.live import ROOT

LEAN = ("sl_loop", "rl_loop", "dpo")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_recipes_of_the_cookbook_run_unmodified(tmp_path_factory: pytest.TempPathFactory) -> None:
    """S1-63, S1-21: supervised learning, RL from its checkpoint, DPO from ln 2 on; two base models in one server."""
    recipes = [recipe for recipe in cookbook.RECIPES if recipe.name in LEAN]
    with cookbook.Kitchen(tmp_path_factory.mktemp("kitchen")) as cook:
        for recipe in recipes:
            report = cook(recipe)
            assert report.passed, f"{recipe.name}: {recipe.metric} = {report.values}"
    used = {argument.partition("=")[2] for recipe in recipes for argument in recipe.arguments}
    assert used >= {cookbook.KNOWN, cookbook.TEACHER}, "two base models of one server are trained"


def test_the_page_lists_the_recipes_that_are_run_and_none_fails() -> None:
    rows = re.findall(
        r"^\| ([\w -]+) \| (yes|no) \|", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE
    )
    assert rows == [(recipe.name, "yes") for recipe in cookbook.RECIPES]
