"""Keys in the panel: for admins only, and a new one is seen once."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Staged

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

KEYS = "#tuft-panel section[aria-label=Keys]"


def test_an_admin_makes_a_key_that_is_shown_once_and_revokes_it_after_a_question(staged: Staged) -> None:
    stage = staged.play()
    page = staged.page
    assert stage.calls == [], "nothing is asked before the section is opened"
    page.click(f"{KEYS} >> text=Keys")
    page.wait_for_selector(f"{KEYS} >> text=of this server")
    page.fill(f"{KEYS} [aria-label='Whom the key is for']", "bob")
    page.fill(f"{KEYS} [aria-label='What the key is called']", "laptop")
    page.select_option(f"{KEYS} select", label="7 days")
    page.keyboard.press("Tab")
    page.click(f"{KEYS} >> text=Create key")
    page.wait_for_selector(f"{KEYS} code:text-is('tml-0123456789abcdef')")
    asked = {"tenant": "bob", "name": "laptop", "admin": False, "ttl_seconds": 604800}
    assert ("POST", "tuft/keys", asked) in stage.calls
    page.click(f"{KEYS} >> text=I have it")
    expect(page.locator("#tuft-panel")).not_to_contain_text("tml-")
    revoke = page.locator(f"{KEYS} button[aria-label^='Revoke']")
    expect(revoke, "the server's own stays").to_have_count(1)
    page.click(f"{KEYS} button[aria-label='Revoke the key of bob']")
    page.click(".jp-Dialog .jp-mod-reject")
    assert "DELETE" not in {method for method, _, _ in stage.calls}
    page.click(f"{KEYS} button[aria-label='Revoke the key of bob']")
    with page.expect_response("**/tuft/keys/*"):
        page.click(".jp-Dialog .jp-mod-warn")
    assert ("DELETE", "tuft/keys/0123456789ab", None) in stage.calls


def test_a_refusal_is_shown_in_the_servers_words_and_others_see_no_keys(staged: Staged) -> None:
    stage = staged.play()
    page = staged.page
    words = "tenant: 'a b' is no name of a tenant: 1 to 128 characters without spaces"
    page.click(f"{KEYS} >> text=Keys")
    page.wait_for_selector(f"{KEYS} >> text=of this server")
    page.route(
        "**/tuft/lab/api/v1/tuft/keys*", lambda route: route.fulfill(status=400, json={"detail": words})
    )
    page.fill(f"{KEYS} [aria-label='Whom the key is for']", "a b")
    page.click(f"{KEYS} >> text=Create key")
    page.wait_for_selector(f"{KEYS} [role=alert]")
    expect(page.locator(f"{KEYS} [role=alert]")).to_have_text(words)
    stage.status["admin"] = False
    stage.send({"type": "status", "status": stage.status})
    page.wait_for_selector(KEYS, state="detached")
    staged.complaints.clear()  # the browser reports each refused request by itself
