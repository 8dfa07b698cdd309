"""The examples for clusters: a shell reads them, and Kubernetes could."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "multi_node" / "setup_ray_cluster.sh"
FLAGS = ["--temp-dir", "--disable-usage-stats", "--num-gpus"]


@pytest.mark.parametrize("role", ["head", "worker"])
def test_the_script_runs_the_documented_command(role: str, tmp_path: Path) -> None:
    """S3-29, S3-30, S3-36: and never stops a cluster."""
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert "ray stop" not in SCRIPT.read_text()
    ray = tmp_path / "ray"
    ray.write_text('#!/bin/sh\necho "$@"\n')
    ray.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HEAD_IP": "10.0.0.1"}
    done = subprocess.run(
        [str(SCRIPT), role], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert [flag for flag in FLAGS if flag not in done] == []
    if role == "head":
        assert done[:2] == ["start", "--head"]
        assert done[done.index("--node-ip-address") + 1] == "10.0.0.1"
    else:
        assert done[done.index("--address") + 1] == "10.0.0.1:6379"


def test_no_source_of_ours_stops_a_ray_cluster() -> None:
    """S2-02."""
    root = EXAMPLES.parent
    files = [
        *(root / "tuft_jupyter").rglob("*.py"),
        *(root / "server_ext").rglob("*.py"),
        *EXAMPLES.rglob("*.sh"),
    ]
    assert [path.name for path in files if "ray stop" in path.read_text()] == []


def test_placement_groups_are_made_in_one_module() -> None:
    """S3-04, S3-11."""
    engine = EXAMPLES.parent / "tuft_jupyter"
    assert [p.name for p in engine.rglob("*.py") if "placement_group(" in p.read_text()] == ["placement.py"]


def test_the_kubernetes_examples_fit_together() -> None:
    """S1-68, S3-37: the address in the one is the service of the other, and both mount one volume at one path."""
    folder = EXAMPLES / "kubernetes"
    cluster = yaml.safe_load((folder / "raycluster.yaml").read_text())
    values = yaml.safe_load((folder / "values_jupyterhub.yaml").read_text())
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    user = values["singleuser"]
    assert user["extraEnv"]["RAY_ADDRESS"] == f"ray://{cluster['metadata']['name']}-head-svc:10001"
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    (mount,) = user["storage"]["extraVolumeMounts"]
    (claim,) = user["storage"]["extraVolumes"]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert (
            container["volumeMounts"][0]["mountPath"] == mount["mountPath"] == user["extraEnv"]["TUFT_HOME"]
        )
        assert pod["volumes"][0]["persistentVolumeClaim"] == claim["persistentVolumeClaim"]
        assert container["resources"]["limits"]
    assert groups[1]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
