"""`%tuft sample` in a real kernel: a base model and a run side by side, without the SDK or a tokenizer."""

from __future__ import annotations

import pytest

from examples.run_on_server import CellFailed, Kernel

PROMPT = "Where is the treasure?"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def run(kernel: Kernel) -> str:
    """A run that has saved its weights."""
    kernel.run("%load_ext tuft_jupyter\nimport sys, tuft_jupyter")
    kernel.run(f"%tuft sample {PROMPT} --max-tokens 8 --seed 1")
    assert kernel.value("'tinker' in sys.modules or 'transformers' in sys.modules") is False
    kernel.run("training = tuft_jupyter.create_training_client(rank=4).result()")
    kernel.run("training.save_weights_for_sampler('asked').result()")
    return str(kernel.value("training.model_id"))


def test_a_base_model_and_a_run_answer_one_prompt(kernel: Kernel, run: str) -> None:
    """A fresh adapter changes nothing, so with one seed both answers are the same."""
    ask = f"%tuft sample {PROMPT} --max-tokens 12 --seed 7 -m tuft/demo"
    lines = kernel.run(f"{ask} -m {run[:8]}:0").printed.splitlines()
    answers = [line.partition(": ")[2] for line in lines]
    assert lines[0].startswith("tuft/demo: ")
    assert answers[0]
    assert answers[0] == answers[1]
    path = f"tinker://{run}/sampler_weights/asked"
    assert kernel.run(f"{ask} -m {path}").printed.splitlines()[1] == f"{path}: {answers[0]}"


def test_plain_text_is_gone_on_with(kernel: Kernel, run: str) -> None:
    drawn = [
        kernel.run(f"%tuft sample Once upon a --max-tokens 6 --temperature 0 {more}").printed
        for more in ("--plain", "--plain", "")
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("-m tinker://x:train:0/weights/y", "does not exist|no model"),
        ("-m nobody", "'nobody' is no run of yours"),
        ("--max-tokens 0", "max_tokens|max_completion_tokens"),
        ("--temperature -1", "temperature"),
    ],
)
def test_what_cannot_be_asked_is_said_in_a_sentence(kernel: Kernel, run: str, line: str, says: str) -> None:
    """S1-34."""
    with pytest.raises(CellFailed, match=says) as failed:
        kernel.run(f"%tuft sample {PROMPT} {line}")
    assert str(failed.value).startswith("TuftConnectionError: ")
