"""The torch sampler with many adapters, and with some that cannot be served."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.support.adapters import make_adapter
from tests.support.sampling import ask, prompt, run, tokens_of
from tests.support.tiny_models import make_model
from tuft_jupyter.core.errors import NotFound, TuftError, UserError
from tuft_jupyter.engine import checkpoint, lora
from tuft_jupyter.engine.low_rank import Slot
from tuft_jupyter.engine.torch_sampler import TorchSampler


def test_more_adapters_than_are_held_are_served_in_turn(sampled: Path, adapters: list[Path]) -> None:
    few = TorchSampler(sampled, max_adapters=1)
    jobs = [(adapter, ask(prompt(5), seed=1)) for adapter in [*adapters, *adapters]]
    expected = run(TorchSampler(sampled), jobs)
    assert [tokens_of(a) for a in run(few, jobs)] == [tokens_of(a) for a in expected]


@pytest.mark.slow
def test_hundreds_of_adapters_are_served_and_few_are_held(
    sampled: Path, adapters: list[Path], tmp_path: Path
) -> None:
    """The one used least recently goes, with all of its memory; its directory is read again when it is asked for."""
    many = [Path(shutil.copytree(adapters[i % 3], tmp_path / str(i))) for i in range(240)]
    sampler = TorchSampler(sampled, max_adapters=8)
    request = ask(prompt(4), temperature=0.0, max_tokens=3)
    expected = [tokens_of(answer) for answer in run(sampler, [(adapter, request) for adapter in adapters])]

    def held() -> int:
        gc.collect()
        return sum(type(thing) is Slot for thing in gc.get_objects())

    order = np.random.default_rng(0).permutation(len(many))
    answers = run(sampler, [(many[i], request) for i in order[:40]])
    before = held()
    answers += run(sampler, [(many[i], request) for i in order[40:]])
    assert [tokens_of(answer) for answer in answers] == [expected[i % 3] for i in order]
    assert held() <= before * 1.5, "what left is gone"
    (again,) = run(sampler, [(many[order[0]], request)])
    assert tokens_of(again) == expected[order[0] % 3]


def test_an_adapter_is_loaded_once(
    sampled: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Path] = []
    read = checkpoint.read

    def counted(source: Path, *args: Any, **kwargs: Any) -> Any:
        loads.append(source)
        return read(source, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "read", counted)
    sampler = TorchSampler(sampled, max_adapters=2)
    job = ask(prompt(4), max_tokens=2)
    a, b, c = adapters
    for adapter in (a, b, a, c, a, b):
        run(sampler, [(adapter, job), (adapter, job)])
    assert loads == [a, b, c, b]


def test_more_geometries_than_are_remembered_are_served(
    sampled: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [(adapter, ask(prompt(5), seed=1)) for adapter in [*adapters, *adapters]]
    expected = run(TorchSampler(sampled), jobs)
    monkeypatch.setattr(lora, "_IDLE_GEOMETRIES", 0)
    assert [tokens_of(a) for a in run(TorchSampler(sampled, max_adapters=2), jobs)] == [
        tokens_of(a) for a in expected
    ]


def test_a_directory_saved_again_is_read_again(sampled: Path, adapters: list[Path], tmp_path: Path) -> None:
    sampler = TorchSampler(sampled)
    place = tmp_path / "latest"
    answers = []
    for source in adapters[:2]:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)
        answers += run(sampler, [(place, ask(prompt(5), temperature=0.0))])
    assert [tokens_of(a) for a in answers] == [
        tokens_of(a) for a in run(sampler, [(d, ask(prompt(5), temperature=0.0)) for d in adapters[:2]])
    ]


def test_an_adapter_that_is_missing_or_does_not_fit_fails_in_its_own_place(
    sampler: TorchSampler, adapters: list[Path], tmp_path: Path
) -> None:
    wider = make_model(tmp_path / "wider", hidden=128)
    foreign = make_adapter(tmp_path / "foreign", wider, seed=0)
    torn = tmp_path / "torn"
    shutil.copytree(adapters[0], torn)
    file = torn / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    request = ask(prompt(5), temperature=0.0)
    places = [adapters[0], tmp_path / "gone", foreign, foreign, torn, adapters[0]]
    good, gone, misfit, twice, cut, again = run(sampler, [(place, request) for place in places])
    assert isinstance(gone, NotFound)
    assert isinstance(misfit, UserError)
    assert "lora_B" in misfit.message
    assert twice.message == misfit.message
    assert isinstance(cut, UserError)
    assert tokens_of(good) == tokens_of(again)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 3}])
def test_an_adapter_that_has_diverged_fails_alone(
    sampled: Path, adapters: list[Path], tmp_path: Path, params: dict[str, Any]
) -> None:
    diverged = tmp_path / "diverged"
    shutil.copytree(adapters[0], diverged)
    file = diverged / "adapter_model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(file).items()}, file)
    good, bad = (ask(prompt(5), 2, seed=1, **{"max_tokens": n, **params}) for n in (6, 60))
    sampler = TorchSampler(sampled, max_live=4)
    fine, broken, after = run(sampler, [(adapters[1], good), (diverged, bad), (adapters[1], good)])
    (alone,) = run(TorchSampler(sampled), [(adapters[1], good)])
    assert isinstance(broken, UserError)
    assert "diverged" in broken.message
    assert tokens_of(fine) == tokens_of(after) == tokens_of(alone)


def test_an_adapter_that_cannot_be_read_at_all_fails_alone(
    sampler: TorchSampler, adapters: list[Path], tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(adapters[0], odd)
    (odd / "adapter_config.json").write_text('{"peft_type": "LORA", "r": "four", "target_modules": [1, {}]}')
    bad, good = run(sampler, [(odd, ask(prompt(4))), (adapters[0], ask(prompt(4)))])
    assert isinstance(bad, TuftError)
    assert len(good.sequences) == 1
