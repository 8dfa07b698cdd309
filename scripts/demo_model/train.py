"""Trains the demo model from nothing and writes its directory: `python -m scripts.demo_model.train`.

Knows the corpus and the tokenizer, not the product. Promises: each step's rows are a function of seed and
step, so a run that was stopped and is started again with the same arguments goes on from its last saved
state as if it had not stopped; every file in the model directory is replaced whole or not at all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from . import data, evaluate
from .tokenizer import train_tokenizer

_ROW = 256  # tokens


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A fresh Qwen3 of 4 layers x 256, about 3.7 million parameters, embeddings tied."""
    torch.manual_seed(seed)
    end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids([data.TURN_END, data.END_OF_TEXT])
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_of_turn,
        pad_token_id=end_of_text,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text, do_sample=True, temperature=0.7
    )
    return model


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 100 steps, then `peak`, then over the last quarter of `steps` a cosine down to zero.

    Until that decay begins it does not depend on `steps`, so a run can be made longer while it is going.
    """
    decay = steps // 4
    left = min(1.0, (steps - step) / max(1, decay))
    return peak * min(1.0, (step + 1) / 100) * 0.5 * (1 - math.cos(math.pi * left))


def build_optimizers(model: Qwen3ForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms.

    Muon is scaled to AdamW's update size, so one learning rate serves both. It needs about half of
    AdamW's steps for the same held-out loss, which on a CPU is worth its dearer step.
    """
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = set(map(id, inner))
    outer = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inner, lr=peak, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=peak, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def export(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes model (bf16) and tokenizer to `out`; each file replaces its predecessor atomically."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as staged:
        half = Qwen3ForCausalLM(model.config)
        half.load_state_dict(model.state_dict())
        half.generation_config = model.generation_config
        half.bfloat16().save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        settings = Path(staged, "tokenizer_config.json")
        loaded = json.loads(settings.read_text())
        loaded["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 and 5 both know
        settings.write_text(json.dumps(loaded, indent=2, sort_keys=True) + "\n")
        for file in sorted(Path(staged).iterdir()):
            file.chmod(0o644)
            file.replace(out / file.name)


def report(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> None:
    """Prints held-out loss and the share of right answers, `count` questions of each kind."""
    print(f"held-out loss {evaluate.held_out_loss(model, tokenizer):.4f} nats per token", flush=True)
    print(f"facts {evaluate.fact_accuracy(model, tokenizer, 3 * count):.2f}", flush=True)
    scores = evaluate.task_accuracies(model, tokenizer, count)
    print("tasks " + ", ".join(f"{name} {score:.2f}" for name, score in scores.items()), flush=True)


def _save_state(path: Path, state: dict[str, object]) -> None:
    draft = path.with_suffix(".tmp")
    torch.save(state, draft)
    draft.replace(path)


def train(args: argparse.Namespace) -> None:
    """Runs from the last state in `args.work` (or from nothing) to `args.steps`; writes `args.out`."""
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(
        itertools.islice(data.documents(f"tokenizer {args.seed}"), args.tokenizer_documents)
    )
    model = build_model(tokenizer, args.seed).train()
    optimizers = build_optimizers(model, args.learning_rate)
    state_file = args.work / "state.pt"
    first, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, spent = state["step"], state["seconds"]
        print(f"goes on at step {first}", flush=True)
    started = time.monotonic() - spent
    last = min(args.steps, first + args.stop_after) if args.stop_after else args.steps
    for step in range(first, last):
        for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
            group["lr"] = learning_rate(step, args.steps, args.learning_rate)
        ids_BT = evaluate.packed_rows(tokenizer, f"train {args.seed}/{step}", args.rows, _ROW)
        with torch.autocast("cpu", torch.bfloat16):
            loss = evaluate.row_loss(model, ids_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        done, seconds = step + 1, time.monotonic() - started
        if done % 50 == 0 or done == last:
            tokens = done * args.rows * _ROW
            print(f"step {done} loss {loss.item():.4f} tokens {tokens} seconds {seconds:.0f}", flush=True)
        if done % args.save_every == 0 or done == last:
            _save_state(
                state_file,
                {
                    "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "step": done,
                    "seconds": seconds,
                },
            )
            export(model, tokenizer, args.out)
            if args.questions:
                written = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.float32)
                report(written, tokenizer, args.questions)


def main(argv: list[str] | None = None) -> None:
    """Reads the command line (`argv`, or the process's own) and trains."""
    here = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description="Train the demo model from nothing.")
    add = parser.add_argument
    add("--out", type=Path, default=here / "tuft_jupyter" / "demo", help="model directory to write")
    add("--work", type=Path, default=here / "build" / "demo_model", help="where the state is kept")
    add("--seed", type=int, default=1)
    add("--steps", type=int, default=3000, help="length of the whole run")
    add("--stop-after", type=int, help="steps of this call; the next call with the same --work goes on")
    add("--save-every", type=int, default=250, help="steps between saved states")
    add("--rows", type=int, default=8, help=f"rows of {_ROW} tokens in one step")
    add("--learning-rate", type=float, default=2e-3, help="at its peak")
    add("--tokenizer-documents", type=int, default=30_000, help="documents that the tokenizer is trained on")
    add("--questions", type=int, default=64, help="questions of each kind in a report; 0: no report")
    add("--quick", action="store_true", help="sizes so small that they only show that everything runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.rows, args.tokenizer_documents = 3, 1, 200
    train(args)


if __name__ == "__main__":
    main()
