"""What the stock SDK can do, verb by verb: run in a real kernel by ``tests/contract/test_sdk_verbs.py``.

Each function takes the shared :class:`Client` and asserts for itself. Nothing here knows our code: it imports tinker
and numpy, and finds the server by the environment that the notebook server gave its kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tinker
from tinker import types

IDS = [101, 42, 37, 102, 57, 12, 7, 99]
ADAM = types.AdamParams(learning_rate=1e-3)
SECONDS = 60


def datum(ids: list[int] = IDS, **inputs: Any) -> types.Datum:
    """Predict each next token of ``ids``; further inputs are float32 lists."""
    targets = types.TensorData(data=ids[1:], dtype="int64", shape=[len(ids) - 1])
    more = {
        name: types.TensorData(data=list(values), dtype="float32", shape=[len(values)])
        for name, values in inputs.items()
    }
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs={"target_tokens": targets, **more}
    )


class Client:
    def __init__(self) -> None:
        self.service = tinker.ServiceClient()
        self.rest = tinker.RestClient()
        self.training = self.service.create_lora_training_client(base_model="tuft/demo", rank=8, seed=7)

    def passed(self, data: list[types.Datum], loss: str = "cross_entropy", **config: float) -> Any:
        return self.training.forward_backward(data, loss, config or None).result(timeout=SECONDS)

    def loss(self, training: Any = None) -> float:
        found = (training or self.training).forward([datum()], "cross_entropy").result(timeout=SECONDS)
        return float(found.metrics["loss:sum"])


def capabilities(client: Client) -> None:
    models = client.rest.get_server_capabilities().result(timeout=SECONDS).supported_models
    assert all(model.model_name for model in models)
    assert models[0].model_name == "tuft/demo"
    assert models[0].max_context_length == 2048


def get_info(client: Client) -> None:
    info = client.training.get_info()
    assert info.model_data.model_name == "tuft/demo"
    assert info.lora_rank == 8
    assert info.is_lora


def forward_backward_cross_entropy(client: Client) -> None:
    result = client.passed([datum(), datum(IDS[:4], weights=[0.0, 1.0, 1.0])])
    first, second = (output["logprobs"].to_numpy() for output in result.loss_fn_outputs)
    assert first.shape == (7,)
    assert second.shape == (3,)
    assert math.isclose(result.metrics["loss:sum"], -(first.sum() + second[1:].sum()), rel_tol=1e-5)


def forward_leaves_no_gradient(client: Client) -> None:
    client.training.optim_step(ADAM).result(timeout=SECONDS)
    before = client.loss()
    step = client.training.optim_step(ADAM).result(timeout=SECONDS)
    assert step.metrics["grad_norm"] == 0.0
    assert client.loss() != 0.0
    assert math.isfinite(before)


def optim_step_learns(client: Client) -> None:
    before = client.loss()
    for _ in range(5):
        passed = client.training.forward_backward([datum()], "cross_entropy")
        step = client.training.optim_step(ADAM)
        passed.result(timeout=SECONDS)
        metrics = step.result(timeout=SECONDS).metrics
    assert metrics["grad_norm"] > 0
    assert metrics["learning_rate"] == ADAM.learning_rate
    assert client.loss() < before


def importance_sampling(client: Client) -> None:
    _policy_loss(client, "importance_sampling", lambda ratio, adv: ratio * adv)


def ppo(client: Client) -> None:
    def clipped(ratio: Any, adv: Any) -> Any:
        return np.minimum(ratio * adv, np.clip(ratio, 0.9, 1.1) * adv)

    _policy_loss(client, "ppo", clipped, clip_low_threshold=0.9, clip_high_threshold=1.1)


def _policy_loss(client: Client, name: str, objective: Callable[[Any, Any], Any], **config: float) -> None:
    current = client.training.forward([datum()], "cross_entropy").result(timeout=SECONDS)
    learner = current.loss_fn_outputs[0]["logprobs"].to_numpy()
    sampler = learner - np.linspace(-0.3, 0.3, 7)
    advantages = np.array([0.0, 1.0, -1.0, 0.5, -0.5, 2.0, 1.0])
    result = client.passed([datum(logprobs=sampler, advantages=advantages)], name, **config)
    expected = -objective(np.exp(learner - sampler), advantages).sum()
    assert math.isclose(result.metrics["loss:sum"], expected, rel_tol=1e-4), (result.metrics, expected)
    client.training.optim_step(types.AdamParams(learning_rate=0.0)).result(timeout=SECONDS)


def many_datums_in_chunks(client: Client) -> None:
    """More datums than the SDK puts into one request."""
    result = client.passed([datum(IDS[:3]) for _ in range(1100)])
    assert len(result.loss_fn_outputs) == 1100
    client.training.optim_step(types.AdamParams(learning_rate=0.0)).result(timeout=SECONDS)


def a_custom_loss(client: Client) -> None:
    import torch

    def squares(
        data: list[types.Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        loss = torch.stack([(values**2).sum() for values in logprobs]).sum()
        return loss, {"squares": float(loss.detach())}

    result = client.training.forward_backward_custom([datum()], squares).result(timeout=SECONDS)
    assert result.metrics["squares"] > 0
    client.training.optim_step(types.AdamParams(learning_rate=0.0)).result(timeout=SECONDS)


def a_traced_custom_loss(client: Client) -> None:
    """As the SDK traces it; the graph stays with the client, and its loss is that of the built-in."""

    def weighted(logprobs: Any, weights: Any) -> Any:
        loss = -(logprobs * weights).sum()
        return loss, {"custom/weighted:sum": loss}

    handle = client.service.create_custom_loss(weighted, {"logprobs": 1, "weights": 1}).result(
        timeout=SECONDS
    )
    assert handle.loss_id is None
    data = [datum(weights=[1, 0, 2, 0.5, 1, 3, 1])]
    traced = client.training.forward_backward_custom(data, handle).result(timeout=SECONDS).metrics
    plain = client.passed(data).metrics
    assert math.isclose(traced["loss:sum"], plain["loss:sum"], rel_tol=1e-5)
    assert math.isclose(traced["custom/weighted:sum"], plain["loss:sum"], rel_tol=1e-5)
    client.training.optim_step(types.AdamParams(learning_rate=0.0)).result(timeout=SECONDS)


def save_and_load_state(client: Client) -> None:
    saved = client.training.save_state("verbs").result(timeout=SECONDS)
    assert saved.path == f"tinker://{client.training.model_id}/weights/verbs"
    before = client.loss()
    client.passed([datum()])
    client.training.optim_step(types.AdamParams(learning_rate=1e-2)).result(timeout=SECONDS)
    assert client.loss() != before
    client.training.load_state(saved.path).result(timeout=SECONDS)
    assert client.loss() == before


def resume_with_the_optimizer(client: Client) -> None:
    """Uninterrupted, resumed with the moments, and resumed cold: the first two are equal, the third is not."""
    client.passed([datum()])
    client.training.optim_step(ADAM).result(timeout=SECONDS)
    path = client.training.save_state("resume").result(timeout=SECONDS).path
    warm = client.service.create_training_client_from_state_with_optimizer(path)
    cold = client.service.create_training_client_from_state(path)
    losses = []
    for training in (client.training, warm, cold):
        training.forward_backward([datum()], "cross_entropy").result(timeout=SECONDS)
        training.optim_step(ADAM).result(timeout=SECONDS)
        losses.append(client.loss(training))
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def sample_from_named_weights(client: Client) -> None:
    saved = client.training.save_weights_for_sampler("verbs").result(timeout=SECONDS)
    assert saved.path == f"tinker://{client.training.model_id}/sampler_weights/verbs"
    sampler = client.service.create_sampling_client(model_path=saved.path)
    params = types.SamplingParams(max_tokens=5, temperature=0.5, seed=3)
    prompt = types.ModelInput.from_ints(IDS)
    one = sampler.sample(prompt=prompt, num_samples=2, sampling_params=params).result(timeout=SECONDS)
    two = sampler.sample(prompt=prompt, num_samples=2, sampling_params=params).result(timeout=SECONDS)
    assert [s.tokens for s in one.sequences] == [s.tokens for s in two.sequences], "the seed is a seed"
    for sequence in one.sequences:
        assert 1 <= len(sequence.tokens) <= 5
        assert len(sequence.logprobs) == len(sequence.tokens)
        assert max(sequence.logprobs) <= 0
        assert sequence.stop_reason in ("stop", "length")


def sample_from_ephemeral_weights_and_base(client: Client) -> None:
    prompt, params = types.ModelInput.from_ints(IDS), types.SamplingParams(max_tokens=4, temperature=0.0)
    base = client.service.create_sampling_client(base_model="tuft/demo")
    tuned = client.training.save_weights_and_get_sampling_client()
    scores = [
        sampler.compute_logprobs(types.ModelInput.from_ints(IDS)).result(timeout=SECONDS)
        for sampler in (base, tuned)
    ]
    for found in scores:
        assert found[0] is None
        assert len(found) == len(IDS)
    assert sum(scores[1][1:]) > sum(scores[0][1:]), "what was trained became likelier"
    assert math.isclose(-sum(scores[1][1:]), client.loss(), rel_tol=1e-4), "sampler and trainer agree"
    for sampler in (base, tuned):
        tokens = sampler.sample(prompt=prompt, num_samples=1, sampling_params=params).result(timeout=SECONDS)
        assert len(tokens.sequences[0].tokens) <= 4


def sampling_stops_where_it_is_told(client: Client) -> None:
    sampler = client.service.create_sampling_client(base_model="tuft/demo")
    prompt = types.ModelInput.from_ints(IDS)

    def draw(**params: Any) -> Any:
        params = types.SamplingParams(temperature=0.0, **params)
        return (
            sampler.sample(prompt=prompt, num_samples=1, sampling_params=params)
            .result(timeout=SECONDS)
            .sequences[0]
        )

    free = draw(max_tokens=12, stop=[])
    assert len(free.tokens) == 12
    assert free.stop_reason == "length"
    stopped = draw(max_tokens=12, stop=[free.tokens[3]])
    assert stopped.tokens == free.tokens[: free.tokens.index(free.tokens[3]) + 1]
    assert stopped.stop_reason == "stop"


def prompt_logprobs_and_top_k(client: Client) -> None:
    sampler = client.service.create_sampling_client(base_model="tuft/demo")
    result = sampler.sample(
        prompt=types.ModelInput.from_ints(IDS),
        num_samples=1,
        sampling_params=types.SamplingParams(max_tokens=1),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
    ).result(timeout=SECONDS)
    assert result.prompt_logprobs[0] is None
    assert len(result.prompt_logprobs) == len(IDS)
    assert result.topk_prompt_logprobs[0] is None
    for row, own in zip(result.topk_prompt_logprobs[1:], result.prompt_logprobs[1:], strict=True):
        assert len(row) == 3
        assert row[0][1] >= own - 1e-4


def many_samples_at_once(client: Client) -> None:
    sampler = client.service.create_sampling_client(base_model="tuft/demo")
    params = types.SamplingParams(max_tokens=4)
    futures = [
        sampler.sample(
            prompt=types.ModelInput.from_ints(IDS[: 2 + i % 6]), num_samples=2, sampling_params=params
        )
        for i in range(48)
    ]
    assert all(len(future.result(timeout=SECONDS).sequences) == 2 for future in futures)


def tokenizer_is_found_offline(client: Client) -> None:
    tokenizer = client.training.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("What colour is a cat?")) == "What colour is a cat?"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    base = client.service.create_sampling_client(base_model="tuft/demo").get_tokenizer()
    assert len(base) == len(tokenizer)


def rest_lists_runs_and_checkpoints(client: Client) -> None:
    runs = client.rest.list_training_runs().result(timeout=SECONDS)
    assert client.training.model_id in [run.training_run_id for run in runs.training_runs]
    one = client.rest.get_training_run(client.training.model_id).result(timeout=SECONDS)
    assert one.base_model == "tuft/demo"
    assert one.lora_rank == 8
    path = client.training.save_state("listed", ttl_seconds=3600).result(timeout=SECONDS).path
    mine = client.rest.list_checkpoints(client.training.model_id).result(timeout=SECONDS).checkpoints
    found = next(checkpoint for checkpoint in mine if checkpoint.tinker_path == path)
    assert found.size_bytes > 0
    assert found.expires_at is not None
    everything = client.rest.list_user_checkpoints().result(timeout=SECONDS).checkpoints
    assert path in [checkpoint.tinker_path for checkpoint in everything]
    info = client.rest.get_weights_info_by_tinker_path(path).result(timeout=SECONDS)
    assert (info.base_model, info.lora_rank) == ("tuft/demo", 8)
    client.rest.set_checkpoint_ttl_from_tinker_path(path, None).result(timeout=SECONDS)
    client.rest.publish_checkpoint_from_tinker_path(path).result(timeout=SECONDS)
    client.rest.unpublish_checkpoint_from_tinker_path(path).result(timeout=SECONDS)
    client.rest.delete_checkpoint_from_tinker_path(path).result(timeout=SECONDS)
    left = client.rest.list_checkpoints(client.training.model_id).result(timeout=SECONDS).checkpoints
    assert path not in [checkpoint.tinker_path for checkpoint in left]


def rest_shows_the_session(client: Client) -> None:
    session = client.training.model_id.split(":")[0]
    shown = client.rest.get_session(session).result(timeout=SECONDS)
    assert client.training.model_id in shown.training_run_ids
    assert session in client.rest.list_sessions().result(timeout=SECONDS).sessions


REFUSED = {
    "a token outside the vocabulary": (
        lambda c: c.passed([datum(), datum([1, 9999, 3])]),
        "datum 1.*9999.*vocabulary of 2048",
    ),
    "a sequence over the model's length": (lambda c: c.passed([datum([5] * 3000)]), "datum 0.*2999.*2048"),
    "weights of another length": (
        lambda c: c.passed([datum(weights=[1.0, 1.0])]),
        "datum 0.*weights.*2.*7",
    ),
    "a loss that is not known": (lambda c: c.passed([datum()], "nonsense"), "nonsense.*cross_entropy"),
    "a loss whose formula is not public": (
        lambda c: c.passed([datum()], "stable_reinforce"),
        "not public.*importance_sampling",
    ),
    "advantages that are missing": (
        lambda c: c.passed([datum(logprobs=[0.0] * 7)], "importance_sampling"),
        "datum 0.*advantages",
    ),
    "a number that is none": (
        lambda c: c.passed([datum(weights=[math.nan] * 7)]),
        "datum 0.*weights.*(finite|nan)",
    ),
    "a learning rate that is none": (
        lambda c: c.training.optim_step(types.AdamParams(learning_rate=math.nan)).result(timeout=SECONDS),
        "learning_rate",
    ),
    "a rank over the limit": (
        lambda c: c.service.create_lora_training_client(base_model="tuft/demo", rank=999).get_info(),
        "rank: 999 is outside 1..64",
    ),
    "a model that is not offered": (
        lambda c: c.service.create_lora_training_client(base_model="no/such").get_info(),
        "no/such.*Supported models: tuft/demo",
    ),
    "a checkpoint that does not exist": (
        lambda c: c.service.create_sampling_client(
            model_path="tinker://x:train:0/sampler_weights/y"
        ).get_base_model(),
        "does not exist",
    ),
    "a prompt over the model's length": (
        lambda c: (
            c.service.create_sampling_client(base_model="tuft/demo")
            .sample(types.ModelInput.from_ints([5] * 3000), 1, types.SamplingParams(max_tokens=1))
            .result(timeout=SECONDS)
        ),
        "3000.*2048",
    ),
}
"""What must be refused: how it is asked, and a pattern of what is said."""


def refuse(client: Client, name: str) -> None:
    """The refusal is prompt, names what is wrong, and leaves the run as it was."""
    import re
    import time

    ask, said = REFUSED[name]
    before = client.loss()
    began = time.monotonic()
    try:
        ask(client)
    except Exception as error:  # noqa: BLE001 - the SDK has many kinds, the text is what counts
        text = str(error)
        assert "Traceback" not in text, text
        assert re.search(said, text), text
    else:
        raise AssertionError(f"{name} was accepted")
    assert time.monotonic() - began < 10
    assert client.loss() == before


VERBS = [
    capabilities,
    get_info,
    forward_backward_cross_entropy,
    forward_leaves_no_gradient,
    optim_step_learns,
    importance_sampling,
    ppo,
    many_datums_in_chunks,
    a_custom_loss,
    a_traced_custom_loss,
    save_and_load_state,
    resume_with_the_optimizer,
    sample_from_named_weights,
    sample_from_ephemeral_weights_and_base,
    sampling_stops_where_it_is_told,
    prompt_logprobs_and_top_k,
    many_samples_at_once,
    tokenizer_is_found_offline,
    rest_lists_runs_and_checkpoints,
    rest_shows_the_session,
]
