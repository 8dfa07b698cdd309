"""How smooth the run view is, and how long a record takes to become a pixel: real JupyterLab in real Chromium.

Frames: the time between two frames with twenty runs of ten thousand steps, while the pointer moves, zooms and goes back
and records come in. Latency: real training on the demo model, from the time that the server's journal gives the record
of a step to the first frame in which the panel shows that step; both clocks are this machine's.

Run ``python -m benchmarks.lab`` on a quiet machine; ``CHROMIUM`` names the browser.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

from examples.run_on_server import Kernel
from tests.browser.conftest import EMPTY
from tests.browser.jupyterlab import Lab, chromium_browser, lab_page, lab_server
from tests.browser.stage import Stage, state

RUNS, STEPS, POINTS = 20, 10_000, 100

WATCH_FRAMES = """() => {
    window.frames_seen = [];
    let last = performance.now();
    const next = now => {
        window.frames_seen.push(now - last);
        last = now;
        window.watching = requestAnimationFrame(next);
    };
    window.watching = requestAnimationFrame(next);
}"""
FRAMES = "() => { cancelAnimationFrame(window.watching); return window.frames_seen.slice(2); }"
BEGIN = """
%load_ext tuft_jupyter
import tinker, tuft_jupyter
from tinker import types
training = tuft_jupyter.create_training_client(base_model="tuft/demo", rank=4)

def step():
    datum = types.Datum(model_input=types.ModelInput.from_ints([101, 42, 37]),
                        loss_fn_inputs={"target_tokens": [42, 37, 99]})
    training.forward_backward([datum], "cross_entropy")
    return training.optim_step(types.AdamParams(learning_rate=1e-3))
"""
WATCH_STEPS = """() => {
    window.steps_seen = {};
    const look = () => {
        const text = document.querySelector('#tuft-panel .jp-Tuft-reading')?.textContent ?? '';
        const step = text.match(/step (\\d+)/)?.[1];
        if (step && !(step in window.steps_seen)) { window.steps_seen[step] = Date.now() / 1000; }
        requestAnimationFrame(look);
    };
    look();
}"""


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def frames(lab: Lab, stage: Stage) -> None:
    page = lab.page
    lab.execute("tuft:open-runs", {"runs": [one["id"] for one in stage.snapshot["runs"]]})
    page.wait_for_selector(".jp-Tuft-view canvas")
    box = page.locator(".jp-Tuft-view .u-over").bounding_box()
    assert box is not None
    left, width, middle = box["x"], box["width"], box["y"] + box["height"] / 2
    page.evaluate(WATCH_FRAMES)
    for sweep in range(4):
        for i in range(40):
            page.mouse.move(left + width * (0.1 + 0.02 * i), middle)
        stage.step(stage.snapshot["runs"][0]["id"], 0.5)
        page.mouse.move(left + width * (0.2 + 0.1 * sweep), middle)
        page.mouse.down()
        page.mouse.move(left + width * (0.4 + 0.1 * sweep), middle, steps=10)
        page.mouse.up()
        page.mouse.dblclick(left + width / 2, middle)
    times: list[float] = page.evaluate(FRAMES)
    print(
        f"frames   {RUNS} runs x {STEPS} steps: median {statistics.median(times):.1f} ms "
        f"({1000 / statistics.median(times):.0f}/s), 95 % below {percentile(times, 0.95):.1f} ms, n={len(times)}"
    )


def latency(lab: Lab) -> None:
    with Kernel(lab.server) as kernel:
        kernel.run(BEGIN + "step().result()")
        lab.page.wait_for_selector("#tuft-panel canvas")
        lab.page.evaluate(WATCH_STEPS)
        kernel.run(f"for _ in range({POINTS}):\n    step().result()")
        lab.page.wait_for_function(f"() => {POINTS + 1} in window.steps_seen")
    shown: dict[str, float] = lab.page.evaluate("() => window.steps_seen")
    curve = lab.server.request("GET", "tuft/lab/state")["state"]["runs"][-1]["curve"]
    recorded = dict(zip(curve["step"], curve["time"], strict=True))
    late = [1000 * (at - recorded[int(step)]) for step, at in shown.items() if int(step) > 1]
    print(
        f"latency  record to pixel: median {statistics.median(late):.0f} ms, "
        f"95 % below {percentile(late, 0.95):.0f} ms, {len(late)} frames of {POINTS} steps"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, work = Path(folder) / "root", Path(folder) / "work"
        root.mkdir()
        (root / "empty.ipynb").write_text(json.dumps(EMPTY))
        env = {"TUFT_HOME": str(work / "tuft"), "HF_HOME": str(work / "huggingface")}
        with lab_server(root, work, env) as server, chromium_browser() as browser:
            with lab_page(server, browser) as lab:
                stage = Stage(lab.page, state(RUNS, STEPS))
                lab.open("empty.ipynb")
                lab.open_panel()
                lab.page.wait_for_selector("#tuft-panel canvas")
                frames(lab, stage)
            with lab_page(server, browser) as lab:
                lab.open("empty.ipynb")
                lab.open_panel()
                latency(lab)


if __name__ == "__main__":
    main()
