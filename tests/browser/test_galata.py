"""The suite in JupyterLab's own test harness (tests/galata), against a server with authentication."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import jupyterlab
import pytest

from tests.browser.jupyterlab import FLAGS, chromium, lab_server
from tests.support.live import ROOT

PLAYWRIGHT = ROOT / "node_modules" / ".bin" / "playwright"
SUITE = ROOT / "tests" / "galata"
HELPERS = Path(jupyterlab.__file__).parent / "galata"

pytestmark = [pytest.mark.browser, pytest.mark.timeout(780)]


def test_the_galata_suite_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S1-45: palette and launcher open panel and views; the curve moves while a notebook trains on the demo model; two
    runs are compared; light, dark and high contrast show them."""
    browser = chromium()
    if browser is None or not PLAYWRIGHT.exists():
        pytest.skip("no Chromium, or no Galata: `npm ci` installs it")
    (root := tmp_path / "notebooks").mkdir()
    (work := tmp_path / "work").mkdir()
    for name in ("TUFT_ADDRESS", "TUFT_API_KEY", "TINKER_BASE_URL", "TINKER_API_KEY", "TUFT_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    env = {"TUFT_HOME": str(work / "tuft"), "HF_HOME": str(work / "huggingface")}
    server = lab_server(root, work, env)
    # Its helpers in the page, and its calls of the server, know no path prefix.
    helpers = f"--LabServerApp.extra_labextensions_path={HELPERS}"
    with replace(server, base_url="/", options=(*server.options, helpers)) as running:
        done = subprocess.run(
            [str(PLAYWRIGHT), "test", "--config", str(SUITE / "playwright.config.ts")],
            env={
                **os.environ,
                "TARGET_URL": running.url.rstrip("/"),
                "JUPYTER_TOKEN": running.token,
                "CHROMIUM": browser,
                "CHROMIUM_FLAGS": " ".join(FLAGS),
                "TUFT_SCREENSHOTS": os.environ.get("TUFT_SCREENSHOTS", str(tmp_path)),
                "GALATA_OUTPUT": str(tmp_path / "galata"),
            },
            capture_output=True, text=True, timeout=720, check=False,
        )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\nserver: {running.log.read_text()[-3000:]}"
    assert "2 passed" in done.stdout
