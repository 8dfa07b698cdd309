"""What the panel says when something is missing or wrong: one sentence with the cause, and the way out."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Staged
from tests.browser.stage import gauges, status

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

HEAD = "#tuft-panel .jp-Tuft-head"
NO_BACKEND = "no training backend is installed in the server's environment (missing: torch)"
DAMAGED = "record 7 of journal.sqlite is damaged: restore a copy"


REFUSALS: tuple[tuple[int, dict[str, Any], str, str], ...] = (
    (500, {}, "The notebook server does not answer", "Try now"),
    (404, {}, "Fine-tuning is not set up on this server", "pip install tuft-jupyter"),
    (403, {}, "You may not see fine-tuning on this server", "Try now"),
    (
        503,
        {"problem": "supported_modles: did you mean supported_models?"},
        "did you mean",
        "tuft config --show",
    ),
)
# Else a page on a busy machine tries again by itself before it is clicked, and there is nothing left to click.
NO_TRIES_OF_ITS_OWN = """() => {
    const later = window.setTimeout;
    window.setTimeout = (work, ms, ...rest) => later(work, ms > 500 ? 1e9 : ms, ...rest);
}"""
STATES: tuple[tuple[dict[str, Any], list[str]], ...] = (
    (
        {"backend": {"installed": False, "detail": NO_BACKEND}},
        [NO_BACKEND, 'pip install "tuft-jupyter[backend]"'],
    ),
    ({"ready": False, "waiting_for": "tuft/demo: loading weights"}, ["Waiting: tuft/demo: loading weights"]),
    ({"ready": False, "problem": DAMAGED}, ["Nothing new is accepted", DAMAGED]),
    (
        {"models": [{"name": "tuft/demo", "state": "failed", "detail": "config.json is missing"}]},
        ["The model could not be loaded", "config.json is missing"],
    ),
    ({"durability": "nothing"}, ["in memory: all is lost when the server stops"]),
    ({"durability": "process"}, ["survives a crash of the server"]),
    ({}, ["Ready", "survives a crash of the machine"]),
)


def test_a_server_that_cannot_be_used_is_told_with_the_way_out(staged: Staged) -> None:
    """And when it can be used again, one click is enough."""
    stage = staged.play(runs=1)
    page = staged.page
    page.unroute("**/tuft/lab/state*")
    code, body = 0, {}
    page.route(
        "**/tuft/lab/state*",
        lambda route: (
            route.fulfill(status=code, json=body)
            if code
            else route.fulfill(json={"state": stage.snapshot, "status": stage.status})
        ),
    )
    page.evaluate(NO_TRIES_OF_ITS_OWN)
    stage.hang_up()
    for code, body, sentence, way_out in REFUSALS:  # noqa: B007 - the route reads them
        with page.expect_response("**/tuft/lab/state*"):
            page.click(f"{HEAD} >> text=Try now")
        page.wait_for_selector(f"#tuft-panel >> text={sentence}")
        page.wait_for_selector(f"#tuft-panel >> text={way_out}")
    code = 0
    page.click(f"{HEAD} >> text=Try now")
    page.wait_for_selector(f"{HEAD} >> text=Ready")
    staged.complaints.clear()  # the browser reports each refused request by itself


def test_how_the_service_is_and_what_it_keeps_is_said_plainly(staged: Staged) -> None:
    stage = staged.play(runs=1)
    for changes, sentences in STATES:
        stage.send({"type": "status", "status": status(**changes)})
        for sentence in sentences:
            staged.page.wait_for_selector(f"{HEAD} >> text={sentence}")


def test_each_device_and_each_process_shows_its_use(staged: Staged) -> None:
    stage = staged.play(runs=1)
    page = staged.page
    used = gauges()
    used["gpus"] = [
        {"name": "GPU 0 (NVIDIA H200)", "used": 61e9, "total": 150e9, "utilization": 88.0},
        {"name": "GPU 1 (NVIDIA H200)", "used": 2e9, "total": 150e9, "utilization": 3.0},
    ]
    used["workers"][1]["gpu_memory"] = 60e9
    stage.send(used)
    for name, words in (
        ("GPU 0 (NVIDIA H200)", "88 %"),
        ("GPU 0 (NVIDIA H200) memory", "61 / 150 GB"),
        ("GPU 1 (NVIDIA H200) memory", "2.0 / 150 GB"),
    ):
        meter = page.locator(f'#tuft-panel [role=meter][aria-label="{name}"]')
        expect(meter).to_have_attribute("aria-valuetext", words)
    table = page.locator("#tuft-panel .jp-Tuft-workers")
    expect(table.locator("tr:has-text('training tuft/demo')")).to_contain_text("60 GB")
    page.wait_for_selector("#tuft-status >> text=1 run · GPU 88 %")
    page.click("#tuft-panel >> text=Enlarge")
    page.wait_for_selector(".jp-Tuft-factList div:has(dt:text-is('Engine time')) >> text=2:04")


LONG = "a sweep whose name says everything about it, and then some more " * 3
LINES = """selectors => selectors.map(selector => {
    const node = document.querySelector(selector);
    return node.clientHeight / parseFloat(getComputedStyle(node).lineHeight) || 1;
})"""


@pytest.mark.parametrize("width", [240, 340])
def test_a_long_name_takes_no_room_from_the_numbers_beside_it(staged: Staged, width: int) -> None:
    stage = staged.play(runs=2)
    for session in stage.snapshot["sessions"]:
        session["display_name"] = LONG
    staged.open("empty.ipynb")
    staged.open_panel(width)
    page = staged.page
    page.wait_for_selector("#tuft-panel [aria-label=Queue]")
    page.click("#tuft-panel >> text=Enlarge")
    page.wait_for_selector(".jp-Tuft-view canvas")
    numbers = ["[aria-label=Queue] .jp-Tuft-entryHead .jp-Tuft-entryFacts", ".jp-Tuft-chip b"]
    assert [round(lines) for lines in page.evaluate(LINES, numbers)] == [1, 1]
    wide = "node => node.getBoundingClientRect().right <= innerWidth && node.clientWidth <= 200"
    assert page.locator(".jp-Tuft-legend select").evaluate(wide)


STRANGER = "6f1c2a52-0000-4000-8000-000000000099:train:7"


def test_each_run_shows_what_it_takes_of_memory(staged: Staged) -> None:
    """In the panel the largest first, the rest as one; in the run view with where it lies. Runs that lie on disk take
    none, and what is known stays where a message does not repeat it."""
    stage = staged.play(runs=9)
    page = staged.page
    ids = [run["id"] for run in stage.snapshot["runs"]]
    used = {run: {"model": 2_000_000 * (i + 1), "idle": 0} for i, run in enumerate(ids[:8])}
    used |= {ids[0]: {"model": 0, "idle": 70_000_000}, ids[8]: {"model": 0, "idle": 0}}
    stage.send({**gauges(), "runs": used})
    table = page.locator("#tuft-panel .jp-Tuft-workers:has(caption:text-is('Runs'))")
    table.wait_for()
    rows = table.locator("tbody tr").all_inner_texts()
    assert rows[0].split("\t")[::2] == ["pirate-sft", "70 MB"]
    assert rows[-1].split("\t")[::2] == ["2 more", "10 MB"]
    stage.send(gauges())
    page.click("#tuft-panel >> text=Enlarge")
    row = page.locator(".jp-Tuft-factList div:has(dt:text-is('Memory'))")
    row.locator("text=70 MB, idle, in host memory").wait_for()


def test_a_run_that_is_not_yours_is_said_in_the_words_of_the_notebook(staged: Staged) -> None:
    """S1-34: where a view that was kept, or a command, names a run of somebody else."""
    staged.play(runs=5)
    page = staged.page
    staged.execute("tuft:open-runs", {"runs": [STRANGER]})
    sentence = f"“{STRANGER}” is no run of yours; you have"
    told = page.locator(".jp-Tuft-view [role=alert]", has_text=sentence)
    told.wait_for()
    assert "pirate-sft" in told.inner_text()
    assert "`%tuft runs` lists them" in told.inner_text()
    told.locator("button").click()
    told.wait_for(state="detached")
    staged.execute("tuft:insert-resume", {"run": STRANGER})
    toast = page.locator(".Toastify__toast", has_text=sentence)
    toast.wait_for()
    toast.locator("button:has-text('Read all')").click()
    page.locator(".jp-Dialog >> text=`%tuft runs` lists them").wait_for()
    page.click(".jp-Dialog button")
    toast.wait_for(state="detached")
    staged.play(runs=5)  # a toast that comes while another one leaves is sometimes not drawn
    staged.execute("tuft:export-metrics", {"runs": [STRANGER], "format": "csv"})
    toast.wait_for()


def test_nothing_moves_for_whoever_asked_for_less_motion(staged: Staged) -> None:
    staged.play(runs=2)
    page = staged.page
    moving = """() => [...document.querySelectorAll('.jp-Tuft *, .jp-TuftStatus *')].filter(node =>
        [null, '::before'].some(part => getComputedStyle(node, part).animationName !== 'none')).length"""
    assert page.evaluate(moving) > 0
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(moving) == 0
    page.emulate_media(reduced_motion="no-preference")


def test_the_launcher_has_a_card_for_each_view(staged: Staged) -> None:
    staged.play(runs=1)
    page = staged.page
    for name, view in (("Compare Runs", ".jp-Tuft-view canvas"), ("Playground", ".jp-Tuft-playground")):
        staged.execute("launcher:create")
        card = page.locator(f".jp-LauncherCard:has-text('{name}')").last
        card.wait_for()
        assert card.locator("svg").count() == 1
        card.click()
        page.wait_for_selector(view)
