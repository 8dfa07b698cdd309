"""JupyterLab in Chromium for tests: a server of its own, a page that is signed in, and what a person does there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, expect, sync_playwright
from playwright.sync_api import TimeoutError as TookTooLong

from examples.run_on_server import Server

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # a container's is often too small for a page's pictures
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Lab asks at its first start whether it may fetch news; the question would cover the page.
NO_NEWS = {"fetchNews": "false", "checkForUpdates": False}
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_MS = 120_000
"""What a page may take on a busy machine."""


def chromium() -> str | None:
    """The browser: ``$CHROMIUM``, one of the system, or None for Playwright's own."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


def lab_server(root: Path, work: Path, env: Mapping[str, str]) -> Server:
    """A notebook server below a path prefix, with token and XSRF protection, and settings of its own."""
    settings = work / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(NO_NEWS))
    return Server(
        root,
        work,
        base_url="/user/alice/",
        env={
            **env,
            "LOGNAME": "alice",
            "JUPYTER_CONFIG_DIR": str(work / "config"),
            "JUPYTERLAB_SETTINGS_DIR": str(work / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(work / "workspaces"),
        },
        options=("--LabApp.expose_app_in_browser=True",),
    )


class Lab:
    """One browser page with JupyterLab. ``complaints`` are errors that come from our extension."""

    def __init__(self, page: Page, server: Server) -> None:
        self.page = page
        self.server = server
        self.complaints: list[str] = []
        page.on("console", self._console)
        page.on("pageerror", self._page_error)

    def open(self, notebook: str) -> None:
        self.page.goto(f"{self.server.url}lab/tree/{notebook}?reset&token={self.server.token}")
        self.page.wait_for_function("() => window.jupyterapp")
        self.page.evaluate("() => window.jupyterapp.restored")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        self.page.wait_for_function(
            "() => jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        )

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> None:
        """Run a command of JupyterLab without waiting for its end."""
        self.page.evaluate(
            "([command, args]) => { void jupyterapp.commands.execute(command, args); }",
            [command, dict(arguments or {})],
        )

    def open_panel(self, width: int = 340) -> None:
        """A click on our icon in the left sidebar."""
        self.page.click('.jp-SideBar.jp-mod-left [data-id="tuft-panel"]')
        self.page.wait_for_selector("#tuft-panel .jp-Tuft-head")
        self.set_panel_width(width)

    def set_panel_width(self, width: int) -> None:
        self.page.evaluate(
            """width => {
                const split = jupyterapp.shell._hsplitPanel;
                split.setRelativeSizes([width, split.node.clientWidth - width, 0]);
            }""",
            width,
        )

    def set_theme(self, theme: str) -> None:
        self.page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', { theme })", theme)
        self.page.wait_for_function("theme => document.body.dataset.jpThemeName === theme", arg=theme)

    def ask(self, prompt: str) -> None:
        """Type a prompt into the playground, and send it as soon as it can be sent."""
        self.page.fill(".jp-Tuft-playground textarea", prompt)
        expect(self.page.locator(".jp-Tuft-playground .jp-Tuft-primary")).to_be_enabled()
        self.page.keyboard.press("Control+Enter")

    def scroll_to(self, text: str) -> None:
        """Bring the first cell that contains ``text`` to the top of the page."""
        self.page.evaluate(
            """text => {
                const { widgets } = jupyterapp.shell.currentWidget.content;
                const cell = widgets.find(w => w.model.sharedModel.getSource().includes(text));
                cell.node.scrollIntoView();
            }""",
            text,
        )

    def wait(self, condition: str, argument: Any, seconds: float) -> None:
        """Wait until a condition in the page holds; else fail with what the page and the server say."""
        try:
            self.page.wait_for_function(condition, arg=argument, timeout=seconds * 1000)
        except TookTooLong:
            outputs = [output for cell in self.cells() for output in cell["outputs"]]
            pytest.fail(
                f"the page still waits after {seconds:.0f} s\n"
                f"panel: {self.page.inner_text('#tuft-panel')}\n"
                f"cells: {json.dumps(outputs[-3:])[-2000:]}\n"
                f"server: {self.server.log.read_text()[-4000:]}"
            )

    def cells(self) -> list[dict[str, Any]]:
        """The notebook's code cells as they are now: execution count and outputs."""
        cells: list[dict[str, Any]] = self.page.evaluate(
            "() => [...jupyterapp.shell.currentWidget.content.model.cells].map(cell => cell.toJSON())"
        )
        return [cell for cell in cells if cell["cell_type"] == "code"]

    def _console(self, message: ConsoleMessage) -> None:
        ours = "tuft" in message.text or "tuft" in message.location.get("url", "")
        if message.type == "error" and ours:
            self.complaints.append(message.text)

    def _page_error(self, error: Error) -> None:
        if "tuft" in (error.stack or ""):
            self.complaints.append(error.message)


@contextmanager
def chromium_browser() -> Iterator[Browser]:
    """A browser; skips the test where there is none. While it is open no other event loop runs in this thread."""
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        except Error as problem:
            pytest.skip(f"no Chromium: {problem.message.splitlines()[0]}")
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def lab_page(server: Server, browser: Browser) -> Iterator[Lab]:
    """A fresh page, which knows nothing of others."""
    page = browser.new_page(viewport={"width": 1280, "height": 860}, device_scale_factor=2)
    try:
        page.set_default_timeout(PATIENCE_MS)
        yield Lab(page, server)
    finally:
        page.context.close()
