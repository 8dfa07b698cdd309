"""What runs in Ray's worker processes: a worker with its trainer or sampler, and how it starts and ends.

The classes are plain; ``supervision`` makes actors of them. Torch is imported inside methods, so the process that
creates the actors never loads it. Nothing but dataclasses, bytes and numbers crosses the border.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuft_jupyter import tracing
from tuft_jupyter.core.engine import EngineDied, Outcome, Part, RunMemory, Sampler, Task, TextTask, Trainer
from tuft_jupyter.core.errors import TuftError
from tuft_jupyter.core.types import ModelCard
from tuft_jupyter.engine.sampling_worker import SamplingWorker
from tuft_jupyter.engine.worker import TrainingWorker
from tuft_jupyter.machine import interface_of

if TYPE_CHECKING:
    from tuft_jupyter.engine.parallel import Group
    from tuft_jupyter.engine.text_worker import TextWorker

log = logging.getLogger(__name__)

CPU_MEMORY = {
    # Freed memory stays with the process: returning and faulting it in again costs a third of a training step
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
    # In huge pages, if the kernel has them: of small ones, looking up their addresses costs a twentieth
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""Of a worker that asked for none: Ray hides the other GPUs from who was given one, and none from who was not."""

SECRETS = (
    "TUFT_API_KEY",
    "TINKER_API_KEY",
    "JUPYTER_TOKEN",
    "JUPYTERHUB_API_TOKEN",
    "JPY_API_TOKEN",
    "HF_TOKEN",
    "MEGATRON_SERVER_KEY",
    "VLLM_API_KEY",
)
"""Variables of the notebook server that a worker has no use for."""

NETWORK = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
"""Variables of the notebook server that say which network interface processes on several nodes talk over."""

GPU_PART_TOKENS = 16_384
"""As many tokens as the trainer takes in one pass on a GPU; fewer leave it idle."""

LAST_WORDS_SECONDS = 1.0
"""Time for the answers of a broken sampler to leave the process before it ends."""


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """Keywords of :class:`~tuft_jupyter.engine.vllm_sampler.VllmSampler`."""

    max_rank: int
    max_loras: int
    gpu_memory: float
    tensor_parallel: int
    enable_lora: bool = True


@dataclass(frozen=True, slots=True)
class RankOptions:
    """Which of a data-parallel trainer's ``ranks`` processes an actor is; they must meet within ``seconds``."""

    rank: int
    ranks: int
    seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class ActorOptions:
    """``threads`` for torch on the CPU; ``options`` are further keywords of the trainer or sampler.

    ``vllm`` is there if that is the sampler, ``rank`` if the trainer is several processes. ``adapters``: whether a
    sampler may be asked for any; ``text_workers``: its threads that turn text into tokens. ``dtype`` is
    :class:`~tuft_jupyter.config.ModelSettings`'.
    """

    card: ModelCard
    threads: int
    dtype: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    vllm: VllmOptions | None = None
    rank: RankOptions | None = None
    adapters: bool = True
    text_workers: int = 1


@dataclass(frozen=True, slots=True)
class Loaded:
    """``seconds`` is how long the model took to load; ``category`` is "" unless it could not be, as ``error`` says.
    ``part_tokens`` is that of :class:`~tuft_jupyter.core.engine.TrainingEngine`."""

    device: str = ""
    seconds: float = 0.0
    part_tokens: int = 0
    category: str = ""
    error: str = ""


def free_port(start: int = 0, consecutive: int = 1) -> int:
    """The first of ``consecutive`` neighbouring TCP ports that nobody listens at, looked for from ``start`` up.

    0: wherever the system has one. OSError if there are none.
    """
    first = start
    while first + consecutive <= 1 << 16:
        with contextlib.ExitStack() as held:
            try:
                for offset in range(consecutive):
                    listener = held.enter_context(socket.socket())
                    listener.bind(("", first + offset if first else 0))
                    first = first or listener.getsockname()[1]
            except OSError:
                first += 1
                continue
            return first
    raise OSError(f"no {consecutive} free ports from {start} up")


class EngineActor:
    """A process with one base model in it. ``pid`` works at once; ``load`` must have succeeded before the rest."""

    def __init__(self, options: ActorOptions) -> None:
        self.options = options
        self.device = "cpu"
        self.meeting = ""
        logging.basicConfig(level=logging.INFO)
        self._tracing = tracing.begin(type(self).__name__)

    def pid(self) -> int:
        return os.getpid()

    def prepare(self) -> None:
        """Import what ``load`` needs, which is most of the time it takes; no model, no device."""
        from tuft_jupyter.engine import fused, trainer  # noqa: F401

        fused.kernels()

    def address(self) -> str:
        """This node's IP and a port that is free on it, as ``tcp://IP:PORT``."""
        return f"tcp://{self.node_ip()}:{free_port()}"

    def node_ip(self) -> str:
        import ray

        return str(ray.util.get_node_ip_address())

    def load(self, meeting: str = "") -> Loaded:
        """Load the model; a failure is returned, not raised, so that it keeps its category.

        ``meeting`` is where a process that is one of several finds the others, as torch.distributed writes it.
        """
        began = time.perf_counter()
        self.meeting = meeting
        try:
            self.setup_device()
            self.make()
        except TuftError as error:
            return Loaded(category=error.category, error=error.message)
        except Exception as error:
            log.exception("%s cannot be loaded", self.options.card.name)
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            return Loaded(category="server", error=text)
        part_tokens = 0 if self.device == "cpu" else GPU_PART_TOKENS
        return Loaded(self.device, time.perf_counter() - began, part_tokens)

    def span(self, name: str, trace: str) -> AbstractContextManager[Any]:
        """What is done for a caller, in its trace, where there are any."""
        if self._tracing is None:
            return nullcontext()
        attributes = {"tuft.base_model": self.options.card.name, "tuft.device": self.device}
        return self._tracing.span(name, trace, kind="server", attributes=attributes)

    def setup_device(self) -> None:
        """CUDA if Ray gave us some of it, else the CPU with as many threads as were planned."""
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(self.options.threads)

    def make(self) -> None:
        """Build the worker."""
        raise NotImplementedError

    def model_options(self) -> dict[str, Any]:
        """The keywords that trainer and sampler share."""
        from tuft_jupyter.engine import precision

        return {
            "name": self.options.card.name,
            "device": self.device,
            "dtype": precision.NAMED.get(self.options.dtype),
            **self.options.options,
        }

    def gpu_bytes(self) -> int:
        """GPU memory this process holds."""
        if self.device == "cpu":
            return 0
        import torch

        return int(torch.cuda.memory_reserved())

    def _check_device(self) -> None:
        """Raises if the device is beyond use: after some CUDA errors every later call fails."""
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()


class TrainingActor(EngineActor):
    """One base model with all adapters in training on it; ``group`` is there if it is one of several processes."""

    worker: TrainingWorker
    group: Group | None = None

    def make(self) -> None:
        self.worker = TrainingWorker(self.trainer(), self._check)

    def _check(self) -> None:
        self._check_device()
        if self.group is not None:
            self.group.check()

    def trainer(self) -> Trainer:
        this = self.options.rank
        if this is None:
            from tuft_jupyter.engine.trainer import PeftTrainer

            return PeftTrainer(self.options.card.path, **self.model_options())
        from tuft_jupyter.engine.parallel import Group, ParallelTrainer

        if self.meeting.startswith("tcp:") and (interface := interface_of(self.node_ip())):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # else it goes by the host's name
        group = self.group = Group(this.rank, this.ranks, self.meeting, self.device, seconds=this.seconds)
        return ParallelTrainer(self.options.card.path, group=group, **self.model_options())

    def memory(self) -> dict[str, RunMemory]:
        """What each run takes in memory of this process."""
        return dict(self.worker.trainer.memory())

    def step(self, tasks: Sequence[Task], trace: str = "") -> tuple[list[Outcome], int]:
        """(the outcomes, GPU bytes held). The process ends if its trainer can never work again."""
        try:
            with self.span("train", trace):
                return self.worker.step(tasks), self.gpu_bytes()
        except EngineDied:
            os._exit(1)


class SamplingActor(EngineActor):
    """One base model with the adapters lately sampled from."""

    worker: SamplingWorker
    text: TextWorker

    def make(self) -> None:
        self.worker = SamplingWorker(self.sampler(), adapters=self.options.adapters, on_death=self._end)
        self.text = self.texts()

    def sampler(self) -> Sampler:
        if self.options.vllm is not None:
            from tuft_jupyter.engine.vllm_sampler import VllmSampler

            options = {**self.model_options(), **asdict(self.options.vllm), "on_death": self._end}
            options.pop("kv_tokens", None)  # vLLM bounds its memory by gpu_memory_utilization
            return VllmSampler(self.options.card.path, **options)
        from tuft_jupyter.engine.torch_sampler import TorchSampler

        return TorchSampler(self.options.card.path, **self.model_options())

    async def sample(
        self, request_id: str, adapter: str | None, body: bytes, tenant: str, trace: str = ""
    ) -> tuple[Outcome, int]:
        """(the outcome, GPU bytes held)."""
        with self.span("sample", trace):
            return await self.worker.sample(request_id, adapter, body, salt=tenant), self.gpu_bytes()

    async def cancel(self, request_id: str) -> None:
        self.worker.cancel(request_id)
        self.text.cancel(request_id)

    async def waits_for(self, request_id: str) -> str:
        return self.worker.waits_for(request_id)

    async def complete(self, task: TextTask, trace: str = "") -> Part:
        """The first part of the answer to a request in OpenAI's form."""
        with self.span("sample", trace):
            return await self.text.begin(task)

    async def more(self, request_id: str) -> Part:
        """The next part of such an answer."""
        return await self.text.more(request_id)

    def texts(self) -> TextWorker:
        from tuft_jupyter.engine.text_worker import TextWorker

        card = self.options.card
        threads = self.options.text_workers
        return TextWorker(self.worker, Path(card.path), threads=threads)

    def _end(self) -> None:
        exit_process: Callable[[int], Any] = os._exit
        threading.Timer(LAST_WORDS_SECONDS, exit_process, (1,)).start()
