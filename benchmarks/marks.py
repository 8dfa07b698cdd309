"""The marks that the engine is held to, and what is known of those it falls short of.

One list for the table that ``make bench`` prints and for ``docs/performance.md``, which a test compares.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mark:
    """``bound`` is a least value, or with ``most`` a greatest; ``note`` is printed where it is not reached."""

    what: str
    bound: float
    unit: str = " x"
    most: bool = False
    note: str = ""

    @property
    def text(self) -> str:
        return f"{'<=' if self.most else '>='} {self.bound:g}{self.unit}"

    def holds(self, measured: float) -> bool:
        return measured <= self.bound if self.most else measured >= self.bound


_MATMUL = (
    "most of our time is the frozen matrices, which PEFT multiplies as well. Cores of AMD do bf16 at 210 GFLOP/s: 500 "
    "tokens/CPU-s at most, whoever runs them, of which 376 (4 datums) and 321 (1 datum) were reached. Intel's without "
    "AMX do fp32, which they prefer, at 130 of 147: 320 at most, 273 and 251 reached. Tried: weights in the kernels' "
    "order, small operations in one pass (kept); other micro-batches, grouped matmuls, kernel caches, the softmax of "
    "the unembedding in one pass (no gain)"
)
_CACHE = (
    "the base model's matmuls are half of the time, at 80 to 100 of the 118 GFLOP/s of AMD's cores, adapters an "
    "eighth; keys and values do not fit in a cache: the speed of memory. A single sequence is bound by reading the "
    "weights: a CPU that prefers fp32 reads twice as much for it as one in bf16 does, and one with a large cache reads "
    "a small model's from there. Tried: attention and small operations in one pass, weights in the kernels' order, "
    "adapters side by side (kept); adapters and drawing in one pass, flash kernels (no gain)"
)

MARKS = {
    "tenants long small-bf16": Mark(
        "16 tenants x 4 datums of 16..256 tokens, 108 M parameters in bf16, over sequential PEFT",
        2.8,
        note=_MATMUL,
    ),
    "tenants long tiny-fp32": Mark(
        "16 tenants x 4 datums of 16..256 tokens, 4 x 256 model in fp32, over sequential PEFT",
        2.0,
        note="1.96 to 2.3 x in five runs. Half of our time is the frozen matrices, at 108 of a core's 118 GFLOP/s, "
        "which PEFT runs as well; log-probabilities of prompts, which the protocol answers, are 6 %. Tried: as in bf16",
    ),
    "tenants short small-bf16": Mark(
        "16 tenants x 1 datum of 16..48 tokens, 108 M parameters in bf16, over sequential PEFT",
        3.0,
        note=_MATMUL,
    ),
    "tenants short tiny-fp32": Mark(
        "16 tenants x 1 datum of 16..48 tokens, 4 x 256 model in fp32, over sequential PEFT",
        3.0,
        note="3.1 to 3.3 x in quiet runs: within the noise of the mark",
    ),
    "throughput": Mark(
        "1 tenant, 8 x 256 tokens, whole server over a plain PEFT loop",
        1.2,
        note="1.10 to 1.25 x in eleven runs. Equal lengths leave no padding to save; half of the time is the frozen "
        "matrices, at 108 of a core's 118 GFLOP/s; the notebook server and Ray are 5 %. Tried: small operations in one "
        "pass, huge pages (kept)",
    ),
    "scaling": Mark("64 tenants over 1, tokens per CPU-second of the whole server", 0.9),
    "memory": Mark(
        "activation memory of a step in bf16, 16 tenants, over sequential PEFT",
        0.5,
        most=True,
        note="micro_batch_tokens bounds it: half as many take half",
    ),
    "restart": Mark(
        "trainer killed with -9 to the next answered op, demo model",
        10,
        " s",
        most=True,
        note="the spare process was not ready, or had to wait for the processor: a new one imports for 4 CPU-seconds",
    ),
    "hand-over": Mark(
        "optimizer step to the first token of its weights, demo model",
        50,
        " ms",
        most=True,
        note="36 to 49 ms in quiet runs, more where something else runs. 15 of them in the engine: a directory "
        "written, verified and read, a prompt; the rest is four requests of the SDK, two commits and two calls of "
        "actors. Tried: no sync of directories without a name, files hashed as they are written (kept)",
    ),
    "fairness": Mark(
        "light tenant (1 x 16) beside a heavy one (32 x 256, three deep), over alone", 3, most=True
    ),
    "vllm": Mark(
        "64 sequences over 4 adapters, 4 x 256 model, over vLLM for CPUs with LoRA",
        3.0,
        note="vLLM runs bf16, ours the same model in bf16; what limits ours is said at the rows over PEFT",
    ),
}
for _shape, _words in (("tiny-fp32", "4 x 256 model in fp32"), ("small-bf16", "108 M parameters in bf16")):
    for _way, _bound in (("PEFT mixed batch", 2.5), ("generate per tenant", 3.0), ("one at a time", 17.0)):
        MARKS[f"decode {_shape} {_way}"] = Mark(
            f"64 sequences over 4 adapters, {_words}, over {_way}", _bound, note=_CACHE
        )
