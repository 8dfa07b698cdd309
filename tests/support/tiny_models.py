"""Tiny random models with a byte-level tokenizer, made in a directory in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "phimoe": (PhimoeConfig, PhimoeForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3n": (Gemma3nTextConfig, Gemma3nForCausalLM),
    "cohere": (CohereConfig, CohereForCausalLM),
    "granite": (GraniteConfig, GraniteForCausalLM),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM),
    "ernie4_5": (Ernie4_5Config, Ernie4_5ForCausalLM),
    "ministral3": (Ministral3Config, Ministral3ForCausalLM),
    "olmo": (OlmoConfig, OlmoForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
}
SCALED: dict[str, dict[str, float]] = {
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
    "cohere": {"logit_scale": 0.25},
    "granite": {
        "logits_scaling": 3.0,
        "embedding_multiplier": 4.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
}
"""Families that bend or scale scores or logits, with numbers that matter in a tiny model."""
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Special tokens first, then one token per byte: 259 tokens, every string round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        additional_special_tokens=[SPECIAL[1]],
        chat_template=CHAT_TEMPLATE,
    )


def make_model(
    directory: Path,
    family: str = "qwen3",
    *,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 128,
    vocab: int = 320,
    max_length: int = 512,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 0.2,
    **extra: Any,
) -> Path:
    """Write a random model (4 query heads, 2 key/value heads) with its tokenizer; ``family`` as in FAMILIES.

    ``extra`` goes into its configuration.
    """
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=max_length,
        tie_word_embeddings=tied,
        initializer_range=spread,  # large enough that attention and logits are far from uniform
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|im_end|>"),
        pad_token_id=SPECIAL.index("<|pad|>"),
        **extra,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(dtype)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):  # transformers starts them at about 0
                torch.nn.init.normal_(parameter, std=0.2)
    disable_progress_bar()
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory
