"""The tokenizer of the demo model: byte-level BPE with a ChatML template, trained on the corpus.

Knows nothing of the model. Promises that ids 0 to 255 are the bytes of that value (so that every small id
is an ordinary token), that merges follow in the order in which they were learnt, that the last ids are the
special tokens, and that digits are never merged. The pre-tokenizer is the one of the Qwen3 family, so that
any loader which rebuilds a Qwen tokenizer from vocabulary and merges arrives at the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .data import END_OF_TEXT, TURN_END, TURN_START

VOCAB_SIZE = 2048
_SPECIAL = (END_OF_TEXT, TURN_START, TURN_END)
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def _byte_characters() -> list[str]:
    """The printable character of each byte value in byte-level BPE (the table of GPT-2)."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _assemble(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocab_size` ids (or fewer, where `texts` holds too few pairs to merge)."""
    plain = (piece for text in texts for piece in _without_special(text))
    draft = _assemble(models.BPE())
    draft.train_from_iterator(
        plain,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(_SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    merges = [tuple(merge) for merge in json.loads(draft.to_str())["model"]["merges"]]
    words = [*_byte_characters(), *("".join(merge) for merge in merges)]
    tokenizer = _assemble(
        models.BPE(vocab={word: i for i, word in enumerate(dict.fromkeys(words))}, merges=merges)
    )
    tokenizer.add_special_tokens(list(_SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=_TEMPLATE,
    )


def _without_special(text: str) -> list[str]:
    for special in _SPECIAL:
        text = text.replace(special, "\0")
    return [piece for piece in text.split("\0") if piece]
