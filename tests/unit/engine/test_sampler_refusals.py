"""Sample requests that cannot be served fail alone, with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.sampling import ask, prompt, run
from tests.support.tiny_models import make_model
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.core.types import SampleRequest
from tuft_jupyter.engine.torch_sampler import TorchSampler

VOCAB = 320


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ask(np.array([], np.int32)), "prompt is empty"),
        (ask(np.array([3, VOCAB], np.int32)), "prompt token 320 at position 1"),
        (ask(np.array([-1], np.int32)), "prompt token -1 at position 0"),
        (ask(prompt(96)), "prompt has 96 tokens.*context of 96"),
        (ask(prompt(3), 0), "num_samples"),
        (ask(prompt(3), 100_000), "num_samples"),
        (ask(prompt(3), max_tokens=0), "max_tokens"),
        (
            ask(prompt(90), max_tokens=7),
            "90 tokens and max_tokens asks for 7 more.*context of 96.*to 6 or less",
        ),
        (ask(prompt(3), topk_prompt_logprobs=VOCAB + 1), "topk_prompt_logprobs"),
    ],
)
def test_a_bad_request_fails_in_its_own_place(
    sampler: TorchSampler, request_: SampleRequest, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        sampler.check(request_)
    bad, good = run(sampler, [(None, request_), (None, ask(prompt(3), max_tokens=2))])
    assert isinstance(bad, UserError)
    assert [len(s.tokens) for s in good.sequences] == [2]


def test_stop_strings_need_a_tokenizer(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "m")
    for file in directory.glob("token*"):
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer; give token ids"):
        TorchSampler(directory).check(ask(prompt(3), stop_tokens=None, stop_strings=("x",)))
