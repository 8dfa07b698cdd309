"""The widgets as a person sees them: live while a cell runs, whole after a reload and after a new kernel."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser
from playwright.sync_api import TimeoutError as TookTooLong

from tests.browser.jupyterlab import Lab, lab_page, lab_server

pytestmark = [pytest.mark.browser, pytest.mark.timeout(400)]

STEPS = 30
LOOKED_AT = (2, 15)
"""Steps after which the cell waits until its curve was looked at: else a page that is late sees the last one only."""
CONNECT = "%load_ext tuft_jupyter\n%tuft init\nimport tuft_jupyter\nfrom tinker import types"
TRAIN = f"""
import time
from pathlib import Path

def step(training):
    datum = types.Datum(model_input=types.ModelInput.from_ints([101, 42, 37]),
                        loss_fn_inputs={{"target_tokens": [42, 37, 99]}})
    training.forward_backward([datum], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()

for number in range(1, {STEPS} + 1):
    step(training)
    while number in {LOOKED_AT} and not Path(f"looked-at-{{number}}").exists():
        time.sleep(0.02)
"""
CELLS = [
    CONNECT,
    "training = tuft_jupyter.create_training_client(rank=4).result()\ntuft_jupyter.LossCurve(training)",
    TRAIN,
    "training.save_state('shown').result()\n"
    "from IPython.display import display\n"
    "display(tuft_jupyter.RunTable(), tuft_jupyter.CheckpointTable(), tuft_jupyter.GpuMeter())",
]
AGAIN = """
training = tuft_jupyter.resume()
training.optim_step(types.AdamParams()).result()
tuft_jupyter.LossCurve()
"""
SAYS = """step => [...document.querySelectorAll('.tuft-widget .tuft-reading')].some(
    node => node.textContent.includes(`step ${step}, loss`))"""
RAN = "n => jupyterapp.shell.currentWidget.content.model.cells.get(n).executionCount !== null"


def notebook(folder: Path, cells: list[str], name: str = "widgets.ipynb") -> Path:
    made = [
        {
            "cell_type": "code",
            "id": f"c{n}",
            "metadata": {},
            "source": cell,
            "outputs": [],
            "execution_count": None,
        }
        for n, cell in enumerate(cells)
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = folder / name
    path.write_text(json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, browser: Browser) -> Iterator[Lab]:
    for name in ("TUFT_ADDRESS", "TUFT_API_KEY", "TINKER_BASE_URL", "TINKER_API_KEY", "TUFT_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    (root := tmp_path / "notebooks").mkdir()
    (work := tmp_path / "work").mkdir()
    notebook(root, CELLS)
    env = {"TUFT_HOME": str(work / "tuft"), "HF_HOME": str(work / "huggingface")}
    with lab_server(root, work, env) as server, lab_page(server, browser) as page:
        page.open("widgets.ipynb")
        yield page


def wait(lab: Lab, condition: str, argument: Any = None, seconds: float = 150) -> None:
    try:
        lab.page.wait_for_function(condition, arg=argument, timeout=seconds * 1000)
    except TookTooLong:
        shown = [output for cell in lab.cells() for output in cell["outputs"]]
        pytest.fail(f"{condition} with {argument}\n{json.dumps(shown)[-3000:]}\n{lab.complaints}")


def picture(lab: Lab, name: str) -> None:
    folder = os.environ.get("TUFT_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lab.page.wait_for_timeout(1000)
        lab.page.screenshot(path=Path(folder) / f"{name}.png")


def go_on(lab: Lab, step: int) -> None:
    """Tell the cell that trains that its curve was looked at after a step."""
    (lab.server.root / f"looked-at-{step}").touch()


def drawn(lab: Lab) -> str:
    """The curve's canvas as a picture."""
    url: str = lab.page.evaluate("() => document.querySelector('.tuft-widget canvas').toDataURL()")
    return url


def test_the_curve_grows_while_a_cell_runs_and_is_whole_after_a_reload_and_a_new_kernel(lab: Lab) -> None:
    """S1-45: the widget holds a run's name; every picture comes from the server."""
    lab.execute("notebook:run-all-cells")
    pictures = set()
    for step in (*LOOKED_AT, STEPS):
        wait(lab, SAYS, step)
        pictures.add(drawn(lab))
        go_on(lab, step)
    assert len(pictures) == 3, "the canvas was not drawn anew"
    wait(lab, RAN, len(CELLS) - 1)
    wait(lab, "() => document.querySelectorAll('.tuft-widget .tuft-table tbody tr').length >= 3")
    wait(lab, "() => document.querySelector('.tuft-widget meter')")
    text = lab.page.inner_text(".jp-Notebook")
    assert "/weights/shown" in text
    assert f"{STEPS}" in text
    for theme, name in (("JupyterLab Light", "widgets-light"), ("JupyterLab Dark", "widgets-dark")):
        lab.set_theme(theme)
        picture(lab, name)

    lab.execute("docmanager:save")
    lab.page.wait_for_function("() => !jupyterapp.shell.currentWidget.context.model.dirty")
    lab.page.reload()
    lab.page.wait_for_selector(".jp-Notebook .jp-Cell")
    wait(lab, SAYS, STEPS)

    lab.page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    lab.page.wait_for_function(
        "() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'"
    )
    lab.page.evaluate(
        """code => {
            const cell = jupyterapp.shell.currentWidget.content.model.cells.get(1);
            cell.sharedModel.setSource(code);
            jupyterapp.shell.currentWidget.content.activeCellIndex = 1;
        }""",
        CONNECT + AGAIN,
    )
    lab.execute("notebook:run-cell")
    wait(lab, SAYS, STEPS + 1)
    assert lab.complaints == []


def test_metric_scale_and_smoothing_are_chosen_by_keyboard_and_told_in_words(lab: Lab) -> None:
    for step in LOOKED_AT:
        go_on(lab, step)
    lab.execute("notebook:run-all-cells")
    wait(lab, SAYS, STEPS)
    before = drawn(lab)
    widget = lab.page.locator(".tuft-widget").first
    widget.locator("input[type=checkbox]").focus()
    lab.page.keyboard.press("Space")
    wait(lab, "before => document.querySelector('.tuft-widget canvas').toDataURL() !== before", before)
    widget.locator("input[type=range]").focus()
    lab.page.keyboard.press("End")
    widget.locator("select").select_option("grad_norm")
    wait(
        lab,
        "() => document.querySelector('.tuft-widget .tuft-plot').getAttribute('aria-label')"
        ".startsWith('gradient norm over steps')",
    )
    widget.locator("summary").click()
    assert widget.locator(".tuft-table tbody tr").count() == 12
    assert lab.complaints == []


PLAYGROUND = (
    CONNECT
    + """
training = tuft_jupyter.create_training_client(rank=4).result()
training.save_weights_for_sampler("asked").result()
tuft_jupyter.Playground(max_tokens=24, seed=3)
"""
)


def test_the_playground_shows_answers_side_by_side(lab: Lab) -> None:
    """The base model and a fresh adapter, the same seed: the same words, in two columns, and a prompt that stays."""
    lab.page.evaluate(
        """code => {
            const { content } = jupyterapp.shell.currentWidget;
            content.model.cells.get(0).sharedModel.setSource(code);
            content.activeCellIndex = 0;
        }""",
        PLAYGROUND,
    )
    lab.execute("notebook:run-cell")
    lab.page.wait_for_selector(".tuft-choices input:checked >> nth=1")
    lab.page.fill(".tuft-widget textarea", "Where is the treasure?")
    lab.page.keyboard.press("Control+Enter")
    wait(lab, "() => document.querySelector('.tuft-widget .tuft-note[role=status]')?.textContent === 'Done.'")
    answers = lab.page.locator(".tuft-answer").all_inner_texts()
    assert len(answers) == 2
    assert answers[0]
    assert answers[0] == answers[1]
    picture(lab, "playground")
    assert lab.complaints == []
