"""Checkpoints: PEFT's own form, whole or not at all, and nothing damaged or foreign is ever loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.support.datums import ask, make_datum
from tests.support.plain_peft import adapter_parameters, target_logprobs
from tests.support.tiny_models import make_model
from tuft_jupyter.core.errors import TuftError, UserError
from tuft_jupyter.core.types import AdamParams, ForwardBackwardResult, LoraSpec
from tuft_jupyter.engine import checkpoint
from tuft_jupyter.engine.checkpoint import CONFIG, MANIFEST, OPTIMIZER, WEIGHTS
from tuft_jupyter.engine.trainer import PeftTrainer

SPEC = LoraSpec(rank=4, alpha=8, seed=1)


def train(trainer: PeftTrainer, run: str, first: int, steps: int) -> None:
    for i in range(first, first + steps):
        trainer.forward_backward([(run, ask([make_datum(12, seed=i)]))])
        trainer.optim_step([(run, AdamParams(learning_rate=1e-2, weight_decay=0.1))])


def logprobs(trainer: PeftTrainer, run: str) -> np.ndarray:
    result = trainer.forward_backward([(run, ask([make_datum(20)], backward=False))])[0]
    assert isinstance(result, ForwardBackwardResult)
    return result.logprobs[0]


def weights(trainer: PeftTrainer, run: str) -> Tensor:
    return trainer.bank[run].weights.clone()


@pytest.fixture
def trainer(qwen3: Path) -> PeftTrainer:
    """With a run a few steps old."""
    made = PeftTrainer(qwen3, name="tiny/qwen3")
    made.create("run", SPEC)
    train(made, "run", 0, 3)
    return made


@pytest.fixture
def saved(trainer: PeftTrainer, tmp_path: Path) -> Path:
    target = tmp_path / "saved"
    trainer.save("run", target, optimizer=True)
    return target


@pytest.mark.parametrize("spec", [SPEC, LoraSpec(rank=3, alpha=5.5, seed=2, train_mlp=False)])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_peft_loads_every_tensor_and_says_the_same(
    family: str, spec: LoraSpec, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """S1-40: a plain PEFT directory; the base model is named, the target modules are true (tied unembedding too)."""
    directory = request.getfixturevalue(family)
    trainer = PeftTrainer(directory, name="tiny/model")
    trainer.create("run", spec)
    train(trainer, "run", 0, 3)
    size = trainer.save("run", tmp_path / "a" / "b", optimizer=False)
    files = {file.name: file.stat().st_size for file in (tmp_path / "a" / "b").iterdir()}
    assert files.keys() == {CONFIG, WEIGHTS, MANIFEST}
    assert size == sum(files.values())
    config = json.loads((tmp_path / "a" / "b" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "tiny/model"
    assert (config["r"], config["lora_alpha"]) == (spec.rank, spec.alpha)
    assert config["target_modules"] == sorted(config["target_modules"])
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    peft = PeftModel.from_pretrained(plain, tmp_path / "a" / "b")
    in_file = safetensors.torch.load_file(tmp_path / "a" / "b" / WEIGHTS)
    loaded = adapter_parameters(peft)
    assert loaded.keys() == in_file.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in in_file.items())
    theirs = target_logprobs(peft, make_datum(20)).detach().numpy()
    np.testing.assert_allclose(logprobs(trainer, "run"), theirs, rtol=1e-5, atol=1e-5)


def test_a_resumed_run_equals_the_uninterrupted_one_and_not_a_cold_one(
    qwen3: Path, trainer: PeftTrainer, saved: Path
) -> None:
    """F16, P7, S1-39: with the optimizer bit by bit the same; without it, not."""
    train(trainer, "run", 3, 4)
    found = {}
    for kind, optimizer in (("resumed", True), ("cold", False)):
        fresh = PeftTrainer(qwen3)
        assert fresh.load("run", saved, optimizer=optimizer) == SPEC
        train(fresh, "run", 3, 4)
        found[kind] = weights(fresh, "run")
    assert torch.equal(found["resumed"], weights(trainer, "run"))
    assert not torch.equal(found["cold"], weights(trainer, "run"))


def test_loading_into_a_live_run_brings_back_its_loss_and_clears_its_gradients(
    trainer: PeftTrainer, saved: Path
) -> None:
    """S1-39: load_state restores a bit-equal loss."""
    before, at = logprobs(trainer, "run"), weights(trainer, "run")
    train(trainer, "run", 3, 2)
    assert not np.array_equal(logprobs(trainer, "run"), before)
    trainer.forward_backward([("run", ask([make_datum(5)]))])
    trainer.load("run", saved, optimizer=True)
    assert np.array_equal(logprobs(trainer, "run"), before)
    assert trainer.optim_step([("run", AdamParams(learning_rate=0))])[0]["grad_norm"] == 0  # type: ignore[index]
    assert torch.equal(weights(trainer, "run"), at)


def test_a_checkpoint_can_start_another_run(trainer: PeftTrainer, saved: Path) -> None:
    trainer.load("copy", saved, optimizer=True)
    for run in ("run", "copy"):
        train(trainer, run, 9, 2)
    assert torch.equal(weights(trainer, "copy"), weights(trainer, "run"))


def test_a_checkpoint_before_the_first_step_resumes_too(qwen3: Path, tmp_path: Path) -> None:
    trainer = PeftTrainer(qwen3)
    trainer.create("run", SPEC)
    trainer.save("run", tmp_path / "new", optimizer=True)
    trainer.load("copy", tmp_path / "new", optimizer=True)
    for run in ("run", "copy"):
        train(trainer, run, 0, 2)
    assert torch.equal(weights(trainer, "copy"), weights(trainer, "run"))


def test_saving_again_replaces_the_directory_and_leaves_nothing_beside(
    trainer: PeftTrainer, saved: Path
) -> None:
    train(trainer, "run", 3, 1)
    trainer.save("run", saved, optimizer=False)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert not (saved / OPTIMIZER).exists()
    trainer.load("copy", saved, optimizer=False)
    assert torch.equal(weights(trainer, "copy"), weights(trainer, "run"))


def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_beside(
    trainer: PeftTrainer, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}

    def no_space(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save", no_space)
    with pytest.raises(OSError, match="No space"):
        trainer.save("run", saved, optimizer=True)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


# ---- damage


def test_only_what_need_not_be_durable_is_saved_without_waiting_for_the_disk(
    trainer: PeftTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of a checkpoint, its directory and the one above; of weights that have no name, nothing."""
    synced: list[int] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), sync(handle))[1])
    trainer.save("run", tmp_path / "fast", optimizer=False, durable=False)
    assert not synced
    trainer.save("run", tmp_path / "safe", optimizer=False)
    assert len(synced) == 5
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "safe" / name).read_bytes()


def test_a_directory_is_verified_without_its_base_model(trainer: PeftTrainer, tmp_path: Path) -> None:
    """vllm#18372: whoever only passes a path on learns first whether it can be used."""
    good = tmp_path / "good"
    trainer.save("run", good, optimizer=False)
    checkpoint.verify(good, base_name="tiny/qwen3", max_rank=SPEC.rank)
    with pytest.raises(UserError, match="trained on another base model"):
        checkpoint.verify(good, base_name="other", max_rank=SPEC.rank)
    with pytest.raises(UserError, match="max_lora_rank"):
        checkpoint.verify(good, base_name="tiny/qwen3", max_rank=SPEC.rank - 1)
    with pytest.raises(UserError, match="not a PEFT adapter directory"):
        checkpoint.verify(tmp_path, base_name="tiny/qwen3", max_rank=SPEC.rank)
    flip(good / "adapter_model.safetensors")
    with pytest.raises(UserError, match="changed or damaged"):
        checkpoint.verify(good, base_name="tiny/qwen3", max_rank=SPEC.rank)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def edit(file: Path) -> None:
    manifest = json.loads(file.read_text())
    manifest["step"] += 1
    file.write_text(json.dumps(manifest))


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights truncated": (lambda d: truncate(d / WEIGHTS), WEIGHTS),
    "weights flipped": (lambda d: flip(d / WEIGHTS), WEIGHTS),
    "weights missing": (lambda d: (d / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "optimizer truncated": (lambda d: truncate(d / OPTIMIZER), OPTIMIZER),
    "optimizer flipped": (lambda d: flip(d / OPTIMIZER), OPTIMIZER),
    "optimizer missing": (lambda d: (d / OPTIMIZER).unlink(), f"{OPTIMIZER} is missing"),
    "files swapped": (lambda d: swap(d / WEIGHTS, d / OPTIMIZER), WEIGHTS),
    "config edited": (lambda d: (d / CONFIG).write_text((d / CONFIG).read_text().replace("4", "5")), CONFIG),
    "config missing": (lambda d: (d / CONFIG).unlink(), CONFIG),
    "manifest edited": (lambda d: edit(d / MANIFEST), MANIFEST),
    "manifest truncated": (lambda d: truncate(d / MANIFEST), MANIFEST),
    "manifest of another": (lambda d: (d / MANIFEST).write_text("[]"), MANIFEST),
    "directory missing": (lambda d: shutil.rmtree(d), "not on the server's disk any more"),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_refused_before_anything_is_touched(
    trainer: PeftTrainer, saved: Path, damage: Callable[[Path], object], named: str
) -> None:
    """F12: the reason is named, the live run goes on as it was."""
    damage(saved)
    assert_refused(trainer, saved, named)


def assert_refused(trainer: PeftTrainer, source: Path, named: str, *, optimizer: bool = True) -> None:
    trainer.forward_backward([("run", ask([make_datum(5)]))])
    before, grads = weights(trainer, "run"), trainer.bank["run"].grads
    assert grads is not None
    kept = grads.clone()
    for run in ("run", "another"):
        with pytest.raises(UserError) as refusal:
            trainer.load(run, source, optimizer=optimizer)
        assert named in refusal.value.message
        assert refusal.value.message.startswith("checkpoint: ")
    assert torch.equal(weights(trainer, "run"), before)
    assert torch.equal(grads, kept)
    assert "another" not in trainer.bank


def test_a_checkpoint_of_another_base_model_is_refused(trainer: PeftTrainer, tmp_path: Path) -> None:
    """F12: same geometry, other weights; both models are named."""
    other = PeftTrainer(make_model(tmp_path / "m", seed=9), name="tiny/other")
    other.create("run", SPEC)
    other.save("run", tmp_path / "theirs", optimizer=True)
    assert_refused(trainer, tmp_path / "theirs", "another base model (tiny/other), not on tiny/qwen3")


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (LoraSpec(rank=5, alpha=8, seed=1), "rank is 5, the run has 4"),
        (LoraSpec(rank=4, alpha=9, seed=1), "alpha is 9, the run has 8"),
        (LoraSpec(rank=4, alpha=8, seed=1, train_mlp=False), "target_modules do not fit"),
    ],
)
def test_a_checkpoint_of_another_geometry_is_refused_by_a_live_run(
    qwen3: Path, trainer: PeftTrainer, tmp_path: Path, spec: LoraSpec, named: str
) -> None:
    """F12: wrong rank, alpha or target modules."""
    other = PeftTrainer(qwen3)
    other.create("run", spec)
    other.save("run", tmp_path / "theirs", optimizer=True)
    before = weights(trainer, "run")
    with pytest.raises(UserError, match=named):
        trainer.load("run", tmp_path / "theirs", optimizer=True)
    assert torch.equal(weights(trainer, "run"), before)
    assert trainer.load("another", tmp_path / "theirs", optimizer=True) == spec


def test_a_rank_over_the_servers_limit_is_refused(qwen3: Path, saved: Path) -> None:
    with pytest.raises(UserError, match="rank must be from 1 to 3"):
        PeftTrainer(qwen3, max_rank=3).load("run", saved, optimizer=False)


def test_a_checkpoint_without_optimizer_loads_as_weights_only(trainer: PeftTrainer, tmp_path: Path) -> None:
    trainer.save("run", tmp_path / "light", optimizer=False)
    assert_refused(trainer, tmp_path / "light", "saved without its optimizer")
    trainer.load("copy", tmp_path / "light", optimizer=False)
    assert torch.equal(weights(trainer, "copy"), weights(trainer, "run"))


# ---- adapters made elsewhere


def made_elsewhere(qwen3: Path, target: Path, **config: object) -> Path:
    options = {"r": 6, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peft = get_peft_model(
            AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32),
            LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options),  # type: ignore[arg-type]
        )
    peft.save_pretrained(target)
    return target


def test_a_peft_directory_made_elsewhere_can_be_trained_on(
    qwen3: Path, trainer: PeftTrainer, tmp_path: Path
) -> None:
    source = made_elsewhere(qwen3, tmp_path / "theirs")
    spec = trainer.load("new", source, optimizer=False)
    assert (spec.rank, spec.alpha) == (6, 3.0)
    assert (spec.train_attn, spec.train_mlp, spec.train_unembed) == (True, False, False)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float32), source)
    theirs = target_logprobs(peft.eval(), make_datum(20)).detach().numpy()
    np.testing.assert_allclose(logprobs(trainer, "new"), theirs, rtol=1e-5, atol=1e-5)
    train(trainer, "new", 0, 1)
    trainer.save("new", tmp_path / "ours", optimizer=True)
    trainer.load("again", tmp_path / "ours", optimizer=True)
    assert torch.equal(weights(trainer, "again"), weights(trainer, "new"))
    assert_refused(trainer, source, "no manifest")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_refused_by_name(
    qwen3: Path, trainer: PeftTrainer, tmp_path: Path, config: dict[str, object], named: str
) -> None:
    source = made_elsewhere(qwen3, tmp_path / "theirs", **config)
    assert_refused(trainer, source, named, optimizer=False)


def test_an_adapter_of_another_model_is_refused(trainer: PeftTrainer, tmp_path: Path) -> None:
    wider = make_model(tmp_path / "wide", hidden=128)
    source = made_elsewhere(wider, tmp_path / "theirs")
    with pytest.raises(UserError, match="the run needs"):
        trainer.load("new", source, optimizer=False)
    assert "new" not in trainer.bank


def test_numbers_that_are_not_finite_are_refused(qwen3: Path, trainer: PeftTrainer, tmp_path: Path) -> None:
    source = made_elsewhere(qwen3, tmp_path / "theirs")
    tensors = safetensors.torch.load_file(source / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    safetensors.torch.save_file(tensors, source / WEIGHTS)
    assert_refused(trainer, source, "not finite", optimizer=False)


def test_pickled_weights_are_never_read(qwen3: Path, trainer: PeftTrainer, tmp_path: Path) -> None:
    source = made_elsewhere(qwen3, tmp_path / "theirs")
    (source / WEIGHTS).rename(source / "adapter_model.bin")
    assert_refused(trainer, source, WEIGHTS, optimizer=False)


def test_errors_of_checkpoints_are_the_users(saved: Path, trainer: PeftTrainer) -> None:
    flip(saved / WEIGHTS)
    with pytest.raises(TuftError) as refusal:
        checkpoint.read(saved, trainer.base, optimizer=False)
    assert refusal.value.category == "user"
