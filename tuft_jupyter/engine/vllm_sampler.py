"""A sampler on vLLM: the engine runs in processes of its own, many adapters in one batch.

What a request gets is what :class:`~tuft_jupyter.engine.torch_sampler.TorchSampler` would give it: the same greedy
tokens, log-probabilities of the untempered model, the same stops. Seeded samples are the same from run to run, and
others than the torch sampler's.

vLLM answers on an event loop, which runs in a thread here; :meth:`VllmSampler.step` waits for whatever ends next.
Guarded against, with vLLM 0.26 to 0.33 in mind:

* a prompt too long, or an adapter that does not fit, can end the engine for everybody (vllm#52871, vllm#18372): both
  are refused before the engine sees them;
* its processes outlive a parent that is killed, and keep the GPU's memory: a guard ends them with us;
* an engine that died leaves a client that looks alive: its process is watched, and ours ends with it;
* the prefix cache answers faster for a prompt that somebody else has sent: every tenant has a salt of its own.

vLLM is imported with the first instance.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil

from tuft_jupyter.core.engine import EngineDied, Listener
from tuft_jupyter.core.errors import ServerError, TuftError, UserError
from tuft_jupyter.core.types import SampleRequest, SampleResult
from tuft_jupyter.engine import checkpoint, precision, vllm_scoring, vllm_values
from tuft_jupyter.engine.ray_local import Guard
from tuft_jupyter.engine.sample_job import Limits
from tuft_jupyter.engine.vllm_adapters import NO_ADAPTERS, Named, NamedAdapters

log = logging.getLogger(__name__)

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can be told as the highest rank."""
FEWEST_LORAS = 4
"""Adapters in one batch, unless configured higher."""
START_SECONDS = 1800.0
PROBE_SECONDS = 30.0
"""Without an answer, the engine is asked whether it is alive."""
HUNG_SECONDS = 300.0
"""For one step of the engine."""
PROBE = 2**31 - 1
"""A number that no adapter reaches."""
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the other one, vllm_scoring does not know
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}

Result = SampleResult | BaseException
Ended = list[tuple[str, SampleResult | TuftError]]


class VllmSampler:
    """Implements ``core.engine.Sampler``.

    ``max_loras`` adapters share a batch and ``max_adapters`` are held in host memory, of rank ``max_rank`` at most;
    ``gpu_memory`` is the share of each GPU's memory that vLLM takes; ``tensor_parallel`` is over how many GPUs the
    model is spread; ``logprobs_mode`` is vLLM's word for which log-probabilities are told. Without ``enable_lora`` only
    the base model is sampled. ``on_death`` is called, in some thread, when the engine's process has ended. UserError
    says why a model cannot be served.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        name: str | None = None,
        dtype: Any = None,
        device: Any = None,
        max_context: int | None = None,
        max_samples: int = 1024,
        max_rank: int = 64,
        max_loras: int = FEWEST_LORAS,
        max_adapters: int = 32,
        gpu_memory: float = 0.4,
        tensor_parallel: int = 1,
        enable_lora: bool = True,
        logprobs_mode: str | None = None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                'the sampler of this model is to be vLLM, which is not installed: pip install "tuft-jupyter[vllm]", or '
                "set sampler_type to torch"
            )
        if max_rank > RANKS[-1]:
            raise UserError(f"max_lora_rank is {max_rank}; vLLM serves ranks up to {RANKS[-1]}")
        for variable, value in _ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        self._path, self._name = str(model_path), name or str(model_path)
        self._max_rank = max_rank
        self._enable_lora = enable_lora
        self._on_death = on_death
        self._guard = Guard()
        self._ended: queue.SimpleQueue[tuple[str, Result]] = queue.SimpleQueue()
        self._tasks: dict[str, asyncio.Task[Result] | None] = {}
        self._lock = threading.Lock()
        self._dead = ""
        self._closing = False
        loras = max(max_loras, FEWEST_LORAS)
        held = max(loras, max_adapters)
        if device == "cpu":
            # vLLM's LoRA operations for CPUs take "no adapter", -1, for the last slot: that one must stay empty
            loras = held + 1
        arguments: dict[str, Any] = {
            "model": self._path,
            "dtype": dtype or precision.chosen(Path(model_path), device or "cuda") or "auto",
            "max_model_len": max_context,
            "enable_lora": enable_lora,
            "logprobs_mode": logprobs_mode or "raw_logprobs",
            "max_loras": loras,
            "max_cpu_loras": max(loras, held),
            "max_lora_rank": next(rank for rank in RANKS if rank >= max_rank),
            "tensor_parallel_size": tensor_parallel,
            "distributed_executor_backend": "mp" if tensor_parallel > 1 else None,
            "gpu_memory_utilization": gpu_memory,
            "enforce_eager": device == "cpu",  # nothing to compile for, and half a minute less
            "enable_prefix_caching": True,
            "max_logprobs": -1,
            "worker_extension_cls": f"{vllm_scoring.__name__}.{vllm_scoring.Scoring.__name__}",
            "generation_config": "auto",
            "disable_log_stats": True,
        }
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True).start()
        try:
            self._engine: Any = self._call(self._start(arguments, held), START_SECONDS)
        except TuftError:
            raise
        except Exception as error:
            log.exception("vLLM cannot serve %s", self._name)
            raise ServerError(f"vLLM cannot serve {self._name}: {_line(error)}") from error
        config = self._engine.model_config
        self.limits = Limits(
            vocab_size=config.get_vocab_size(), context=config.max_model_len, samples=max_samples
        )

    # ---- from any thread

    def check(self, request: SampleRequest) -> None:
        """UserError if the prompt, the counts or the parameters do not fit this model."""
        self.limits.check(request)
        if request.targets is not None or request.prompt_alt_tokens_k:
            raise UserError(
                "log-probabilities of named tokens, and alternatives, in a prompt's places are not known to the vLLM "
                "sampler; set sampler_type to torch for this model"
            )
        if (request.prompt_logprobs or request.topk_prompt_logprobs) and not self._scores:
            raise UserError(
                "log-probabilities of a prompt: the installed vLLM computes them wrongly where adapters may be on the "
                "unembedding (vllm#51594); set sampler_type to torch, or install a vLLM that has it mended"
            )

    def submit(
        self, key: str, adapter: Path | None, request: SampleRequest, on_token: Listener | None = None
    ) -> None:
        """Hand a request to the engine, which batches by itself."""
        with self._lock:
            self._tasks[key] = None
        self._loop.call_soon_threadsafe(self._begin, key, adapter, request, on_token)

    def cancel(self, key: str) -> None:
        """Stop drawing for a request; unknown keys are ignored."""
        self._loop.call_soon_threadsafe(self._cancel, key)

    def waits_for(self, key: str) -> str:
        """Empty: vLLM does not say."""
        return ""

    def busy(self) -> bool:
        """True while any request is with the engine."""
        with self._lock:
            return bool(self._tasks)

    def close(self) -> None:
        """End the engine's processes."""
        self._closing = True
        self._call(self._shutdown())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._guard.close()

    # ---- from one thread

    def step(self) -> Ended:
        """Wait until a request ends, or half a minute; returns all that have. Raises if the engine is dead."""
        ended: Ended = []
        while not ended or not self._ended.empty():
            try:
                key, result = self._ended.get(timeout=PROBE_SECONDS)
            except queue.Empty:
                self._probe_health()
                break
            with self._lock:
                self._tasks.pop(key, None)
            if isinstance(result, SampleResult | TuftError):
                ended.append((key, result))
            elif not isinstance(result, asyncio.CancelledError):
                raise result
            elif not self.busy():
                break
        return ended

    # ---- on the loop

    async def _start(self, arguments: dict[str, Any], adapters: int) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        before = set(psutil.Process().children())
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        for process in psutil.Process().children(recursive=True):
            self._guard.watch(process)
        for process in set(psutil.Process().children()) - before:
            pidfd = os.pidfd_open(process.pid)  # tells of its end without taking its exit code from vLLM
            self._loop.add_reader(pidfd, self._died, pidfd, process.pid)
        self._adapters = NamedAdapters(adapters, self._load, self._unload)
        self._scores = await self._probe(engine)
        return engine

    async def _probe(self, engine: Any) -> bool:
        """Whether this engine scores prompts rightly, with adapters on the unembedding about."""
        from vllm.lora.request import LoRARequest

        with tempfile.TemporaryDirectory() as scratch:
            config = engine.model_config
            vllm_scoring.write_probe(Path(scratch), config.get_hidden_size(), config.get_vocab_size())
            adapter = LoRARequest("probe", PROBE, scratch)
            try:
                await engine.add_lora(adapter)
            except Exception:  # such adapters cannot be loaded, so none can do harm
                log.info("vLLM takes no adapters on the unembedding of %s", self._name, exc_info=True)
                return True
            scores = all(await engine.collective_rpc("correct_scoring")) and await vllm_scoring.probe(
                engine, adapter
            )
            await engine.remove_lora(PROBE)
        if not scores:
            log.warning("this vLLM cannot score prompts with adapters on the unembedding (vllm#51594)")
        return scores

    def _begin(
        self, key: str, adapter: Path | None, request: SampleRequest, on_token: Listener | None
    ) -> None:
        task = self._loop.create_task(self._serve(key, adapter, request, on_token))
        # Not in the task itself: one that is cancelled before its first step never runs
        task.add_done_callback(
            lambda done: self._ended.put(
                (key, asyncio.CancelledError() if done.cancelled() else done.result())
            )
        )
        with self._lock:
            self._tasks[key] = task

    def _cancel(self, key: str) -> None:
        task = self._tasks.get(key)
        if task is not None:
            task.cancel()

    async def _serve(
        self, key: str, adapter: Path | None, request: SampleRequest, on_token: Listener | None
    ) -> Result:
        try:
            self.check(request)
            if adapter is None:
                return await self._sample(key, request, None, on_token)
            if not self._enable_lora:
                raise UserError(NO_ADAPTERS)
            async with self._adapters.using(adapter) as named:
                return await self._sample(key, request, named, on_token)
        except TuftError as error:
            return error
        except Exception as error:
            if self._dead or self._engine.errored:
                return EngineDied(f"the vLLM engine is dead: {self._dead or _line(error)}")
            log.exception("sample request %s failed", key)  # vLLM refused it, or lost it alone
            return ServerError(f"sampling failed in vLLM: {_line(error)}")

    async def _sample(
        self, key: str, request: SampleRequest, named: Named | None, on_token: Listener | None
    ) -> SampleResult:
        from vllm.lora.request import LoRARequest

        lora = None if named is None else LoRARequest(named.name, named.number, str(named.directory))
        prompt = {"prompt_token_ids": request.prompt.tolist(), "cache_salt": request.salt or None}
        answer = vllm_values.Answer(request, on_token)
        longest = self.limits.longest(request)
        params = vllm_values.params(request, longest, stream=on_token is not None)
        async for output in self._engine.generate(prompt, params, key, lora_request=lora):
            answer.add(output)
        return answer.result()

    async def _load(self, named: Named) -> None:
        """Verify a saved adapter, then have the engine take it."""
        from vllm.lora.request import LoRARequest

        await asyncio.to_thread(
            checkpoint.verify, named.directory, base_name=self._name, max_rank=self._max_rank
        )
        try:
            await self._engine.add_lora(LoRARequest(named.name, named.number, str(named.directory)))
        except Exception as error:
            if self._dead or self._engine.errored:
                raise
            raise UserError(f"checkpoint: vLLM cannot use these weights: {_line(error)}") from error

    def _unload(self, named: Named) -> None:
        removing = self._loop.create_task(self._engine.remove_lora(named.number))
        removing.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _died(self, pidfd: int, pid: int) -> None:
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        if not self._closing:
            self._dead = f"its process {pid} ended"
            self._ended.put(("", EngineDied(f"the vLLM engine is dead: {self._dead}")))
            self._on_death()

    def _probe_health(self) -> None:
        """Raises if the engine does not take calls any more."""
        try:
            self._call(self._engine.list_loras(), HUNG_SECONDS)
        except TimeoutError:
            raise EngineDied(f"the vLLM engine hangs: no answer within {HUNG_SECONDS:g} s") from None

    async def _shutdown(self) -> None:
        await asyncio.to_thread(self._engine.shutdown)

    def _call(self, work: Coroutine[Any, Any, Any], seconds: float = 60.0) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
