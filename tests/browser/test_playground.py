"""The playground: one prompt, several models, side by side."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Staged

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

PLAYGROUND = ".jp-Tuft-playground"
ANSWERS = f"{PLAYGROUND} .jp-Tuft-answerText"


def test_a_prompt_is_answered_side_by_side_by_the_base_model_and_a_checkpoint(staged: Staged) -> None:
    stage = staged.play()
    page = staged.page
    page.click('#tuft-panel button[aria-label="Try draft in the playground"]')
    staged.ask("Why is the sky blue?")
    expect(page.locator(ANSWERS)).to_have_text(["The sky.", "Ahoy matey, the sky be blue."])
    asked = [body for _, route, body in stage.calls if route == "chat/completions"]
    assert {body["model"] for body in asked} == {
        "tuft/demo",
        next(c["path"] for c in stage.snapshot["checkpoints"] if c["name"] == "draft"),
    }
    assert all(body["messages"] == [{"role": "user", "content": "Why is the sky blue?"}] for body in asked)
    page.click(f"{PLAYGROUND} >> text=Compare with another model")
    expect(page.locator(ANSWERS)).to_have_count(3)


def test_a_refusal_is_shown_in_the_servers_words(staged: Staged) -> None:
    staged.play()
    page = staged.page
    page.route(
        "**/tuft/lab/oai/**",
        lambda route: route.fulfill(status=400, json={"error": {"message": "max_tokens: 9 is more than 8"}}),
    )
    staged.execute("tuft:open-playground")
    page.fill(f"{PLAYGROUND} textarea", "Hello")
    page.click(f"{PLAYGROUND} >> text=Run")
    page.wait_for_selector(f"{ANSWERS}.jp-mod-failed >> text=max_tokens: 9 is more than 8")
    # The browser itself reports every refused request on its console.
    staged.complaints.clear()
