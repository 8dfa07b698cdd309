"""Forty training steps, sampling, saving, resuming and the REST client, with nothing but what every SDK since 0.16 has.

Run by ``tests/support/sdk_matrix.py`` once for each SDK version, in that version's environment, against one server that
the environment variables name. It imports nothing but tinker. The last line it prints is JSON: what each part came
to (``ok`` or its traceback) and the numbers that have to be the same for every version.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import traceback
from typing import Any

import tinker
from tinker import types

SECONDS = 120
BASE = "tuft/demo"
IDS = [101, 42, 37, 102, 57, 12, 7, 99]
OTHER = [5, 88, 301, 17, 64]
ADAM = types.AdamParams(learning_rate=1e-3)
ADVANTAGES = [0.0, 1.0, -1.0, 0.5, -0.5, 2.0, 1.0]


def tensor(values: list[Any], dtype: Any) -> types.TensorData:
    return types.TensorData(data=values, dtype=dtype, shape=[len(values)])


def datum(ids: list[int], **inputs: list[float]) -> types.Datum:
    """Predict each next token of ``ids``; further inputs are float32 lists."""
    more = {name: tensor(values, "float32") for name, values in inputs.items()}
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={"target_tokens": tensor(ids[1:], "int64"), **more},
    )


SUPERVISED = [
    datum(IDS, weights=[1.0] * (len(IDS) - 1)),
    datum(OTHER, weights=[0.0, 1.0, 0.5, 2.0]),
]


class Script:
    def __init__(self) -> None:
        self.numbers: dict[str, list[float]] = {}
        self.service = tinker.ServiceClient(user_metadata={"script": "matrix"})
        self.rest = self.service.create_rest_client()
        self.saved = ""

    def note(self, name: str, *values: float) -> None:
        self.numbers.setdefault(name, []).extend(float(value) for value in values)

    # ---- training

    def step(
        self,
        client: Any,
        data: list[Any],
        loss: str = "cross_entropy",
        config: dict[str, float] | None = None,
    ) -> Any:
        """One pass and one step, both sent before the first answer is there."""
        passed = client.forward_backward(data, loss, config)
        stepped = client.optim_step(ADAM)
        result = passed.result(SECONDS)
        self.note("loss", result.metrics["loss:sum"])
        self.note("grad_norm", stepped.result(SECONDS).metrics["grad_norm"])
        return result

    async def step_async(self, client: Any) -> None:
        passed = await client.forward_backward_async(SUPERVISED, "cross_entropy")
        stepped = await client.optim_step_async(ADAM)
        self.note("loss", (await passed.result_async()).metrics["loss:sum"])
        self.note("grad_norm", (await stepped.result_async()).metrics["grad_norm"])

    def training(self) -> None:
        """Steps 1 to 34: supervised, policy losses, a loss of the client's own; and a refusal that is prompt."""
        offered = self.service.get_server_capabilities().supported_models
        assert BASE in [model.model_name for model in offered]
        self.client = client = ready(
            self.service.create_lora_training_client(
                BASE, rank=8, seed=7, user_metadata={"renderer_name": "role_colon"}
            )
        )
        info = client.get_info()
        assert (info.model_data.model_name, info.lora_rank, info.is_lora) == (BASE, 8, True)
        for _ in range(14):
            result = self.step(client, SUPERVISED)
        assert [len(output["logprobs"].data) for output in result.loss_fn_outputs] == [7, 4]
        for _ in range(2):
            asyncio.run(self.step_async(client))
        assert self.numbers["loss"][15] < self.numbers["loss"][0], "it learns"
        for loss, config in (
            ("importance_sampling", None),
            ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
        ):
            seen = client.forward([datum(IDS)], "cross_entropy").result(SECONDS)
            sampled = seen.loss_fn_outputs[0]["logprobs"].to_numpy()
            self.note("loss", seen.metrics["loss:sum"])
            for _ in range(8):
                self.step(
                    client, [datum(IDS, logprobs=sampled.tolist(), advantages=ADVANTAGES)], loss, config
                )
        for _ in range(2):
            own = client.forward_backward_custom(SUPERVISED, squares).result(SECONDS)
            self.note("loss", own.metrics["squares"])
            self.note("grad_norm", client.optim_step(ADAM).result(SECONDS).metrics["grad_norm"])
        self.in_chunks()
        self.refused()
        # What an interrupt of %%tuft_train looks at: requests that were numbered, and those that were sent.
        assert client._turn_counter == client._request_id_counter > 2 * 34

    def in_chunks(self) -> None:
        """More datums than any version puts into one request."""
        many = [datum(OTHER[: 2 + index % 3]) for index in range(1100)]
        outputs = self.client.forward(many, "cross_entropy").result(SECONDS).loss_fn_outputs
        assert [len(output["logprobs"].data) for output in outputs] == [
            1 + index % 3 for index in range(1100)
        ]
        self.note("logprob", *(sum(output["logprobs"].data) for output in outputs[-3:]))

    def refused(self) -> None:
        """A mistake is told at once and as what it is, not tried again."""
        began, told = time.monotonic(), ""
        try:
            self.client.forward_backward([datum([1, 9999, 3])], "cross_entropy").result(SECONDS)
        except tinker.RequestFailedError as error:
            told = str(error)
        assert "datum 0: " in told, told
        assert "9999" in told, told
        assert time.monotonic() - began < 10, "a refusal is not tried again"

    # ---- saving and resuming

    def saving(self) -> None:
        """Steps 35 to 40, twice: uninterrupted and resumed with the optimizer they are equal; cold they are not."""
        client = self.client
        self.saved = client.save_state("matrix").result(SECONDS).path
        assert self.saved == f"tinker://{info_id(client)}/weights/matrix"
        warm = ready(self.service.create_training_client_from_state_with_optimizer(self.saved))
        cold = ready(self.service.create_training_client_from_state(self.saved))
        for _ in range(6):
            self.step(client, SUPERVISED)
        losses = {"went on": self.loss(client)}
        for name, resumed in (("warm", warm), ("cold", cold)):
            for _ in range(6):
                resumed.forward_backward(SUPERVISED, "cross_entropy").result(SECONDS)
                resumed.optim_step(ADAM).result(SECONDS)
            losses[name] = self.loss(resumed)
        assert losses["went on"] == losses["warm"], losses
        assert losses["went on"] != losses["cold"], losses
        self.note("loss", *losses.values())
        client.load_state(self.saved).result(SECONDS)
        self.note("loss", self.loss(client))
        warm.load_state_with_optimizer(self.saved).result(SECONDS)
        assert self.loss(warm) == self.loss(client)

    def loss(self, client: Any) -> float:
        return float(client.forward(SUPERVISED, "cross_entropy").result(SECONDS).metrics["loss:sum"])

    # ---- sampling

    def sampling(self) -> None:
        """From the base model, from named weights, from weights that have no name; scores equal the trainer's."""
        client = self.client
        path = client.save_weights_for_sampler("matrix").result(SECONDS).path
        assert path == f"tinker://{info_id(client)}/sampler_weights/matrix"
        unnamed = ready(client.save_weights_and_get_sampling_client())
        samplers = [
            ready(self.service.create_sampling_client(base_model=BASE)),
            ready(self.service.create_sampling_client(model_path=path)),
            ready(client.create_sampling_client(path)),
            unnamed,
        ]
        prompt = types.ModelInput.from_ints(IDS)
        scores = [sampler.compute_logprobs(prompt).result(SECONDS) for sampler in samplers]
        assert all(found[0] is None and len(found) == len(IDS) for found in scores)
        assert scores[1] == scores[2] == scores[3]
        trained = client.forward([datum(IDS)], "cross_entropy").result(SECONDS).metrics["loss:sum"]
        assert math.isclose(-sum(scores[1][1:]), trained, rel_tol=1e-4), "sampler and trainer agree"
        self.note("logprob", *scores[0][1:], *scores[1][1:])
        for sampler, params in (
            (samplers[1], types.SamplingParams(max_tokens=6, temperature=0.0)),
            (unnamed, types.SamplingParams(max_tokens=6, temperature=0.7, seed=3, stop=[IDS[3]])),
            (samplers[0], types.SamplingParams(max_tokens=6, temperature=0.7, seed=3, top_k=20, top_p=0.9)),
        ):
            drawn = sampler.sample(prompt=prompt, num_samples=2, sampling_params=params).result(SECONDS)
            assert len(drawn.sequences) == 2
            for sequence in drawn.sequences:
                assert 1 <= len(sequence.tokens) == len(sequence.logprobs) <= 6
                assert sequence.stop_reason in ("stop", "length")
                self.note("token", *sequence.tokens)
        asyncio.run(self.top_k(samplers[0], prompt))
        assert samplers[1].get_base_model() == BASE
        many = [samplers[1].sample(prompt, 1, types.SamplingParams(max_tokens=2)) for _ in range(32)]
        assert all(len(future.result(SECONDS).sequences) == 1 for future in many)

    async def top_k(self, sampler: Any, prompt: Any) -> None:
        found = await sampler.sample_async(
            prompt=prompt,
            num_samples=1,
            sampling_params=types.SamplingParams(max_tokens=1),
            include_prompt_logprobs=True,
            topk_prompt_logprobs=3,
        )
        assert found.prompt_logprobs[0] is None
        assert found.topk_prompt_logprobs[0] is None
        rows = found.topk_prompt_logprobs[1:]
        assert [len(row) for row in rows] == [3] * (len(IDS) - 1)
        self.note("logprob", *(logprob for row in rows for _, logprob in row))
        self.note("token", *(token for row in rows for token, _ in row))

    # ---- the REST client

    def listing(self) -> None:
        rest, run = self.rest, info_id(self.client)
        runs = rest.list_training_runs().result(SECONDS)
        assert run in [one.training_run_id for one in runs.training_runs]
        one = rest.get_training_run(run).result(SECONDS)
        assert (one.base_model, one.lora_rank) == (BASE, 8)
        assert one.user_metadata == {"renderer_name": "role_colon"}
        assert rest.get_training_run_by_tinker_path(self.saved).result(SECONDS).training_run_id == run
        mine = rest.list_checkpoints(run).result(SECONDS).checkpoints
        kinds = {checkpoint.checkpoint_id: checkpoint.checkpoint_type for checkpoint in mine}
        assert kinds["weights/matrix"] == "training"
        assert kinds["sampler_weights/matrix"] == "sampler"
        everything = rest.list_user_checkpoints().result(SECONDS).checkpoints
        assert self.saved in [checkpoint.tinker_path for checkpoint in everything]
        info = rest.get_weights_info_by_tinker_path(self.saved).result(SECONDS)
        assert (info.base_model, info.is_lora, info.lora_rank) == (BASE, True, 8)
        session = run.split(":")[0]
        assert session in rest.list_sessions().result(SECONDS).sessions
        shown = rest.get_session(session).result(SECONDS)
        assert run in shown.training_run_ids
        sampler = rest.get_sampler(shown.sampler_ids[0]).result(SECONDS)
        assert sampler.base_model == BASE
        rest.set_checkpoint_ttl_from_tinker_path(self.saved, 7200).result(SECONDS)
        rest.publish_checkpoint_from_tinker_path(self.saved).result(SECONDS)
        found = rest.list_checkpoints(run).result(SECONDS).checkpoints
        changed = next(checkpoint for checkpoint in found if checkpoint.tinker_path == self.saved)
        assert changed.public
        assert changed.expires_at is not None
        assert changed.size_bytes > 0
        rest.unpublish_checkpoint_from_tinker_path(self.saved).result(SECONDS)
        rest.delete_checkpoint_from_tinker_path(self.saved).result(SECONDS)
        left = rest.list_checkpoints(run).result(SECONDS).checkpoints
        assert self.saved not in [checkpoint.tinker_path for checkpoint in left]


def info_id(client: Any) -> str:
    return str(client.get_info().model_id)


def ready(made: Any) -> Any:
    """The client itself: newer versions hand out a future of it."""
    return made.result() if hasattr(made, "result") else made


def squares(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    loss = sum((values**2).sum() for values in logprobs)
    return loss, {"squares": float(loss.detach())}


PARTS = {
    "training": Script.training,
    "save/resume": Script.saving,
    "sampling": Script.sampling,
    "REST": Script.listing,
}


def main() -> None:
    script = Script()
    parts = {}
    for name, part in PARTS.items():
        try:
            part(script)
            parts[name] = "ok"
        except Exception:  # noqa: BLE001 - it is reported, and the other parts have their say
            parts[name] = traceback.format_exc()
    steps = len(script.numbers.get("grad_norm", []))
    report = {"version": tinker.__version__, "parts": parts, "steps": steps, "numbers": script.numbers}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
