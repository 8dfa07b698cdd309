"""Weights between PEFT and a server, in both directions: run in a real kernel by ``tests/contract/test_upload.py``.

Outside of the SDK it uses what anybody has: PEFT, a tar archive, and urllib.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import tinker
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tinker import types
from transformers import AutoModelForCausalLM

import tuft_jupyter

BASE = Path(tuft_jupyter.__file__).parent / "demo"
IDS = [101, 42, 37, 102, 57, 12, 7, 99, 5, 210]
SECONDS = 60


def datum() -> types.Datum:
    targets = types.TensorData(data=IDS[1:], dtype="int64", shape=[len(IDS) - 1])
    return types.Datum(
        model_input=types.ModelInput.from_ints(IDS[:-1]), loss_fn_inputs={"target_tokens": targets}
    )


def base_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def logprobs_of(model: Any) -> np.ndarray:
    """As transformers and PEFT compute them."""
    with torch.no_grad():
        logits = model(torch.tensor([IDS[:-1]])).logits[0]
    return logits.log_softmax(-1)[range(len(IDS) - 1), IDS[1:]].numpy()


def logprobs_on(training: Any) -> np.ndarray:
    """As the server's trainer computes them."""
    answer = training.forward([datum()], "cross_entropy").result(timeout=SECONDS)
    return np.asarray(answer.loss_fn_outputs[0]["logprobs"].data)


def ask(path: str, body: bytes | None = None) -> Any:
    headers = {"X-API-Key": os.environ["TINKER_API_KEY"]}
    request = urllib.request.Request(
        f"{os.environ['TINKER_BASE_URL']}/api/v1{path}", data=body, headers=headers
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        request, timeout=SECONDS
    ) as answer:
        return json.loads(answer.read())


def packed(directory: Path) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as writer:
        writer.add(directory, ".")
    return file.getvalue()


def trained_with_peft_alone(directory: Path) -> np.ndarray:
    """Train an adapter of another rank and alpha than any SDK asks for; save it, and say its log-probabilities."""
    torch.manual_seed(3)
    model = get_peft_model(
        base_model(), LoraConfig(r=6, lora_alpha=9, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.tensor([IDS])
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(directory)
    return logprobs_of(model)


def from_peft_to_the_server() -> None:
    service = tinker.ServiceClient()
    with tempfile.TemporaryDirectory() as name:
        theirs = trained_with_peft_alone(Path(name))
        told = ask("/tuft/adapters?base_model=tuft/demo&name=theirs", packed(Path(name)))
    assert told["lora_rank"] == 6
    path = told["tinker_path"]
    assert path in [
        c.tinker_path for c in tinker.RestClient().list_user_checkpoints().result(timeout=SECONDS).checkpoints
    ]
    training = service.create_training_client_from_state(path)
    np.testing.assert_allclose(logprobs_on(training), theirs, atol=1e-5)
    sampling = service.create_sampling_client(model_path=path)
    said = sampling.compute_logprobs(types.ModelInput.from_ints(IDS)).result(timeout=SECONDS)
    np.testing.assert_allclose(np.asarray(said[1:], np.float64), theirs, atol=1e-4)
    before = theirs.sum()
    for _ in range(3):
        training.forward_backward([datum()], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=1e-3)).result(timeout=SECONDS)
    assert logprobs_on(training).sum() > before
    greedy = types.SamplingParams(max_tokens=4, temperature=0.0)
    later = training.save_weights_and_get_sampling_client()
    drawn = later.sample(types.ModelInput.from_ints(IDS), 1, greedy).result(timeout=SECONDS)
    assert len(drawn.sequences[0].tokens) == 4


def from_the_server_to_peft() -> None:
    service = tinker.ServiceClient()
    training = service.create_lora_training_client(base_model="tuft/demo", rank=8, seed=5)
    for _ in range(4):
        training.forward_backward([datum()], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=5e-3)).result(timeout=SECONDS)
    ours = logprobs_on(training)
    path = training.save_weights_for_sampler("leaves").result(timeout=SECONDS).path
    run, kind, name = path.removeprefix("tinker://").split("/")
    url = ask(f"/training_runs/{run}/checkpoints/{kind}/{name}/archive")["url"]
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=SECONDS) as answer:
        content = answer.read()
    with tempfile.TemporaryDirectory() as directory:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar.getmembers():
                (Path(directory) / member.name).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
        model = PeftModel.from_pretrained(base_model(), directory).eval()
        np.testing.assert_allclose(logprobs_of(model), ours, atol=1e-5)
    again = service.create_training_client_from_state(
        ask("/tuft/adapters?base_model=tuft/demo", content)["tinker_path"]
    )
    np.testing.assert_array_equal(logprobs_on(again), ours)


TRIPS = (from_peft_to_the_server, from_the_server_to_peft)
