"""What the benchmarks of a whole server share: one of their own, and the plain loop it is measured against."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from table import ROOT, Row, at_least, at_most, held, in_a_process, show  # noqa: F401 - for the benchmarks

from examples.run_on_server import Kernel, Server  # noqa: F401 - likewise
from tests.support.live import key_of, sdk, standby

MODEL = "tuft/demo"
VOCAB = 2048
RANK = 16
LEARNING_RATE = 1e-4
FOREIGN = ("TUFT_", "TINKER_", "RAY_", "HF_", "JUPYTER_")


@contextlib.contextmanager
def server(*, extension: bool = True, **env: str) -> Iterator[Server]:
    """A running Jupyter server in a home of its own, with or without our extension."""
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[name]  # whatever this user has set up, the server is to know nothing of it
    os.environ["TINKER_TELEMETRY"] = "0"
    with tempfile.TemporaryDirectory(prefix="tuft-bench-") as scratch:
        home = Path(scratch)
        root = home / "notebooks"
        root.mkdir(exist_ok=True)
        made = Server(
            root,
            home,
            base_url="/user/bench/",
            env=environment(home, **env),
            options=(f"--ServerApp.jpserver_extensions={{'tuft_jupyter': {extension}}}",),
        )
        with made:
            yield made


def environment(home: Path, **more: str) -> dict[str, str]:
    """Variables with which everything of ours lies below ``home``."""
    return {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "server_ext")]),
        "TUFT_HOME": str(home / "tuft"),
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "JUPYTER_CONFIG_DIR": str(home / "jupyter"),
        "IPYTHONDIR": str(home / "ipython"),
        "TINKER_TELEMETRY": "0",
        **more,
    }


def api_of(url: str) -> str:
    """Where a notebook server answers the SDK."""
    return f"{url.rstrip('/')}/tuft"


def owners_client(started: Server) -> contextlib.AbstractContextManager[Any]:
    """The unmodified SDK's client of who started the server."""
    return sdk(api_of(started.url), key_of(started.work))


def spare(started: Server, key: str = "") -> int:
    """The process that stands by for the trainer, once it is ready.

    Before, it imports its libraries for some seconds on a core that whatever is measured would have had.
    """
    return standby(api_of(started.url), key or key_of(started.work))


def tokens_of(rows: int, length: int) -> list[list[int]]:
    """Fixed token sequences, different from row to row."""
    return [[(7 * row + 13 * i) % VOCAB for i in range(length + 1)] for row in range(rows)]


def sdk_data(rows: Sequence[Sequence[int]]) -> list[Any]:
    """The sequences as the SDK's training data: every token but the first is a target."""
    import numpy as np
    from tinker import types

    data = []
    for row in rows:
        targets = types.TensorData.from_numpy(np.array(row[1:], np.int64))
        weights = types.TensorData.from_numpy(np.ones(len(row) - 1, np.float32))
        inputs = {"target_tokens": targets, "weights": weights}
        data.append(
            types.Datum(model_input=types.ModelInput.from_ints(list(row[:-1])), loss_fn_inputs=inputs)
        )
    return data


class SdkLoop:
    """forward_backward + optim_step through the SDK, sent together as its documentation advises."""

    def __init__(self, client: Any, rows: Sequence[Sequence[int]]) -> None:
        from tinker import types

        self.training = client.create_lora_training_client(base_model=MODEL, rank=RANK, seed=1).result()
        self._data = sdk_data(rows)
        self._adam = types.AdamParams(learning_rate=LEARNING_RATE)

    def step(self) -> float:
        """The summed loss before the step."""
        done, stepped = self.send()
        loss = float(done.result().metrics["loss:sum"])
        stepped.result()
        return loss

    def send(self) -> tuple[Any, Any]:
        """Ask for a step without waiting for it."""
        return self.training.forward_backward(self._data, "cross_entropy"), self.training.optim_step(
            self._adam
        )


class PlainLoop:
    """The same step as a careful person writes it with torch and PEFT: equal lengths, so nothing is padded."""

    def __init__(self, rows: Sequence[Sequence[int]], threads: int) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        from tuft_jupyter import models

        torch.set_num_threads(threads)
        disable_progress_bar()
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        base = AutoModelForCausalLM.from_pretrained(models.resolve(MODEL).path, dtype=torch.float32)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
        config = LoraConfig(r=RANK, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
        self._model = get_peft_model(base, config)
        adapter = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(adapter, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
        self._tokens = torch.tensor([list(row) for row in rows])

    def step(self) -> float:
        """The summed loss before the step."""
        import torch

        logits = self._model(input_ids=self._tokens[:, :-1], use_cache=False).logits
        targets = self._tokens[:, 1:].reshape(-1)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())


def trainer_threads() -> int:
    """Threads the server's trainer computes with; the plain loop gets as many."""
    from tuft_jupyter.engine.ray_local import cpus

    return max(1, cpus() - 1)


def tree(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def cpu_seconds(pid: int) -> float:
    """CPU time, user and system, of a process and its living descendants."""
    total = 0.0
    for process in tree(pid):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def same_start(plain: float, served: float) -> None:
    """Both loops must begin with the same loss, or they do not do the same work."""
    if abs(plain - served) > 1e-3 * abs(plain):
        raise SystemExit(f"the loops differ: plain loss {plain:.4f}, served loss {served:.4f}")


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median_ms(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) * 1e3
