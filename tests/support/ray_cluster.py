"""A Ray cluster of several nodes on this machine, with GPUs that are only declared, in a process of its own.

As a program: adds a node for each line ``GPUS CUDA_VISIBLE_DEVICES`` of its input, and answers with the address;
ends with its input. Ray's parts that no test asks anything are left out, as in our own local Ray.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from tuft_jupyter.engine.ray_local import without_needless_import

ROOT = Path(__file__).parents[2]
ATTEMPTS = 3
"""A raylet gives its agent 15 s to come up and then ends itself; a busy machine may need longer."""


class RayCluster:
    """``token`` is a file with the secret of all its processes. Ended by pid, with whatever is left of it."""

    def __init__(self, token: Path) -> None:
        self.temp = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: Ray puts sockets below it
        self.address = ""
        environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        environment |= {
            "PYTHONPATH": os.pathsep.join([without_needless_import(self.temp), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
        }
        environment |= {"RAY_USAGE_STATS_ENABLED": "0"}
        environment.pop("RAY_ADDRESS", None)
        self._log = self.temp / "cluster.txt"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(self.temp)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )

    def add(self, gpus: int, visible: str = "") -> None:
        """One more node, the first of which is the head; returns once it is up."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{gpus} {visible}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("up "):
                self.address = line.split()[1]
                return
        raise AssertionError(self._log.read_text()[-3000:])

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        self._process.kill()
        self._process.wait(10)
        left = self.processes()
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=10)
        shutil.rmtree(self.temp, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.temp) in " ".join(process.cmdline()):
                    found.append(process)
        return found


def main(temp: str) -> None:
    import ray
    import ray._private.utils
    from ray.cluster_utils import Cluster

    from tuft_jupyter.engine.ray_local import UNUSED, _without

    ray._private.utils.write_ray_address = lambda *_, **__: None  # for whoever looks for "auto"
    cluster = Cluster()
    for line in sys.stdin:
        gpus, _, visible = line.strip().partition(" ")
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if visible:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        own = {} if cluster.head_node else {"temp_dir": temp, "include_dashboard": False}
        with _without(ray._private.node.Node, UNUSED):
            add_node(cluster, num_gpus=int(gpus), num_cpus=4, object_store_memory=100 << 20, **own)
        print("up", cluster.address, flush=True)
    cluster.shutdown()


def add_node(cluster: Any, **node: Any) -> None:
    """Of a node that does not come up nothing stays: it might join later, beside the one that is tried next."""
    others = {*psutil.Process().children(recursive=True)}
    for attempt in range(1, ATTEMPTS + 1):
        try:
            cluster.add_node(**node)
        except Exception:
            for process in {*psutil.Process().children(recursive=True)} - others:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if attempt == ATTEMPTS:
                raise
        else:
            return


if __name__ == "__main__":
    main(sys.argv[1])
