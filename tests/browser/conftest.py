"""One notebook server and one browser for the tests that play the fine-tuning service themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.browser.jupyterlab import Lab, chromium_browser, lab_page, lab_server
from tests.browser.stage import Stage, state

EMPTY = {
    "cells": [
        {"cell_type": "code", "id": "a", "metadata": {}, "source": "", "outputs": [], "execution_count": None}
    ],
    "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    "nbformat": 4,
    "nbformat_minor": 5,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These tests come last: while a browser is open, its event loop keeps others out of this thread."""
    here = Path(__file__).parent
    items.sort(key=lambda item: here in item.path.parents)


class Staged(Lab):
    """A page of JupyterLab with a service that the test plays."""

    stage: Stage

    def play(self, runs: int = 3, steps: int = 400) -> Stage:
        """Begin anew: a fresh page, an empty notebook, the panel open over so many runs."""
        self.page.goto("about:blank")  # the page of the test before asks no more, and complains no more
        self.page.unroute_all()
        self.stage = Stage(self.page, state(runs, steps))
        self.complaints.clear()
        self.page.set_viewport_size({"width": 1360, "height": 880})
        self.open("empty.ipynb")
        self.open_panel()
        self.page.wait_for_selector(
            "#tuft-panel .jp-Tuft-dot.jp-mod-ok"
        )  # who is not connected hears nothing
        return self.stage


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for all tests of this folder."""
    with chromium_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def staged_session(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Staged]:
    root = tmp_path_factory.mktemp("notebooks")
    (root / "empty.ipynb").write_text(json.dumps(EMPTY))
    work = tmp_path_factory.mktemp("work")
    env = {"TUFT_HOME": str(work / "tuft"), "HF_HOME": str(work / "huggingface")}
    with lab_server(Path(root), work, env) as server, lab_page(server, browser) as lab:
        lab.__class__ = Staged
        assert isinstance(lab, Staged)
        yield lab


@pytest.fixture
def staged(staged_session: Staged) -> Iterator[Staged]:
    """The shared page. What a test opened is gone for the next one, which calls ``play`` first."""
    yield staged_session
    assert staged_session.complaints == []
