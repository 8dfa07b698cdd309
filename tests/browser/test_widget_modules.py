"""The widgets' modules in a bare page, with the kernel played by the test: what is drawn of a picture, what stays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

import tuft_jupyter

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

RUN = "6f1c2a52-0000-4000-8000-000000000001:train:"
SHOW = """async ([module, traits]) => {
    const heard = new Set();
    window.sent = [];
    window.model = {
        get: name => traits[name],
        set: (name, value) => (traits[name] = value),
        save_changes: () => {},
        send: message => sent.push(message),
        on: (event, listener) => event === 'msg:custom' && heard.add(listener),
        off: (event, listener) => heard.delete(listener)
    };
    window.tell = message => heard.forEach(listener => listener(message));
    const url = URL.createObjectURL(new Blob([module], { type: 'text/javascript' }));
    const el = document.body.appendChild(document.createElement('div'));
    window.end = (await import(url)).default.render({ model, el });
}"""

PICTURE = "() => document.querySelector('canvas').toDataURL()"
ANOTHER_PICTURE = "former => document.querySelector('canvas').toDataURL() !== former"


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page()
    page.set_default_timeout(20_000)
    yield page
    page.close()


def show(page: Page, widget: str, **traits: Any) -> None:
    given = {
        "runs": [],
        "metric": "loss",
        "log_scale": False,
        "smoothing": 0,
        "models": [],
        "run": "",
        **traits,
    }
    kind = getattr(tuft_jupyter, widget)
    page.add_style_tag(content=str(kind._css))
    page.evaluate(SHOW, [str(kind._esm), given])


def tell(page: Page, **picture: Any) -> None:
    page.evaluate("picture => tell({ type: 'picture', ...picture })", picture)


def row(number: int, **changes: Any) -> dict[str, Any]:
    run = {"id": f"{RUN}{number}", "name": f"6f1c2a52:{number}", "base_model": "tuft/demo", "rank": 8}
    run |= {"status": "ready", "pending": 0, "step": 3, "loss": 1.5, "tokens_per_second": 9.0}
    return run | {"last_request": 0, "why": ""} | changes


def line(number: int, steps: list[int], losses: list[float]) -> dict[str, Any]:
    return row(number) | {"live": False, "step": steps[-1], "columns": {"step": steps, "loss": losses}}


def test_a_table_that_changes_keeps_the_button_that_is_pressed_and_the_focus(page: Page) -> None:
    """While a run trains, a picture comes five times a second: a click would end on another button than it began on."""
    show(page, "RunTable")
    tell(page, runs=[row(1, step=3)])
    button = page.locator("button").first
    button.focus()
    page.mouse.move(
        *page.locator("button").first.evaluate(
            "b => [b.getBoundingClientRect().x + 5, b.getBoundingClientRect().y + 5]"
        )
    )
    page.evaluate(
        "() => document.querySelector('button').addEventListener('click', () => (window.clicked = true))"
    )
    page.mouse.down()
    tell(page, runs=[row(1, step=4)])
    page.mouse.up()
    assert page.evaluate("() => [window.clicked, document.activeElement.tagName]") == [True, "BUTTON"]
    assert "4" in page.locator("td.tuft-number").all_inner_texts()
    tell(page, runs=[row(2, step=1), row(1, step=4)])
    assert page.locator("tbody tr").count() == 2


def test_what_is_copied_is_copied_on_a_page_without_https_too(page: Page) -> None:
    show(page, "RunTable")
    page.evaluate(
        """() => {
            Object.defineProperty(navigator, 'clipboard', { value: undefined });
            document.execCommand = () => (window.copied = document.getSelection().toString()
                || document.activeElement.value);
        }"""
    )
    tell(page, runs=[row(1)])
    page.click("button")
    page.wait_for_selector("button >> text=copied")
    assert page.evaluate("() => window.copied") == f"{RUN}1"


def test_a_run_that_went_back_is_one_line_of_the_weights_it_has(page: Page) -> None:
    """Steps 1 to 4, then back to 2 and on to 3: the steps that were left are neither drawn nor told."""
    show(page, "LossCurve")
    tell(page, runs=[line(1, [1, 2, 3, 4, 3], [9.0, 8.0, 0.5, 6.0, 7.0])])
    assert page.inner_text(".tuft-reading") == "6f1c2a52:1: step 3, loss 7, lowest 7"
    page.click("summary")
    assert page.locator("tbody tr").count() == 3


def test_each_run_of_a_curve_is_told_with_its_own_last_step(page: Page) -> None:
    show(page, "LossCurve")
    tell(page, runs=[line(1, [1, 2], [3.0, 2.5]), line(2, [1, 2, 3, 4], [4.0, 3.0, 2.0, 1.0])])
    shown = page.locator(".tuft-entry").all_inner_texts()
    assert [text.strip() for text in shown] == ["6f1c2a52:1 · step 2 · 2.5", "6f1c2a52:2 · step 4 · 1"]


def test_points_that_come_while_one_looks_closer_are_drawn(page: Page) -> None:
    show(page, "LossCurve")
    tell(page, runs=[line(1, list(range(1, 101)), [5.0 - n / 25 for n in range(100)])])
    box = page.locator(".u-over").bounding_box()
    assert box is not None
    whole = page.evaluate(PICTURE)
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 1, middle, steps=5)
    page.mouse.up()
    page.wait_for_function(ANOTHER_PICTURE, arg=whole)
    closer = page.evaluate(PICTURE)
    tell(page, runs=[line(1, list(range(1, 101)), [1.0 + n / 25 for n in range(100)])])
    page.wait_for_function(ANOTHER_PICTURE, arg=closer)


def test_a_page_without_a_kernel_is_told_what_to_do(page: Page) -> None:
    """A printed or mailed notebook: nothing will ever come, and nothing says "undefined"."""
    show(page, "GpuMeter")
    page.wait_for_selector(".tuft-note >> text=run the cell again")
    state = {"runs": [row(1, pending=1, curve={"loss": [2.0]}) | {"why": None}]}
    page.evaluate(
        """state => {
            const data = document.body.appendChild(document.createElement('script'));
            data.id = 'jupyter-config-data';
            data.type = 'application/json';
            data.textContent = '{"baseUrl": "/"}';
            window.fetch = async () => ({ ok: true, json: async () => ({ state }) });
        }""",
        state,
    )
    show(page, "RunTable")
    page.wait_for_selector("text=what the server knows now")
    assert "undefined" not in page.inner_text("body")
    assert "null" not in page.inner_text("body")


def test_a_view_that_is_gone_says_so_and_those_that_stay_are_asked(page: Page) -> None:
    show(page, "GpuMeter")
    page.evaluate("() => tell({ type: 'look?' })")
    page.evaluate("() => end()")
    page.evaluate("() => tell({ type: 'look?' })")
    assert page.evaluate("() => sent") == [{"type": "want"}, {"type": "want"}, {"type": "gone"}]
