"""The main job as a person sees it: JupyterLab, the quickstart, and the panel with its moving curve.

Set ``TUFT_SCREENSHOTS`` to a folder to have the pictures for the documentation taken there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.browser.jupyterlab import Lab, lab_page, lab_server

EXAMPLES = Path(__file__).parents[2] / "examples"
LAST_STEP = 60
READING = "#tuft-panel .jp-Tuft-reading"
STEP_IS = """step => {
    const text = document.querySelector('#tuft-panel .jp-Tuft-reading')?.textContent ?? '';
    return Number(text.match(/step (\\d+)/)?.[1] ?? 0) >= step;
}"""
LAST_CELL_RAN = "last => jupyterapp.shell.currentWidget.content.model.cells.get(last).executionCount !== null"
ANSWERED = """() => [...document.querySelectorAll('.jp-Tuft-answerText')].every(
    node => /jp-mod-(done|cut)/.test(node.className)
)"""
NAMED_SAMPLER = 'print(training.save_weights_for_sampler("pirate-sampler").result().path)'

pytestmark = [pytest.mark.browser, pytest.mark.timeout(400)]


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    """A copy of the quickstart, which also names its sampler weights at the end."""
    root = tmp_path / "notebooks"
    shutil.copytree(EXAMPLES, root, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    copy = root / "quickstart.ipynb"
    document = json.loads(copy.read_text())
    last = next(cell for cell in reversed(document["cells"]) if cell["cell_type"] == "code")
    document["cells"].append({**last, "id": "named-sampler", "source": NAMED_SAMPLER})
    copy.write_text(json.dumps(document))
    return copy


@pytest.fixture
def lab(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, browser: Browser) -> Iterator[Lab]:
    for name in ("TUFT_ADDRESS", "TUFT_API_KEY", "TINKER_BASE_URL", "TINKER_API_KEY", "TUFT_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    work = tmp_path / "work"
    work.mkdir()
    env = {"TUFT_HOME": str(work / "tuft"), "HF_HOME": str(work / "huggingface")}
    with lab_server(notebook.parent, work, env) as server, lab_page(server, browser) as page:
        yield page


def reading(lab: Lab) -> tuple[int, float]:
    """Step and loss as the panel says them."""
    text = lab.page.text_content(READING) or ""
    found = re.search(r"step ([\d,]+), loss ([\d.e-]+)", text)
    assert found, f"the panel says {text!r}"
    return int(found[1].replace(",", "")), float(found[2])


def picture(lab: Lab) -> str:
    """What is drawn on the chart's canvas, as a digest."""
    drawn: str = lab.page.evaluate("() => document.querySelector('#tuft-panel canvas').toDataURL()")
    return hashlib.sha256(drawn.encode()).hexdigest()


def take_pictures(lab: Lab, what: str) -> None:
    """The page in both themes, for the documentation."""
    folder = os.environ.get("TUFT_SCREENSHOTS")
    if not folder:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    for theme, name in (("JupyterLab Light", "light"), ("JupyterLab Dark", "dark")):
        lab.set_theme(theme)
        lab.page.wait_for_timeout(1000)  # the theme's own transitions
        lab.page.screenshot(path=Path(folder) / f"{what}-{name}.png")


def test_the_loss_curve_moves_while_the_quickstart_runs(lab: Lab) -> None:
    """S1-45: while the unchanged quickstart runs, the panel's curve grows and falls; in the end the panel shows the
    paths of the checkpoint and of the sampler weights, whole."""
    lab.open("quickstart.ipynb")
    lab.open_panel()
    lab.execute("notebook:run-all-cells")

    readings, pictures = [], []
    for step in (1, 15, 30, 45, LAST_STEP):
        if readings and readings[-1][0] >= step:
            continue  # on a busy machine a look takes as long as several steps
        lab.wait(STEP_IS, step, seconds=180)
        readings.append(reading(lab))
        pictures.append(picture(lab))
        if step == 30:
            lab.scroll_to("## Train")
            take_pictures(lab, "panel")
    steps = [step for step, _ in readings]
    assert len(steps) >= 3
    assert steps == sorted(set(steps)), f"the curve stood still: {readings}"
    assert len(set(pictures)) == len(pictures), "the canvas was not drawn anew"
    assert readings[-1][1] < readings[0][1]

    count = len(json.loads((Path(lab.server.root) / "quickstart.ipynb").read_text())["cells"])
    lab.wait(LAST_CELL_RAN, count - 1, seconds=120)
    outputs = [output for cell in lab.cells() for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    printed = "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream")
    paths = set(re.findall(r"tinker://\S+", printed))
    assert {path.split("/")[-2] for path in paths} == {"weights", "sampler_weights"}
    for path in paths:
        shown = lab.page.locator("#tuft-panel .jp-Tuft-path", has_text=path)
        shown.first.wait_for()
    assert lab.complaints == []

    lab.page.click("#tuft-panel >> text=Enlarge")
    lab.page.wait_for_selector(".jp-Tuft-view canvas")
    chart = lab.page.locator(".jp-Tuft-view .u-over").bounding_box()
    assert chart is not None
    lab.page.mouse.click(chart["x"] + chart["width"] / 4, chart["y"] + chart["height"] / 2)
    lab.page.wait_for_selector(".jp-Tuft-view .jp-mod-picked")
    lab.page.wait_for_selector(".jp-Tuft-view .jp-Tuft-sampleAnswer")
    take_pictures(lab, "runs")
    lab.page.click('#tuft-panel button[aria-label="Try pirate-sampler in the playground"]')
    lab.ask("What is your name?")
    lab.wait(ANSWERED, None, seconds=120)
    take_pictures(lab, "lab-playground")
    assert lab.complaints == []
