"""The panel's actions, and the panel and its views for people who use a keyboard, a screen reader or other colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Staged

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

AXE = Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js"
THEMES = ("JupyterLab Light", "JupyterLab Dark", "JupyterLab Dark High Contrast")
EVIL = '<img src=x onerror="window.evil = 1"><script>window.evil = 2</script>'
FOCUSED = """() => {
    const node = document.activeElement;
    const style = getComputedStyle(node);
    return {
        inside: Boolean(node.closest('#tuft-panel')),
        name: node.getAttribute('aria-label') || node.textContent.trim() || node.title || node.tagName,
        ring: style.outlineStyle !== 'none' || style.boxShadow !== 'none' || node.tagName === 'SELECT',
    };
}"""
SERIOUS = """async where => {
    const found = await axe.run({ include: where }, { resultTypes: ['violations'] });
    return found.violations
        .filter(({ impact }) => impact === 'serious' || impact === 'critical')
        .map(({ id, nodes }) => id + ': ' + nodes.slice(0, 3).map(n => n.html + ' ' + n.failureSummary).join(' | '));
}"""


def button(lab: Staged, label: str) -> Any:
    return lab.page.locator(f'#tuft-panel button[aria-label="{label}"]')


def test_a_checkpoint_is_deleted_only_after_a_question(staged: Staged) -> None:
    stage = staged.play()
    page = staged.page
    button(staged, "Delete draft").click()
    page.click(".jp-Dialog .jp-mod-reject")
    assert stage.calls == []
    button(staged, "Delete draft").click()
    with page.expect_response("**/tuft/lab/api/v1/**"):
        page.click(".jp-Dialog .jp-mod-warn")
    run = stage.snapshot["runs"][0]["id"]
    route = f"training_runs/{run}/checkpoints/sampler_weights/draft"
    assert stage.calls == [("DELETE", route, None)]


def test_pinning_publishing_and_code_are_one_click_away(staged: Staged) -> None:
    stage = staged.play()
    page = staged.page
    for label, method, end, body in (
        ("Pin draft, so that it never expires", "PUT", "draft/ttl", {"ttl_seconds": None}),
        ("final is kept for good: let it expire in a week", "PUT", "final/ttl", {"ttl_seconds": 604800}),
        ("Publish draft to the other users of this server", "POST", "draft/publish", None),
        ("final is published: make it private", "DELETE", "final/publish", None),
    ):
        with page.expect_response("**/tuft/lab/api/v1/**"):
            button(staged, label).click()
        assert (stage.calls[-1][0], stage.calls[-1][2]) == (method, body)
        assert stage.calls[-1][1].endswith(end)
    button(staged, "Insert code to load draft").click()
    path = next(c["path"] for c in stage.snapshot["checkpoints"] if c["name"] == "draft")
    code = f'create_sampling_client(model_path="{path}").result()'
    expect(page.locator(".jp-Notebook .jp-Cell").first).to_contain_text(code)
    assert code in staged.cells()[0]["source"]


def test_names_of_any_kind_are_text_everywhere(staged: Staged) -> None:
    """T10: in the panel, the run view, its tooltip, the playground and the tab."""
    stage = staged.play()
    page = staged.page
    stage.snapshot["sessions"][0]["display_name"] = EVIL
    stage.snapshot["checkpoints"][0]["name"] = EVIL
    staged.stage.send({"type": "resync"})
    page.wait_for_selector("#tuft-panel .jp-Tuft-runName:has-text('onerror')")
    page.click("#tuft-panel >> text=Enlarge")
    page.wait_for_selector(".jp-Tuft-view canvas")
    page.hover(".jp-Tuft-view .u-over")
    expect(page.locator(".jp-Tuft-view .jp-Tuft-tooltip")).to_contain_text("onerror")
    staged.execute("tuft:open-playground")
    page.wait_for_selector(".jp-Tuft-playground select")
    assert page.evaluate("() => window.evil") is None
    assert page.locator(".jp-Tuft img, .jp-Tuft script, .lm-TabBar img[src=x]").count() == 0


def test_everything_in_the_panel_is_reached_and_named_by_the_keyboard_alone(staged: Staged) -> None:
    staged.play(runs=2)
    page = staged.page
    page.focus("#tuft-panel .jp-Tuft-section button >> nth=0")
    reached = []
    while (now := page.evaluate(FOCUSED))["inside"] and len(reached) < 100:
        assert now["ring"], f"no focus ring on {now['name']}"
        reached.append(now["name"])
        page.keyboard.press("Tab")
    everything = page.locator("#tuft-panel button:visible, #tuft-panel select:visible").count()
    assert len(reached) >= everything
    page.focus("#tuft-panel button:text-is('Enlarge')")
    page.keyboard.press("Enter")
    page.wait_for_selector(".jp-Tuft-view canvas")
    page.focus(".jp-Tuft-view [role=radio][aria-checked=true]")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".jp-Tuft-view [aria-checked=true] >> text=Gradient norm")
    page.focus(".jp-Tuft-view .jp-Tuft-chartHost")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(".jp-Tuft-view .jp-mod-picked")
    page.keyboard.press("+")
    page.wait_for_selector(".jp-Tuft-view >> text=Show everything")
    page.keyboard.press("0")
    page.wait_for_selector(".jp-Tuft-view >> text=Show everything", state="detached")


def test_axe_finds_nothing_serious_in_any_theme(staged: Staged) -> None:
    if not AXE.exists():
        pytest.skip("axe-core is not installed: npm ci")
    staged.play(runs=3)
    page = staged.page
    page.click("#tuft-panel >> text=Enlarge")
    page.wait_for_selector(".jp-Tuft-view canvas")
    page.click(".jp-Tuft-view .u-over")
    page.wait_for_selector(".jp-Tuft-view .jp-Tuft-sampleAnswer")
    page.click("#tuft-panel section[aria-label=Keys] >> text=Keys")
    page.wait_for_selector("#tuft-panel >> text=Create key")
    page.add_script_tag(path=AXE)
    found = {}
    for theme in THEMES:
        staged.set_theme(theme)
        found[theme, "panel and runs"] = page.evaluate(SERIOUS, ["#tuft-panel", ".jp-Tuft-view"])
    staged.execute("tuft:open-playground")
    page.wait_for_selector(".jp-Tuft-playground")
    for theme in THEMES:
        staged.set_theme(theme)
        found[theme, "playground"] = page.evaluate(SERIOUS, [".jp-Tuft-playground"])
    staged.set_theme(THEMES[0])
    assert {where: what for where, what in found.items() if what} == {}


def test_the_status_bar_tells_and_opens_the_panel(staged: Staged) -> None:
    staged.play(runs=2)
    page = staged.page
    page.wait_for_selector("#tuft-status >> text=1 run · CPU 61 %")
    page.click('.jp-SideBar.jp-mod-left [data-id="tuft-panel"]')
    page.wait_for_selector("#tuft-panel", state="hidden")
    page.click("#tuft-status button")
    page.wait_for_selector("#tuft-panel .jp-Tuft-head")


def test_at_the_width_that_jupyterlab_gives_a_sidebar_every_head_is_one_line(staged: Staged) -> None:
    staged.play()
    staged.set_panel_width(250)
    heads = staged.page.locator("#tuft-panel .jp-Tuft-sectionHead")
    heights = [heads.nth(n).bounding_box()["height"] for n in range(heads.count())]
    assert max(heights) < 40, heights
