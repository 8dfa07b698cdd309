"""The run view: what a person does with the large chart."""

from __future__ import annotations

import json

import pytest
from playwright.sync_api import Response, expect

from tests.browser.conftest import Staged

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

VIEW = ".jp-Tuft-view"
CHIPS = f"{VIEW} .jp-Tuft-chip"
ANOTHER_PICTURE = "([where, seen]) => !seen.includes(document.querySelector(where)?.toDataURL())"
PICKED = f"{VIEW} .jp-mod-picked h3"


def enlarge(lab: Staged) -> None:
    lab.page.click("#tuft-panel >> text=Enlarge")
    lab.page.wait_for_selector(f"{VIEW} canvas")


def at(lab: Staged, x: float, y: float) -> tuple[float, float]:
    """A place on the large chart, as shares of its width and height."""
    box = lab.page.locator(f"{VIEW} .u-over").bounding_box()
    assert box is not None
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


def drawn(lab: Staged) -> str:
    picture: str = lab.page.evaluate(f"() => document.querySelector('{VIEW} canvas').toDataURL()")
    return picture


def saved_the_metric(response: Response) -> bool:
    """JupyterLab saves its layout a while after the last change; it is saved when the server says so."""
    request = response.request
    saves = request.method == "PUT" and "/api/workspaces/" in request.url
    return saves and "grad_norm" in (request.post_data or "")


def test_runs_are_compared_by_a_click_and_by_dragging(staged: Staged) -> None:
    staged.play(runs=3)
    page = staged.page
    enlarge(staged)
    expect(page.locator(CHIPS)).to_have_count(1)
    page.select_option(".jp-Tuft-view .jp-Tuft-select select", label="grpo maths")
    expect(page.locator(CHIPS)).to_have_count(2)
    page.drag_and_drop("#tuft-panel .jp-Tuft-card:has-text('dpo beta 0.1')", VIEW)
    expect(page.locator(CHIPS)).to_have_count(3)
    page.mouse.move(*at(staged, 0.5, 0.5))
    for name in ("pirate-sft", "dpo beta 0.1", "grpo maths"):
        expect(page.locator(f"{VIEW} .jp-Tuft-tooltip")).to_contain_text(name)
    page.click(f"{CHIPS} >> nth=0 >> .jp-Tuft-chipClose")
    expect(page.locator(CHIPS)).to_have_count(2)


def test_a_click_shows_the_facts_of_that_step_and_keys_walk_on(staged: Staged) -> None:
    snapshot = staged.play(runs=1).snapshot
    page = staged.page
    enlarge(staged)
    page.mouse.click(*at(staged, 0.5, 0.6))
    page.wait_for_selector(PICKED)
    heading = page.inner_text(PICKED)
    step = int(heading.split()[1])
    assert 190 <= step <= 210
    loss = snapshot["runs"][0]["curve"]["loss"][step - 1]
    expect(page.locator(f"{VIEW} .jp-mod-picked")).to_contain_text(f"{loss:.4g}")
    page.focus(f"{VIEW} .jp-Tuft-chartHost")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(f"{PICKED} >> text=Step {step + 1} of")
    page.keyboard.press("End")
    page.wait_for_selector(f"{PICKED} >> text=Step 400 of")


def test_a_click_shows_what_the_weights_of_that_step_said(staged: Staged) -> None:
    stage = staged.play(runs=1)
    page = staged.page
    with page.expect_request("**/samples?step=*") as small:
        page.click("#tuft-panel .u-over")  # in the panel's chart: the run view opens at that point
    assert "step=2" in small.value.url
    page.wait_for_selector(f"{VIEW} canvas")
    with page.expect_request("**/samples?step=*") as asked:
        page.mouse.click(*at(staged, 0.25, 0.6))
    step = int(page.inner_text(PICKED).split()[1])  # shown before it is asked about
    assert f"step={step}" in asked.value.url
    said = page.locator(f"{VIEW} .jp-Tuft-said")
    expect(said.locator("h4")).to_have_text(f"Samples of step {step - step % 10}")
    said.locator("text=Arr, the treasure be under the old oak!").wait_for()
    expect(said.locator(".jp-Tuft-sampleAnswer")).to_have_count(2)
    said.locator("button:text-is('Show 3')").click()
    expect(said.locator(".jp-Tuft-sampleAnswer")).to_have_count(3)
    before = len(stage.calls)
    page.focus(f"{VIEW} .jp-Tuft-chartHost")
    with page.expect_request("**/samples?step=*"):
        for _ in range(8):
            page.keyboard.press("ArrowRight")
    page.wait_for_selector(f"{PICKED} >> text=Step {step + 8} of")
    assert len(stage.calls) - before < 8, "who walks along the steps asks when they stop"


def test_the_metrics_of_runs_leave_as_files_for_tensorboard(staged: Staged) -> None:
    staged.play(runs=1)
    page = staged.page
    content = b"what the server writes"
    page.route("**/tuft/lab/export?*", lambda route: route.fulfill(body=content))
    enlarge(staged)
    with page.expect_download() as download:
        page.click(f"{VIEW} button[aria-label='Export TensorBoard']")
    assert download.value.suggested_filename.startswith("events.out.tfevents.")
    assert download.value.path().read_bytes() == content


def test_kl_is_a_metric_where_a_run_has_one(staged: Staged) -> None:
    staged.play(runs=3)
    page = staged.page
    enlarge(staged)
    assert page.locator(f"{VIEW} [role=radio]:has-text('KL')").count() == 0
    page.select_option(".jp-Tuft-view .jp-Tuft-select select", label="grpo maths")
    page.click(f"{VIEW} [role=radio]:has-text('KL (k3)')")
    page.wait_for_selector(f"{VIEW} .jp-Tuft-reading >> text=/kl \\(k3\\) \\d/i")


def test_dragging_zooms_and_a_double_click_shows_everything(staged: Staged) -> None:
    staged.play(runs=2)
    page = staged.page
    enlarge(staged)
    page.mouse.move(5, 5)
    whole = drawn(staged)
    page.mouse.move(*at(staged, 0.2, 0.5))
    page.mouse.down()
    page.mouse.move(*at(staged, 0.3, 0.5), steps=4)
    page.mouse.up()
    page.wait_for_selector(f"{VIEW} >> text=Show everything")
    page.wait_for_function(ANOTHER_PICTURE, arg=[f"{VIEW} canvas", [whole]])
    assert page.locator(PICKED).count() == 0, "the end of a drag is no click"
    page.mouse.dblclick(*at(staged, 0.5, 0.1))
    page.wait_for_selector(f"{VIEW} >> text=Show everything", state="detached")


def test_metric_scale_smoothing_and_table_change_what_is_shown(staged: Staged) -> None:
    staged.play(runs=2)
    page = staged.page
    enlarge(staged)
    seen = {drawn(staged)}
    for action in (
        lambda: page.locator(".jp-Tuft-slider input").fill("0.9"),
        lambda: page.click(f"{VIEW} >> text=Log scale"),
        lambda: page.click(f"{VIEW} [role=radio]:has-text('Gradient norm')"),
        lambda: page.click(f"{VIEW} [role=radio]:has-text('Tokens/s')"),
        lambda: page.click(f"{VIEW} .jp-Tuft-segments >> text=Time"),
    ):
        action()
        page.wait_for_function(ANOTHER_PICTURE, arg=[f"{VIEW} canvas", list(seen)])
        seen.add(drawn(staged))
    page.click(f"{VIEW} button:text-is('Table')")
    expect(page.locator(f"{VIEW} .jp-Tuft-table tbody tr")).to_have_count(100)


def test_live_points_reach_the_view_and_a_download_has_them(staged: Staged) -> None:
    stage = staged.play(runs=1, steps=5)
    page = staged.page
    enlarge(staged)
    for loss in (0.5, 0.25):
        stage.step(stage.snapshot["runs"][0]["id"], loss)
    page.wait_for_selector(f"{VIEW} .jp-Tuft-reading >> text=step 7, loss 0.2500")
    with page.expect_download() as download:
        page.click(f"{VIEW} button[aria-label='Export JSONL']")
    rows = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert rows[-1]["loss"] == 0.25


def test_the_view_comes_back_after_a_reload(staged: Staged) -> None:
    staged.play(runs=2)
    page = staged.page
    enlarge(staged)
    page.click(f"{VIEW} >> text=Log scale")
    with page.expect_response(saved_the_metric):
        page.click(f"{VIEW} [role=radio]:has-text('Gradient norm')")
    page.goto(f"{staged.server.url}lab")
    page.wait_for_selector(f"{VIEW} canvas")
    expect(page.locator(f"{VIEW} button:text-is('Log scale')")).to_have_attribute("aria-pressed", "true")
    expect(page.locator(f"{VIEW} [aria-checked=true] .jp-Tuft-tileName")).to_have_text("Gradient norm")
    expect(page.locator(CHIPS)).to_have_count(1)
