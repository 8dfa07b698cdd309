"""The panel in Notebook 7, where there is room for one document and no launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.browser.conftest import EMPTY
from tests.browser.jupyterlab import lab_page, lab_server
from tests.browser.stage import Stage, state

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


def test_panel_and_views_work_in_notebook_7(tmp_path: Path, browser: Browser) -> None:
    """S1-45: the panel stands in the left sidebar; a run view opens below the notebook."""
    pytest.importorskip("notebook", minversion="7")
    (root := tmp_path / "notebooks").mkdir()
    (work := tmp_path / "work").mkdir()
    (root / "empty.ipynb").write_text(json.dumps(EMPTY))
    env = {"TUFT_HOME": str(work / "tuft"), "HF_HOME": str(work / "huggingface")}
    server = lab_server(root, work, env)
    server.options = ("--JupyterNotebookApp.expose_app_in_browser=True",)
    with server, lab_page(server, browser) as lab:
        page = lab.page
        stage = Stage(page, state(runs=2))
        page.goto(f"{server.url}notebooks/empty.ipynb?token={server.token}")
        page.wait_for_function("() => window.jupyterapp")
        page.evaluate("() => window.jupyterapp.restored")
        lab.execute("tuft:open-panel")
        page.wait_for_selector("#tuft-panel .jp-Tuft-dot.jp-mod-ok")
        page.wait_for_selector("#tuft-panel canvas")
        run = stage.snapshot["runs"][0]["id"]
        stage.step(run, 0.5)
        page.wait_for_selector("#tuft-panel .jp-Tuft-card >> text=401")
        lab.execute("tuft:open-runs")
        page.wait_for_selector(".jp-Tuft-view canvas")
        page.wait_for_function("() => document.querySelector('.jp-Tuft-view .u-over').clientHeight > 100")
        assert lab.complaints == []
