"""tinker-cookbook's recipes, as they are, against a server with the demo model: ``make recipes`` prints the table.

The cookbook has an environment of its own: a directory with its release from the registry, and with whatever it needs
that is not installed here, put before the packages of the environment this runs in. What a recipe looks up by name is
there by configuration alone: the server offers the demo model under a name that the cookbook knows, the tokenizer is
laid into the Hugging Face cache as ``tuft_jupyter.init()`` does, and the data sets are directories of the recipe's
working directory, where ``datasets`` looks before it asks any hub.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from examples.run_on_server import Server
from tests.support.live import TO_THE_END, environment, key_of
from tests.support.sdk_matrix import met, pip

VERSION = "0.6.1"
EXTRAS = ("", "math-rl")
NOT_NEEDED = "tml-renderers"
"""Of one vendor's own model families; the cookbook imports it when such a model is asked for."""

PLACE = Path(sys.prefix) / ".cookbook" / VERSION
ROWS = 320
KNOWN, TEACHER = "Qwen/Qwen3-8B-Base", "tuft/demo"
CONFIGURATION = f"""\
supported_models:
  - model_name: {KNOWN}
    model_path: tuft/demo
    max_lora_rank: 32
  - model_name: {TEACHER}
    max_lora_rank: 32
"""


@dataclass(frozen=True)
class Recipe:
    """``module`` is run with ``arguments``; ``holds`` is what must be true of its ``metric``, a number for each step.

    ``after`` names the recipe whose last checkpoint it starts from: an untaught model is never rewarded.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    metric: str
    holds: Callable[[list[float]], bool]
    uses: str
    after: str = ""


@dataclass(frozen=True)
class Report:
    recipe: Recipe
    seconds: float
    metrics: tuple[Mapping[str, Any], ...] = field(repr=False)
    checkpoints: tuple[Mapping[str, Any], ...] = field(repr=False)

    @property
    def values(self) -> list[float]:
        return [row[self.recipe.metric] for row in self.metrics if self.recipe.metric in row]

    @property
    def passed(self) -> bool:
        return all(map(math.isfinite, self.values)) and self.recipe.holds(self.values)


def falls(values: list[float]) -> bool:
    return len(values) > 1 and values[-1] < values[0]


def some_reward(values: list[float]) -> bool:
    """Some answers were right and some were not, so that there was something to train on."""
    return len(values) > 1 and any(0 < value < 1 for value in values)


def starts_at_chance(values: list[float]) -> bool:
    """Before the first step policy and reference agree, so the loss of DPO is ln 2: two engines, one number."""
    return falls(values) and abs(values[0] - math.log(2)) < 1e-4


def starts_at_the_teacher(values: list[float]) -> bool:
    return len(values) > 1 and abs(values[0]) < 1e-3


ROLE_COLON = "renderer_name=role_colon"
RECIPES = (
    Recipe(
        "sl_loop", "recipes.sl_loop",
        (f"model_name={KNOWN}", "lora_rank=16", "batch_size=16", "learning_rate=5e-3", "max_length=256",
         "save_every=10"),
        "train_mean_nll", falls, "cross_entropy, checkpoints with a TTL",
    ),
    Recipe(
        "rl_loop", "recipes.rl_loop",
        (f"model_name={KNOWN}", "batch_size=4", "group_size=8", "max_tokens=16", "max_steps=2",
         "loss_fn=importance_sampling"),
        "reward/total", some_reward, "importance_sampling, ephemeral samplers, resuming with the optimizer",
        after="sl_loop",
    ),
    Recipe(
        "chat_sl", "recipes.chat_sl.train",
        (f"model_name={TEACHER}", ROLE_COLON, "lora_rank=8", "batch_size=8", "learning_rate=1e-3",
         "max_length=256", "max_steps=3", "eval_every=2", "save_every=2", "rolling_save_every=1"),
        "train_mean_nll", falls, "evaluation, rolling checkpoints, the end of a session",
    ),
    Recipe(
        "rl_basic", "recipes.rl_basic",
        (f"model_name={KNOWN}", "lora_rank=16", "max_tokens=16", "max_steps=2", "save_every=1",
         "dataset_builder=Gsm8kDatasetBuilder", "dataset_builder.batch_size=4", "dataset_builder.group_size=8",
         f"dataset_builder.model_name_for_tokenizer={KNOWN}", f"dataset_builder.{ROLE_COLON}"),
        "env/all/correct", some_reward, "importance_sampling, asynchronous rollouts, loading weights",
        after="sl_loop",
    ),
    Recipe(
        "dpo", "recipes.preference.dpo.train",
        (f"model_name={TEACHER}", ROLE_COLON, "batch_size=8", "learning_rate=1e-3", "max_length=256",
         "max_steps=3"),
        "dpo_loss", starts_at_chance, "forward_backward_custom, compute_logprobs of a reference",
    ),
    Recipe(
        "on-policy distillation", "recipes.distillation.on_policy_distillation",
        (f"model_name={KNOWN}", f"teacher_model={TEACHER}", ROLE_COLON, "lora_rank=8", "groups_per_batch=4",
         "group_size=2", "max_tokens=16", "max_steps=2", "eval_every=0", "save_every=1"),
        "teacher_kl", starts_at_the_teacher, "two base models, compute_logprobs of a teacher",
    ),
)  # fmt: skip


def cookbook() -> Path:
    """The directory to import the cookbook from; made if it is not there."""
    if not PLACE.exists():
        fresh = PLACE.with_name(f"{VERSION}.{os.getpid()}")
        pip("install", "--quiet", "--no-deps", "--target", os.fspath(fresh), f"tinker-cookbook=={VERSION}")
        (found,) = distributions(name="tinker-cookbook", path=[os.fspath(fresh)])
        wanted = [Requirement(text) for text in found.requires or ()]
        bare = [
            Requirement(f"{need.name}{need.specifier}")
            for need in wanted
            if need.name != NOT_NEEDED and applies(need)
        ]
        missing = [str(need) for need in bare if not met(need)]
        pip("install", "--quiet", "--target", os.fspath(fresh), *missing)
        fresh.rename(PLACE)
    return PLACE


def applies(need: Requirement) -> bool:
    return need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in EXTRAS)


def make_data(work: Path) -> None:
    """The data sets that the recipes name, in miniature and in their own columns, below the working directory."""
    draw = random.Random(7)
    suffix = " Provide a numerical answer without units, written inside \\boxed{}."
    sums = [(f"What is {a} plus {b}?", a + b) for a, b in (draw.choices((1, 2), k=2) for _ in range(ROWS))]
    chats = [{"messages": chat(q + suffix, f"\\boxed{{{n}}}")} for q, n in sums]
    preferred = [
        {side: f"\n\nHuman: {q}\n\nAssistant: {said}" for side, said in (("chosen", n), ("rejected", "No."))}
        for q, n in sums
    ]
    problems = [{"question": q, "answer": f"Add them.\n#### {n}"} for q, n in sums]
    write(work / "HuggingFaceH4" / "no_robots", train=chats, test=chats[:8])
    write(work / "Anthropic" / "hh-rlhf", train=preferred, test=preferred[:8])
    write(work / "zwhe99" / "DeepMath-103K", train=[{"question": q} for q, _ in sums])
    gsm8k = work / "openai" / "gsm8k"
    write(gsm8k / "main", train=problems, test=problems[:8])
    (gsm8k / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - split: train\n    path: main/train.jsonl\n  - split: test\n    path: main/test.jsonl\n---\n"
    )


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(directory: Path, **splits: Iterable[Mapping[str, Any]]) -> None:
    directory.mkdir(parents=True)
    for split, rows in splits.items():
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lay_tokenizers(env: Mapping[str, str], work: Path) -> None:
    """What ``%tuft init`` does before a notebook's first ``get_tokenizer()``."""
    done = subprocess.run(
        [*TO_THE_END, "-c", "import tuft_jupyter; tuft_jupyter.init()"],
        env=dict(env), cwd=work, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"init() failed:\n{done.stdout}{done.stderr}")


def run(recipe: Recipe, env: Mapping[str, str], work: Path) -> Report:
    """Run a recipe to its end. RuntimeError with what it printed last if it fails."""
    log = log_of(recipe.name, work)
    arguments = [f"log_path={log}", *recipe.arguments, *start(recipe, log, work)]
    began = time.monotonic()
    done = subprocess.run(
        [*TO_THE_END, "-m", f"tinker_cookbook.{recipe.module}", *arguments],
        env={**env, "PYTHONPATH": os.fspath(cookbook())},
        cwd=work, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{recipe.name} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    return Report(
        recipe, time.monotonic() - began, lines(log / "metrics.jsonl"), lines(log / "checkpoints.jsonl")
    )


def start(recipe: Recipe, log: Path, work: Path) -> list[str]:
    """What makes it begin with the weights of another recipe: an argument, or for a loop the log of a run before."""
    if not recipe.after:
        return []
    path = lines(log_of(recipe.after, work) / "checkpoints.jsonl")[-1]["state_path"]
    if recipe.name != "rl_loop":
        return [f"load_checkpoint_path={path}"]
    log.mkdir(parents=True)
    (log / "checkpoints.jsonl").write_text(
        json.dumps({"name": "start", "batch": 0, "state_path": path}) + "\n"
    )
    return []


def log_of(name: str, work: Path) -> Path:
    return work / "logs" / name.replace(" ", "-")


def lines(path: Path) -> tuple[Mapping[str, Any], ...]:
    return tuple(json.loads(line) for line in path.read_text().splitlines()) if path.exists() else ()


class Kitchen:
    """A server with the demo model under two names, and a working directory with the recipes' data."""

    def __init__(self, home: Path) -> None:
        self.work = home / "work"
        self.work.mkdir(parents=True)
        make_data(self.work)
        configuration = home / "tuft_config.yaml"
        configuration.write_text(CONFIGURATION)
        self.env = environment(home, TUFT_CONFIG=os.fspath(configuration), HF_HUB_OFFLINE="1")
        self.server = Server(home, home, base_url="/user/alice/", env=self.env)

    def __enter__(self) -> Callable[[Recipe], Report]:
        self.server.start()
        address, key = f"{self.server.url}tuft", key_of(self.server.work)
        env = {**self.env, "TUFT_ADDRESS": address, "TUFT_API_KEY": key}
        env |= {"TINKER_BASE_URL": address, "TINKER_API_KEY": key}
        lay_tokenizers(env, self.work)
        return lambda recipe: run(recipe, env, self.work)

    def __exit__(self, *_: object) -> None:
        self.server.stop()


def main() -> None:
    failed = False
    print("| recipe | runs | seconds | what it uses |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as work, Kitchen(Path(work)) as cook:
        for recipe in RECIPES:
            try:
                report = cook(recipe)
                works, seconds = report.passed, f"{report.seconds:.0f}"
                if not works:
                    print(f"{recipe.name}: {recipe.metric} = {report.values}", file=sys.stderr)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"{recipe.name}:\n{error}", file=sys.stderr)
                works, seconds = False, "-"
            failed |= not works
            print(
                f"| {recipe.name} | {'yes' if works else '**no**'} | {seconds} | {recipe.uses} |", flush=True
            )
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
