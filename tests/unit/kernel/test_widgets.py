"""The widgets' kernel side: whole pictures, few points, and words for where nothing can be drawn."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tuft_jupyter
from tests.support.live import until
from tests.support.stub_server import KEY, StubServer
from tests.unit.kernel.test_commands import ONE, TWO, run_of
from tuft_jupyter.kernel.widgets.downsampling import downsampled

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True, scope="module")
def built() -> None:
    """The part of uPlot that `npm run build` copies."""
    if not (ROOT / "tuft_jupyter/kernel/widgets/built/uplot.js").exists():
        subprocess.run([shutil.which("node") or "node", "scripts/widget_assets.mjs"], cwd=ROOT, check=True)


class Told(StubServer):
    """A server with a run whose curve has ``steps`` points."""

    steps = 3

    def __init__(self) -> None:
        super().__init__()
        self.starts: list[int] = []
        self.routes["GET /tuft/outlook"] = self.outlook
        self.routes[f"GET /tuft/runs/{ONE.replace(':', '%3A')}/curve"] = self.curve

    def outlook(self, query: dict[str, Any]) -> tuple[int, Any]:
        saved = {"path": f"tinker://{ONE}/weights/a", "run": ONE, "kind": "weights", "name": "a", "step": 3}
        saved |= {"size_bytes": 1, "created": 2.0, "expires": None, "public": False}
        runs = [run_of(ONE, step=self.steps, created=9.0), run_of(TWO, created=8.0)]
        return 200, {"version": str(self.steps), "runs": runs, "checkpoints": [saved]}

    def curve(self, query: dict[str, Any]) -> tuple[int, Any]:
        self.starts.append(int(query["start"]))
        steps = list(range(1, self.steps + 1))[int(query["start"]) :]
        columns = {
            name: [1.0 / n for n in steps] for name in ("loss", "grad_norm", "learning_rate", "tokens")
        }
        return 200, {"columns": {"step": steps, **columns}}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    with Told() as server:
        monkeypatch.setenv("TUFT_ADDRESS", server.address)
        monkeypatch.setenv("TUFT_API_KEY", KEY)
        yield server


def sent(widget: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    pictures: list[dict[str, Any]] = []
    monkeypatch.setattr(type(widget), "send", lambda self, content, buffers=None: pictures.append(content))
    return pictures


def test_every_picture_is_whole_and_only_news_is_fetched(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that missed all pictures but the last has everything; the server is asked for new points only."""
    curve = tuft_jupyter.LossCurve(ONE)
    pictures = sent(curve, monkeypatch)
    curve._repr_mimebundle_()
    until(lambda: bool(pictures), 10, "a first picture")
    told.steps = 5
    until(lambda: pictures[-1]["runs"][0]["step"] == 5, 10, "the picture after the change")
    curve.close()
    assert pictures[-1]["runs"][0]["columns"]["step"] == [1, 2, 3, 4, 5]
    assert told.starts.count(0) == 1
    assert set(told.starts) >= {0, 3}


def test_a_training_cell_s_curve_shows_the_runs_as_they_come(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing, not some other run, until the first; then whatever the function names."""
    trained: list[str] = []
    curve = tuft_jupyter.LossCurve(lambda: list(trained))
    assert repr(curve) == "LossCurve: the runs that this cell trains"  # though there are two on record
    pictures = sent(curve, monkeypatch)
    curve._repr_mimebundle_()
    until(lambda: bool(pictures), 10, "a first picture")
    assert pictures[0]["runs"] == []
    trained.append(ONE)
    told.steps = 4
    until(lambda: bool(pictures[-1]["runs"]), 10, "the picture of its run")
    curve.close()
    assert [run["id"] for run in pictures[-1]["runs"]] == [ONE]
    assert curve.runs == [ONE]


def test_a_widget_holds_names_and_no_data(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = tuft_jupyter.LossCurve(ONE)
    pictures = sent(curve, monkeypatch)
    curve._repr_mimebundle_()
    until(lambda: bool(pictures), 10, "a first picture")
    state = {name: value for name, value in curve.get_state().items() if not name.startswith("_")}
    curve.close()
    assert state["runs"] == [ONE]
    assert "0.333" not in json.dumps(state, default=str)


def test_a_question_is_answered_with_the_picture_there_is(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tuft_jupyter.RunTable()
    pictures = sent(table, monkeypatch)
    table._repr_mimebundle_()
    until(lambda: bool(pictures), 10, "a first picture")
    before = len(pictures)
    table._heard(table, {"type": "want"}, [])
    assert len(pictures) == before + 1
    assert [run["name"] for run in pictures[-1]["runs"]] == ["6f1c2a52:0", "9a1c2a52:1"]
    table.close()


def test_a_server_that_went_away_is_said_and_found_again(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tuft_jupyter.RunTable()
    pictures = sent(table, monkeypatch)
    monkeypatch.setattr("tuft_jupyter.kernel.widgets.live.RETRY", 0.05)
    told.routes["GET /tuft/outlook"] = lambda _: (503, {"detail": "starting"})
    table._repr_mimebundle_()
    until(
        lambda: bool(pictures) and "still trying" in pictures[-1].get("problem", ""),
        10,
        "the problem is said",
    )
    told.routes["GET /tuft/outlook"] = told.outlook
    until(lambda: "problem" not in pictures[-1], 10, "the picture after the server is back")
    table.close()


def test_widgets_are_words_where_nothing_can_be_drawn(told: Told) -> None:
    assert repr(tuft_jupyter.LossCurve(ONE)) == "LossCurve: 6f1c2a52:0 step 3, loss 1.235"
    assert repr(tuft_jupyter.RunTable()) == "RunTable: 2 runs, 0 at work"
    assert repr(tuft_jupyter.CheckpointTable(ONE)) == f"CheckpointTable: tinker://{ONE}/weights/a (step 3)"
    assert repr(tuft_jupyter.CheckpointTable(TWO)) == "CheckpointTable: no checkpoint yet"


@pytest.mark.parametrize("widget", tuft_jupyter.WIDGETS)
def test_a_widget_s_module_is_whole_and_asks_nobody_else(widget: str) -> None:
    """No address of another host and no import: it works without a network and below any path prefix."""
    kind = getattr(tuft_jupyter, widget)
    module = str(kind._esm)
    assert module.count("\nexport default ") == 1
    assert "import " not in module.replace("uPlot.js (v", "")[:200]
    assert not [line for line in module.splitlines() if "http" in line and "github.com/leeoniya" not in line]


def test_a_long_curve_keeps_its_ends_and_its_peaks() -> None:
    losses: list[float | None] = [1.0] * 10_000
    losses[4321], losses[7000], losses[5] = 99.0, -3.0, None
    few = downsampled({"step": list(range(10_000)), "loss": losses}, ("loss", "absent"), 400)
    assert len(few["step"]) <= 402
    assert (few["step"][0], few["step"][-1]) == (0, 9999)
    assert {99.0, -3.0} <= set(few["loss"])
    whole = downsampled({"step": [1, 2], "loss": [0.123456789, None]}, ("loss",), 400)
    assert whole == {"step": [1, 2], "loss": [0.123457, None]}


def test_a_widget_rests_when_its_output_was_cleared_and_nobody_else_looks(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell that is run fifty times would leave fifty threads that ask the server for ever."""
    table = tuft_jupyter.RunTable()
    pictures = sent(table, monkeypatch)
    table._repr_mimebundle_()
    until(lambda: bool(pictures), 10, "a first picture")
    monkeypatch.setattr("tuft_jupyter.kernel.widgets.live.REPEAT", 0.05)
    thread = table._thread
    assert thread is not None
    table._heard(table, {"type": "gone"}, [])
    assert {"type": "look?"} in pictures
    until(lambda: not thread.is_alive(), 20, "its thread ends")
    table._heard(table, {"type": "want"}, [])
    told.steps = 6
    until(lambda: pictures[-1].get("runs", [{}])[0].get("step") == 6, 20, "it goes on for the next view")
    table.close()


class Rests(threading.Event):
    """An event that notes how long it was waited for, and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.rests: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.rests.append(timeout or 0.0)
        return super().wait(0.01)


def test_a_large_picture_is_sent_less_often(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook server drops what a kernel says above a megabyte a second: that of other cells too."""
    told.steps = 4000
    curve = tuft_jupyter.LossCurve(ONE)
    pictures = sent(curve, monkeypatch)
    closing = Rests()
    curve._closing = closing
    curve._repr_mimebundle_()
    until(lambda: bool(closing.rests), 20, "a first picture")
    curve.close()
    assert len(json.dumps(pictures[0])) / closing.rests[0] < 200_000
