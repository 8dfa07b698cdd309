"""How good the demo model is: held-out loss in nats per token, and the share of right greedy answers.

Knows nothing of training. Promises the same prompts on every call, drawn apart from the training stream.
"""

from __future__ import annotations

import math
from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import data, tasks
from .facts import facts

# Shapes: B rows, T tokens.
HELD_OUT_SEED = "held-out"
_SHORT = 24  # tokens; every checked answer is shorter


def packed_rows(tokenizer: PreTrainedTokenizerBase, seed: str, count: int, length: int) -> Tensor:
    """`count` rows of `length` token ids: int64 [B, T].

    Each row starts with a document; its last document may be cut off.
    """
    stream = data.documents(seed)
    rows: list[list[int]] = []
    row: list[int] = []
    while len(rows) < count:
        row += tokenizer.encode(next(stream), add_special_tokens=False)
        if len(row) >= length:
            rows.append(row[:length])
            row = []
    return torch.tensor(rows)


def row_loss(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Mean next-token cross-entropy of `ids_BT`, in nats."""
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int = 32) -> float:
    """Loss on text that the training stream does not hold. Uniform guessing scores ln(vocabulary)."""
    ids_BT = packed_rows(tokenizer, HELD_OUT_SEED, rows, 256)
    return math.fsum(row_loss(model, chunk).item() * len(chunk) for chunk in ids_BT.split(8)) / rows


@torch.no_grad()
def replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    max_new_tokens: int = _SHORT,
) -> list[str]:
    """The greedy reply to each question, as the only user message of its own chat."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in questions
    ]
    out: list[str] = []
    for start in range(0, len(prompts), 64):
        batch = tokenizer(prompts[start : start + 64], return_tensors="pt", padding=True, padding_side="left")
        ids_BT = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
        out += tokenizer.batch_decode(ids_BT[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [reply.strip() for reply in out]


def fact_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 100) -> float:
    """Share of questions about the closed world whose greedy reply holds the key word."""
    rng = Random("fact accuracy")
    chosen = rng.sample(facts(), count)
    answers = replies(model, tokenizer, [rng.choice(fact.questions) for fact in chosen])
    return sum(fact.key.lower() in reply.lower() for fact, reply in zip(chosen, answers, strict=True)) / count


def task_accuracies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int = 64,
    names: tuple[str, ...] = tasks.NAMES,
) -> dict[str, float]:
    """Share of right greedy answers for each kind of task."""
    result = {}
    for name in names:
        rng = Random(f"task accuracy {name}")
        chosen = [tasks.make(name, rng) for _ in range(count)]
        answers = replies(model, tokenizer, [task.question for task in chosen])
        result[name] = sum(map(tasks.reward, chosen, answers)) / count
    return result
