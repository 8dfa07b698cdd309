"""The engine on a GPU, as far as a machine without one can tell: nothing mixes devices, and the numbers are a CPU's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import pretend_gpu as pretend
from tests.support.adapters import make_adapter
from tests.support.datums import ask as ask_for
from tests.support.datums import make_datum, make_policy_datum
from tests.support.losses import clipped, custom, graph_of
from tests.support.pretend_gpu import A100, H100, T4, pretend_gpu
from tests.support.sampling import ask, prompt, run, tokens_of
from tests.support.tiny_models import SCALED, make_model
from tests.support.training import ok, step
from tuft_jupyter.core.types import (
    ForwardBackward,
    LoraSpec,
    ModelCard,
    SampleRequest,
    SampleResult,
    TargetIds,
)
from tuft_jupyter.engine import grouped
from tuft_jupyter.engine.passes import Item
from tuft_jupyter.engine.ray_actors import GPU_PART_TOKENS, ActorOptions, TrainingActor
from tuft_jupyter.engine.torch_sampler import TorchSampler
from tuft_jupyter.engine.trainer import PeftTrainer

pytestmark = pytest.mark.slow

EVERYWHERE = LoraSpec(rank=8, alpha=8, seed=1)
ATTENTION = LoraSpec(rank=8, alpha=16, seed=2, train_mlp=False)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gemma": {},
    "mistral": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": SCALED["gemma2"],
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
}
BY_KERNEL = ("gemma", "mistral")  # the variable-length one, with and without a window
HALF = (*BY_KERNEL, "gemma2")
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """What was found out of one GPU does not hold for the next."""
    grouped._has_kernel.cache_clear()
    yield
    grouped._has_kernel.cache_clear()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    home = tmp_path_factory.mktemp("family")
    return request.param, make_model(
        home, request.param, spread=0.05, max_length=96, **FAMILIES[request.param]
    )


def requests(turn: int) -> list[ForwardBackward]:
    """One of every kind, of several lengths, most with a prompt that has no loss."""
    half = {"weights": np.repeat(np.float32([0, 1]), 5)}
    advantages = {"old": np.full(7, -6, np.float32), "advantages": np.arange(7, dtype=np.float32) - 3}
    several = {"weights": np.ones((5, 3), np.float32), "target_tokens": np.arange(15).reshape(5, 3) * 7}
    graph = graph_of(clipped, {"logprobs": 1, "old": 1, "advantages": 1, "eps": 0})
    return [
        ask_for([make_datum(10, seed=turn, **half), make_datum(6, seed=turn)]),
        *(ask_for([make_policy_datum(8)], name) for name in ("importance_sampling", "ppo", "cispo", "dro")),
        ask_for([make_policy_datum(8, sequence_ratio_mask=np.ones(8, np.float32))], "gspo"),
        ask_for([make_datum(5, **several)]),
        ask_for([make_datum(7)], backward=False),
        custom(graph, [make_datum(7, eps=np.float32([0.1]), **advantages)]),
    ]


class OneTry(PeftTrainer):
    """Runs nothing again, one by one, that failed together: that would hide it."""

    def _guarded(self, batch: Sequence[Item], *, halved: bool = False) -> Any:
        return self._together(batch, self.micro_batch_tokens, recompute=halved)


def trained(model: Path, specs: dict[str, LoraSpec], home: Path, **options: Any) -> list[float]:
    """What a trainer with room for no idle run says of two steps of ``a`` and ``b``, saved and read again."""
    trainer = OneTry(model, custom_loss=True, adapter_bytes=(0, 1 << 20), **options)
    told = []
    for name, spec in specs.items():
        trainer.create(name, spec)
    for turn in range(2):
        batch = [*(("a", of) for of in requests(turn)), ("b", requests(turn)[0])]
        for result in trainer.forward_backward(batch):
            told += [ok(result).loss_sum, *(float(logprobs.sum()) for logprobs in ok(result).logprobs)]
        told += [step(trainer, name)["grad_norm"] for name in specs]
    for name in specs:
        directory = home / f"{name}-{trainer.base.device.type}"
        trainer.save(name, directory, optimizer=True)
        trainer.load(f"{name} again", directory, optimizer=True)
        told.append(ok(trainer.forward_backward([(f"{name} again", requests(2)[0])])[0]).loss_sum)
        told.append(step(trainer, f"{name} again")["grad_norm"])
    return told


def test_the_pretended_gpu_keeps_the_rules_of_a_real_one() -> None:
    here = torch.ones(4, 4)
    with pretend_gpu() as seen:
        there = here.to("cuda")
        index = torch.tensor([2], device="cuda")
        for refused in (
            lambda: there + here,
            lambda: there @ here,
            lambda: here[index],
            lambda: there.index_select(0, torch.tensor([2])),
            lambda: there.__setitem__((index,), here[:1]),
            lambda: torch.cat([there, here]),
            lambda: there.addmm_(there, here),
            lambda: torch.tensor(1.0).add_(there[0, 0]),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                refused()
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            there.numpy()
        there[1:, 0].copy_(here[0, :3] * 5)  # a view of it, from the CPU
        there[torch.tensor([0]), 1] = 7.0
        there += torch.tensor(1.0)
        assert (there.device, there.is_cuda, torch.zeros_like(there).device) == (
            pretend.GPU,
            True,
            pretend.GPU,
        )
        assert there[:2, :2].tolist() == [[2.0, 8.0], [6.0, 2.0]]
        assert type(there.cpu()) is torch.Tensor
        assert seen["aten::index_put_"] == 1
    assert not torch.cuda.is_available()
    assert here.tolist() == [[1.0] * 4] * 4


def test_nothing_of_a_training_step_mixes_devices_and_the_numbers_are_the_cpus(
    family: tuple[str, Path], tmp_path: Path
) -> None:
    """Every loss, prompts without one, adapters that leave the model and come back, and what is saved and read."""
    name, model = family
    dtype = torch.bfloat16 if name in HALF else torch.float32
    specs = {"a": EVERYWHERE, "b": ATTENTION}
    expected = trained(model, specs, tmp_path, dtype=dtype, device="cpu")
    with pretend_gpu() as seen:
        found = trained(model, specs, tmp_path, dtype=dtype, device="cuda")
    assert found == pytest.approx(expected, rel=LIMIT[dtype], abs=LIMIT[dtype])
    for kernel in ("torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"):
        assert bool(seen[kernel]) is (name in BY_KERNEL)


@pytest.mark.parametrize(
    ("gpu", "attends", "groups"), [(H100, True, True), (A100, True, False), (T4, False, False)]
)
def test_a_gpu_is_given_the_kernels_that_it_has(
    gpu: tuple[int, int], attends: bool, groups: bool, qwen3: Path, tmp_path: Path
) -> None:
    """FlashAttention refuses what is older than Ampere; a grouped matmul is one only on Hopper and on Blackwell."""
    specs = {"a": EVERYWHERE, "b": replace(EVERYWHERE, seed=2)}
    expected = trained(qwen3, specs, tmp_path, dtype=torch.bfloat16, device="cpu")
    with pretend_gpu(gpu) as seen:
        found = trained(qwen3, specs, tmp_path, dtype=torch.bfloat16, device="cuda")
    assert (bool(seen["torch_attn::_varlen_attn"]), bool(seen["aten::_grouped_mm"])) == (attends, groups)
    assert found == pytest.approx(expected, rel=LIMIT[torch.bfloat16], abs=LIMIT[torch.bfloat16])


def test_experts_go_through_grouped_matmuls(tmp_path: Path) -> None:
    """All experts of a layer at once; each adapter's part in each is small."""
    model = make_model(tmp_path / "m", "mixtral", spread=0.05, max_length=96, **FAMILIES["mixtral"])
    specs = {"a": replace(EVERYWHERE, train_attn=False), "b": ATTENTION}
    expected = trained(model, specs, tmp_path, dtype=torch.bfloat16, device="cpu")
    with pretend_gpu(H100) as seen:
        found = trained(model, specs, tmp_path, dtype=torch.bfloat16, device="cuda")
    assert seen["aten::_grouped_mm"]
    assert found == pytest.approx(expected, rel=LIMIT[torch.bfloat16], abs=LIMIT[torch.bfloat16])


def test_long_rows_and_layers_that_are_computed_again(
    family: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuft_jupyter.engine.memory.is_tight", lambda *_: True)
    _, model = family
    batch = [("a", ask_for([make_datum(n, seed=n) for n in (90, 1, 17)]))]

    def told(device: str) -> list[float]:
        trainer = OneTry(model, device=device)
        trainer.create("a", ATTENTION)
        return [number for _ in range(2) for number in (
            ok(trainer.forward_backward(batch)[0]).loss_sum, step(trainer, "a")["grad_norm"]
        )]  # fmt: skip

    expected = told("cpu")
    with pretend_gpu():
        assert told("cuda") == pytest.approx(expected, rel=LIMIT[torch.float32])


def of_every_kind(adapters: list[Path]) -> list[tuple[Path | None, SampleRequest]]:
    """Greedy, warm and filtered, bare and adapted, and all that can be asked of a prompt."""
    scored: dict[str, Any] = {
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 3,
        "topk_sample_logprobs": 2,
    }
    drawn = [
        ask(prompt(3 + 6 * i, seed=i), 1 + i % 2, seed=i, temperature=t, top_k=k, top_p=p, **scored)
        for i, (t, k, p) in enumerate([(0, -1, 1), (1, -1, 1), (0.7, 5, 1), (1.2, -1, 0.8), (0, -1, 1)])
    ]
    cells = TargetIds(np.arange(22), np.repeat(np.arange(11), 2), (11, 2))
    about = replace(ask(prompt(12), seed=3), targets=cells, prompt_alt_tokens_k=4, prompt_logprobs_last_n=3)
    return [*zip([None, *adapters, adapters[0], None], [*drawn[:4], drawn[4], about], strict=False)]


def assert_same_samples(model: Path, adapters: list[Path], **options: Any) -> None:
    jobs = of_every_kind(adapters)
    expected = run(TorchSampler(model, device="cpu", **options), jobs)
    with pretend_gpu():
        found = run(TorchSampler(model, device="cuda", **options), jobs)
    for mine, theirs in zip(found, expected, strict=True):
        assert tokens_of(mine) == tokens_of(theirs)
        for field in ("prompt_logprobs", "topk_prompt_logprobs", "target_prompt_logprobs", "alt_logprobs"):
            if getattr(theirs, field) is not None:
                np.testing.assert_allclose(getattr(mine, field), getattr(theirs, field), atol=1e-4)


def test_nothing_of_sampling_mixes_devices_and_the_tokens_are_the_cpus(
    family: tuple[str, Path], tmp_path: Path
) -> None:
    _, model = family
    modules = ("q_proj", "v_proj")
    paths = [make_adapter(tmp_path / str(i), model, seed=i, rank=2 + i, modules=modules) for i in range(3)]
    assert_same_samples(model, paths)


def test_a_sampler_that_is_short_of_room_mixes_no_devices_either(sampled: Path, adapters: list[Path]) -> None:
    """Prompts in pieces, sequences that are preempted, adapters that wait in host memory."""
    assert_same_samples(sampled, adapters, max_adapters=1, kv_tokens=600, chunk_tokens=16, prefill_tokens=24)


def test_samples_in_half_precision_are_scored_as_on_a_cpu(sampled: Path, adapters: list[Path]) -> None:
    with pretend_gpu() as seen:
        answers = run(TorchSampler(sampled, device="cuda", dtype=torch.bfloat16), of_every_kind(adapters))
    expected = run(TorchSampler(sampled, device="cpu", dtype=torch.bfloat16), of_every_kind(adapters))
    assert seen["torch_attn::_varlen_attn"]
    for mine, theirs in zip(answers, expected, strict=True):
        assert isinstance(mine, SampleResult), mine
        if mine.prompt_logprobs is not None:
            np.testing.assert_allclose(mine.prompt_logprobs, theirs.prompt_logprobs, atol=0.2)


def test_a_worker_takes_the_gpu_and_says_so(qwen3: Path) -> None:
    with pretend_gpu():
        actor = TrainingActor(ActorOptions(ModelCard("m", str(qwen3), 512, 320, "qwen3"), threads=1))
        loaded = actor.load()
        assert (loaded.error, loaded.device, loaded.part_tokens) == ("", "cuda", GPU_PART_TOKENS)
        actor.worker.trainer.create("a", EVERYWHERE)
        assert actor.memory()["a"].model > 0
        assert actor.gpu_bytes() == 0
        actor._check()
