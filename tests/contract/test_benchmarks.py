"""The benchmark of a GPU is a program that runs without one, too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(300)
def test_the_gpu_benchmark_runs_in_small_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--scratch", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert "over sequential PEFT" in done.stdout, done.stderr
    assert "torch sampler, 2 adapters" in done.stdout
    assert "trained" in done.stdout
