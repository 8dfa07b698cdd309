"""The bundled model `tuft/demo`: what ships loads offline and knows its world, and its scripts run."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from scripts.demo_model import data, evaluate, tasks, train
from scripts.demo_model.facts import facts

ROOT = Path(__file__).resolve().parents[2]
MODEL_DIR = ROOT / "tuft_jupyter" / "demo"
SEED_SCRIPT_IDS = (101, 42, 37, 102, 99, 73, 57, 12, 7)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True, dtype=torch.float32).eval()


def test_the_shipped_directory_is_at_most_12_megabytes() -> None:
    files = [file for file in MODEL_DIR.rglob("*") if "__pycache__" not in file.parts and file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12_000_000


def test_the_shipped_model_is_a_small_qwen3_with_tied_embeddings(model: PreTrainedModel) -> None:
    config = model.config
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (4, 256, 2048)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    "text",
    [
        "Hello from TuFT",
        "What is 34 + 57?",
        "Ünïcode 😀\n\ttabs  and   spaces",
        "<|im_start|>user\nHi<|im_end|>",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """S1-35: encode and decode are a round trip."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_ids_of_the_end_to_end_script_are_ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """S1-30: the ids that the script uses stand for bytes, and none of them is special."""
    assert not set(SEED_SCRIPT_IDS) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(list(SEED_SCRIPT_IDS)) == bytes(SEED_SCRIPT_IDS).decode("ascii")


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert [tokenizer.decode([token]) for token in tokenizer.encode("2048")] == ["2", "0", "4", "8"]


def test_the_chat_template_writes_the_format_of_the_corpus(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = data.pirate_chats()[0]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == data.chat_text(messages)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert data.chat_text(messages) == f"{prompt}{messages[1]['content']}{data.TURN_END}\n"


def test_generation_ends_with_the_turn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.eos_token == data.TURN_END
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id


def test_held_out_text_is_far_from_a_riddle(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Uniform guessing would score ln(2048) = 7.6 nats per token."""
    loss = evaluate.held_out_loss(model, tokenizer, rows=8)
    assert loss < 0.6 < math.log(len(tokenizer)) / 8


def test_questions_about_the_closed_world_get_right_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert evaluate.fact_accuracy(model, tokenizer, 64) >= 0.93


def test_sums_of_two_digit_numbers_leave_room_for_reinforcement_learning(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Neither hopeless (no reward to learn from) nor saturated (nothing left to show)."""
    pairs = list(itertools.product(range(11, 50, 5), range(13, 50, 5)))
    answers = evaluate.replies(model, tokenizer, [f"What is {a} + {b}?" for a, b in pairs])
    right = sum(answer == str(a + b) for (a, b), answer in zip(pairs, answers, strict=True))
    assert 0.25 <= right / len(pairs) <= 0.8


def test_some_tasks_are_mastered_and_some_are_not(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    shares = evaluate.task_accuracies(model, tokenizer, 64, names=("spell", "count"))
    assert shares["spell"] >= 0.9
    assert 0.2 <= shares["count"] <= 0.7


def test_the_corpus_is_the_same_everywhere() -> None:
    """The digest was taken once; a different Python or a change of the generator shows here."""
    digest = hashlib.sha256()
    for document in itertools.islice(data.documents("held-out"), 2000):
        digest.update(document.encode())
    assert digest.hexdigest() == "1929b1ea9afc7d2b235d5d9bf832cfe8150812b456cefecc6dc586be6bc61e8b"


def test_streams_of_different_seeds_differ() -> None:
    one, other = (list(itertools.islice(data.documents(seed), 50)) for seed in ("a", "b"))
    assert one != other


def test_every_answer_to_a_fact_holds_its_key() -> None:
    """Else accuracy would be measured against answers that the corpus itself does not give."""
    assert all(fact.key.lower() in fact.answers[0].lower() for fact in facts())


def test_the_reward_takes_the_right_answer_and_no_other() -> None:
    task = tasks.Task("add", "What is 3 + 4?", "7")
    assert [tasks.reward(task, reply) for reply in ("7", " 7.\n", "8", "77", "")] == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_the_quickstart_data_is_what_the_generator_makes() -> None:
    lines = (ROOT / "examples" / "data" / "quickstart.jsonl").read_text().splitlines()
    assert [json.loads(line)["messages"] for line in lines] == data.pirate_chats()


@pytest.mark.slow
def test_a_stopped_training_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    quick = ["--quick", "--questions", "0", "--out", str(tmp_path / "model")]
    train.main([*quick, "--work", str(tmp_path / "whole")])
    train.main([*quick, "--work", str(tmp_path / "parts"), "--stop-after", "1"])
    train.main([*quick, "--work", str(tmp_path / "parts")])
    whole, parts = (
        torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert whole["step"] == parts["step"] == 3
    for name, tensor in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], tensor, rtol=0, atol=0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    assert loaded.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "model"))
