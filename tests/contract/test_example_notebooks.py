"""The example notebooks, each run as it stands in a fresh kernel of a real notebook server, and what each promises.

Small steps on two cores: every one ends within a minute or so. The quickstart and the tokenizer's tour are run by
test_kernel_end_to_end.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from examples.run_on_server import Kernel, Server, run_notebook
from tests.support.live import EXAMPLES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

PROMISES = {
    "reinforcement": "after > before + 0.1",
    "preference": "margins[-1] > 1 and sum(map(len, after)) < 0.7 * sum(map(len, before))",
    "distillation": "divergences[-1] < divergences[0] / 3 and any('matey' in answer for answer in after)",
    "custom_loss": "hard[-1] < hard[0] / 2",
    "environment": "sum(rewards[-5:]) / 5 > rewards[0] + 0.4 and chosen.count('red') > 35",
}


@pytest.fixture(scope="module")
def examples(alice: Server) -> Path:
    shutil.copytree(EXAMPLES, alice.root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py"))
    return alice.root


@pytest.mark.parametrize("name", PROMISES)
def test_a_notebook_runs_as_it_stands_and_keeps_its_promise(name: str, alice: Server, examples: Path) -> None:
    """S1-71 (environment): the reward of a loop with a world in it rises; the others learn what they say."""
    with Kernel(alice, f"{name}.ipynb") as kernel:
        run_notebook(kernel, EXAMPLES / f"{name}.ipynb")
        assert kernel.value(f"bool({PROMISES[name]})"), kernel.value(
            "repr([v for v in globals() if v[0] != '_'])"
        )


def test_every_example_notebook_is_run_by_a_test() -> None:
    run_elsewhere = {"quickstart", "tokenizer"}
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == set(PROMISES) | run_elsewhere
