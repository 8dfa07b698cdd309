"""Close the lid, come back: the curve is whole and training goes on. A real server, a real kernel, a real page."""

from __future__ import annotations

import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from examples.run_on_server import Kernel, Server
from tests.browser.conftest import EMPTY
from tests.browser.jupyterlab import Lab, lab_page, lab_server
from tests.support.live import until

STEPS = 500
SHOWN = """step => {
    const text = document.querySelector('#tuft-panel .jp-Tuft-reading')?.textContent ?? '';
    return Number(text.match(/step (\\d+)/)?.[1] ?? 0) >= step;
}"""
ANSWERED = """() => [...document.querySelectorAll('.jp-Tuft-answerText')].every(
    node => /jp-mod-(done|cut)/.test(node.className)
)"""
BEGIN = """
%load_ext tuft_jupyter
import tinker, tuft_jupyter
from tinker import types
training = tuft_jupyter.create_training_client(base_model="tuft/demo", rank=4)

def datum():
    return types.Datum(model_input=types.ModelInput.from_ints([101, 42, 37]),
                       loss_fn_inputs={"target_tokens": [42, 37, 99]})

def step():
    passed = training.forward_backward([datum()], "cross_entropy")
    return passed, training.optim_step(types.AdamParams(learning_rate=1e-3))
"""
TRAIN = f"""
pairs = [step() for _ in range({STEPS})]
for _, done in pairs:
    done.result(timeout=300)
"""

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The status bar is told to be quiet, so that nothing of ours is left to look at when the panel is closed."""
    for name in ("TUFT_ADDRESS", "TUFT_API_KEY", "TINKER_BASE_URL", "TINKER_API_KEY", "TUFT_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    root, work = tmp_path / "notebooks", tmp_path / "work"
    root.mkdir()
    (root / "empty.ipynb").write_text(json.dumps(EMPTY))
    chosen = work / "settings" / "tuft-jupyter" / "panel.jupyterlab-settings"
    chosen.parent.mkdir(parents=True)
    chosen.write_text(json.dumps({"statusBar": False}))
    env = {"TUFT_HOME": str(work / "tuft"), "HF_HOME": str(work / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    with lab_server(root, work, env) as running:
        yield running


def run_now(server: Server) -> dict[str, Any]:
    """The newest run as the server has it."""
    found: dict[str, Any] = server.request("GET", "tuft/lab/state")["state"]["runs"][-1]
    return found


def frames_of(lab: Lab) -> tuple[set[str], list[str]]:
    """Our websockets that are open and what they bring, from now on, as the browser's own network log tells it."""
    ours: set[str] = set()
    frames: list[str] = []
    client = lab.page.context.new_cdp_session(lab.page)
    client.on(
        "Network.webSocketCreated",
        lambda event: ours.add(event["requestId"]) if "tuft/lab/feed" in event["url"] else None,
    )
    client.on(
        "Network.webSocketFrameReceived",
        lambda event: frames.append(event["response"]["payloadData"]) if event["requestId"] in ours else None,
    )
    client.on("Network.webSocketClosed", lambda event: ours.discard(event["requestId"]))
    client.send("Network.enable")
    return ours, frames


def exported(lab: Lab) -> list[dict[str, Any]]:
    with lab.page.expect_download() as download:
        lab.page.click(".jp-Tuft-view button[aria-label='Export JSONL']")
    return [json.loads(line) for line in download.value.path().read_text().splitlines()]


def drop(lab: Lab, path: Path) -> None:
    """A file or folder of this machine, dragged into the panel."""
    box = lab.page.locator("#tuft-panel").bounding_box()
    assert box is not None
    client = lab.page.context.new_cdp_session(lab.page)
    dragged = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + 200}
        client.send("Input.dispatchDragEvent", {"type": kind, **place, "data": dragged})
    client.detach()


def test_the_lid_is_closed_during_500_steps_and_nothing_is_missing(
    server: Server, browser: Browser, tmp_path: Path
) -> None:
    """S0-48, F1: the page is closed while 500 steps run and reopened: 500 of 500 points. Nothing is sent while the
    panel is hidden. The kernel is killed: the next one goes on at step 501. A checkpoint is downloaded, tried
    and deleted; what was downloaded comes in again, dragged as a folder and as an archive."""
    with Kernel(server) as kernel:
        kernel.run(BEGIN)
        working = threading.Thread(target=kernel.run, args=(TRAIN,))
        working.start()
        with lab_page(server, browser) as lab:
            sockets, frames = frames_of(lab)
            lab.open("empty.ipynb")
            lab.open_panel()
            lab.wait(SHOWN, 5, seconds=120)
            assert frames
            lab.page.click('.jp-SideBar.jp-mod-left [data-id="tuft-panel"]')
            lab.page.wait_for_selector("#tuft-panel", state="hidden")

            def hung_up() -> bool:
                lab.page.evaluate("() => 0")  # what the browser has to tell arrives meanwhile
                return not sockets

            until(hung_up, 60, "a hidden panel listens no more")
            frames.clear()
            before = run_now(server)["step"]
            until(lambda: run_now(server)["step"] >= min(STEPS, before + 20), 120, "training goes on")
            lab.page.evaluate("() => 0")
            assert frames == [], "nothing is sent while nobody looks"
            assert lab.complaints == []
        working.join(300)
        pid = int(kernel.value("__import__('os').getpid()"))
    with lab_page(server, browser) as lab, Kernel(server) as kernel:
        lab.open("empty.ipynb")
        lab.open_panel()
        lab.wait(SHOWN, STEPS, seconds=60)
        lab.page.click("#tuft-panel >> text=Enlarge")
        lab.page.wait_for_selector(".jp-Tuft-view canvas")
        rows = exported(lab)
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        assert rows[-1]["loss"] < rows[0]["loss"]

        assert int(kernel.value("__import__('os').getpid()")) != pid
        resumed = "%load_ext tuft_jupyter\ntraining = %tuft resume\n"
        kernel.run(
            BEGIN.replace("training = tuft", "_ = lambda: tuft") + resumed + "step()[1].result(timeout=60)"
        )
        lab.wait(SHOWN, STEPS + 1, seconds=60)
        assert run_now(server)["curve"]["step"] == list(range(1, STEPS + 2))

        kernel.run('training.save_weights_for_sampler("tried").result(timeout=60)')
        page = lab.page
        with page.expect_download() as download:
            page.click('#tuft-panel button[aria-label="Download tried"]')
        archive = tmp_path / "tried.tar"
        download.value.save_as(archive)
        with tarfile.open(archive) as files:
            contents = {
                Path(member.name).name: content.read()
                for member in files.getmembers()
                if (content := files.extractfile(member))
            }
        assert {"adapter_config.json", "adapter_model.safetensors"} <= contents.keys()

        (folder := tmp_path / "as-folder").mkdir()
        for name, inside in contents.items():
            (folder / name).write_bytes(inside)
        archive = archive.rename(tmp_path / "as-archive.tar")
        for brought in (folder, archive):
            drop(lab, brought)
            page.wait_for_selector(f'#tuft-panel button[aria-label="Delete {brought.stem}"]')
        drop(lab, tmp_path / "notebooks" / "empty.ipynb")
        page.wait_for_selector("text=That is no PEFT adapter")

        page.click('#tuft-panel button[aria-label="Try tried in the playground"]')
        lab.ask("Where is the treasure?")
        lab.wait(ANSWERED, None, seconds=120)
        assert all(page.locator(".jp-Tuft-playground .jp-Tuft-answerText").all_inner_texts())

        page.click('#tuft-panel button[aria-label="Delete tried"]')
        page.click(".jp-Dialog .jp-mod-warn")
        page.wait_for_selector('#tuft-panel button[aria-label="Delete tried"]', state="detached")
        kept = server.request("GET", "tuft/lab/state")["state"]["checkpoints"]
        assert {one["name"] for one in kept} == {"as-folder", "as-archive"}
        assert lab.complaints == []
