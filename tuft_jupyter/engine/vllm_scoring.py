"""Log-probabilities of a prompt's own tokens, right also with an adapter on the unembedding.

vLLM computes them with the adapters of the *sampled* rows, so an adapter's update of the unembedding is dropped, given
to somebody else's rows, or ends the engine (vllm#16668, vllm#51594; seen with 0.32). :class:`Scoring` is mixed into
vLLM's worker processes and gives every prompt token its own adapter; :func:`probe` finds out, on the engine as it is,
whether the numbers are then right. Where they are not, the sampler refuses to score.

Runs in vLLM's workers, and so imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROBED = [1, 2, 3, 5, 8, 13]
"""A prompt that any vocabulary has."""
ANSWER = 6
TOLERANCE = 0.3
"""Nats; bfloat16 is good to a tenth of that, the probe's update is worth ten times that."""


class Scoring:
    """Methods for vLLM's workers (``worker_extension_cls``)."""

    model_runner: Any

    def correct_scoring(self) -> bool:
        """Give prompt tokens their own adapters while they are scored; False if this vLLM is not as we know it."""
        runner = self.model_runner
        wrapper = next(
            (
                module.punica_wrapper
                for module in runner.get_model().modules()
                if type(module).__name__ == "LogitsProcessorWithLoRA"
            ),
            None,
        )
        score = getattr(runner, "_get_prompt_logprobs_dict", None)
        if wrapper is None or score is None:
            return False

        def corrected(hidden: Any, *args: Any, **kwargs: Any) -> Any:
            compute = runner.model.compute_logits

            def per_token(rows: Any, *more: Any, **options: Any) -> Any:
                start = (rows.data_ptr() - hidden.data_ptr()) // (hidden.stride(0) * hidden.element_size())
                with _mapped(wrapper, wrapper.token_lora_indices[start : start + len(rows)]):
                    return compute(rows, *more, **options)

            runner.model.compute_logits = per_token
            try:
                return score(hidden, *args, **kwargs)
            finally:
                del runner.model.compute_logits

        runner._get_prompt_logprobs_dict = corrected
        return True


@contextlib.contextmanager
def _mapped(wrapper: Any, adapters: Any) -> Iterator[None]:
    """Rows of logits belong to these adapters for a while."""
    length = wrapper.indices_len[1]
    before = wrapper._sampler_indices[: max(length, len(adapters))].clone()
    kernels = getattr(wrapper, "prompt_mapping_meta", None)  # what Triton reads; there is none on a CPU

    def set_to(indices: Any, count: int) -> None:
        wrapper._sampler_indices[: len(indices)].copy_(indices)
        wrapper.indices_len[1] = count
        if kernels is not None:
            kernels.prepare_tensors(wrapper.sampler_indices)

    set_to(adapters, len(adapters))
    try:
        yield
    finally:
        set_to(before, length)


def write_probe(directory: Path, hidden: int, vocabulary: int) -> None:
    """An adapter of rank 1 on the unembedding alone, which changes every logit by about 3."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    name = "base_model.model.lm_head.lora_{}.weight"
    tensors = {
        name.format("A"): torch.randn(1, hidden, generator=generator) * hidden**-0.5,
        name.format("B"): torch.randn(vocabulary, 1, generator=generator) * 3,
    }
    save_file(tensors, str(directory / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["lm_head"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))


async def probe(engine: Any, adapter: Any) -> bool:
    """Whether scored prompts have the log-probabilities that drawing the same tokens has, with ``adapter`` (a
    LoRARequest for what :func:`write_probe` wrote) and without, side by side."""
    import asyncio

    from vllm import SamplingParams

    async def ask(key: str, tokens: list[int], lora: Any, **params: Any) -> Any:
        asked = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, logprobs=0, **params)
        answers = engine.generate({"prompt_token_ids": tokens}, asked, f"probe-{key}", lora_request=lora)
        return [answer async for answer in answers][-1]

    both = (adapter, None)
    drawn = [await ask(f"draw{i}", PROBED, lora, max_tokens=ANSWER) for i, lora in enumerate(both)]
    whole = [[*PROBED, *each.outputs[0].token_ids] for each in drawn]
    scored = await asyncio.gather(
        *(ask(f"score{i}", whole[i], lora, max_tokens=1, prompt_logprobs=0) for i, lora in enumerate(both))
    )
    for tokens, draw, score in zip(whole, drawn, scored, strict=True):
        for i, cell in enumerate(draw.outputs[0].logprobs):
            token = tokens[len(PROBED) + i]
            if (
                not abs(cell[token].logprob - score.prompt_logprobs[len(PROBED) + i][token].logprob)
                < TOLERANCE
            ):
                return False
    return True
