"""Twinkle's complete server configuration, key by key, and changes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tuft_jupyter.config import Settings

EXAMPLE = Path(__file__).parents[2] / "examples" / "server_config.yaml"

MEGATRON = """
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
applications:
  - name: server
    route_prefix: /api/v1
    import_path: server
    args:
      server_config:
        per_token_model_limit: 3
        supported_models:
          - Qwen/Qwen3.5-4B
    deployments:
      - name: TinkerCompatServer
        max_ongoing_requests: 50
        autoscaling_config:
          min_replicas: 1
          max_replicas: 1
          target_ongoing_requests: 128
        ray_actor_options:
          num_cpus: 0.1
  - name: models-Qwen3.5-4B
    route_prefix: /api/v1/model/Qwen/Qwen3.5-4B
    import_path: model
    args:
      use_megatron: true
      model_id: "ms://Qwen/Qwen3.5-4B"
      max_length: 10240
      nproc_per_node: 2
      device_group:
        name: model
        ranks: 2
        device_type: cuda
      device_mesh:
        device_type: cuda
        dp_size: 2
      queue_config:
        rps_limit: 100
        tps_limit: 10000
        max_input_tokens: 10000
      adapter_config:
        adapter_timeout: 30
        adapter_max_lifetime: 36000
      max_loras: 1
    deployments:
      - name: ModelManagement
        autoscaling_config:
          min_replicas: 1
          max_replicas: 1
          target_ongoing_requests: 16
        ray_actor_options:
          num_cpus: 0.1
          runtime_env:
            env_vars:
              TWINKLE_TRUST_REMOTE_CODE: "0"
  - name: sampler-Qwen3.5-4B
    route_prefix: /api/v1/sampler/Qwen/Qwen3.5-4B
    import_path: sampler
    args:
      model_id: "ms://Qwen/Qwen3.5-4B"
      nproc_per_node: 2
      sampler_type: vllm
      engine_args:
        max_model_len: 4096
        gpu_memory_utilization: 0.5
        enable_lora: true
        logprobs_mode: processed_logprobs
      device_group:
        name: sampler
        ranks: 1
        device_type: cuda
      device_mesh:
        device_type: cuda
        dp_size: 1
      queue_config:
        rps_limit: 100
        tps_limit: 100000
    deployments:
      - name: SamplerManagement
        autoscaling_config:
          min_replicas: 1
          max_replicas: 1
          target_ongoing_requests: 16
        ray_actor_options:
          num_cpus: 0.1
          runtime_env:
            env_vars:
              TWINKLE_TRUST_REMOTE_CODE: "0"
  - name: processor
    route_prefix: /api/v1/processor
    import_path: processor
    args:
      ncpu_proc_per_node: 2
      device_group:
        name: model
        ranks: 2
        device_type: CPU
      device_mesh:
        device_type: CPU
        dp_size: 2
    deployments:
      - name: ProcessorManagement
        autoscaling_config:
          min_replicas: 1
          max_replicas: 1
          target_ongoing_requests: 128
        ray_actor_options:
          num_cpus: 0.1
"""
NAME = "Qwen/Qwen3.5-4B"
"""What its model is called."""
SERVER, MODEL, SAMPLER, PROCESSOR = range(4)
Apps = list[dict[str, Any]]
Load = Callable[..., Settings]


def with_megatron() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(MEGATRON)
    return document


def with_transformers() -> dict[str, Any]:
    """The same with the model trained here."""
    document = with_megatron()
    document["applications"][MODEL]["args"] |= {"use_megatron": False}
    return document


def changed(
    change: Callable[[list[dict[str, Any]]], Any], document: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A copy of a document (default: the transformers edition) whose applications were changed."""
    other = copy.deepcopy(document or with_transformers())
    change(other["applications"])
    return other


def args(app: int, **values: Any) -> Callable[[Apps], None]:
    return lambda apps: apps[app]["args"].update(values)


def deployed(app: int, **values: Any) -> Callable[[Apps], None]:
    return lambda apps: apps[app]["deployments"][0].update(values)
