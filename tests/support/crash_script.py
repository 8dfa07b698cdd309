"""A training run as a user writes it, for tests that kill what it talks to: prints a line per step, then the result.

``python crash_script.py STEPS`` with TINKER_BASE_URL and TINKER_API_KEY set. The client code is the stock SDK's and
knows nothing of crashes.
"""

from __future__ import annotations

import json
import random
import sys

import tinker
from tinker import types


def batch(rng: random.Random) -> list[types.Datum]:
    data = []
    for _ in range(4):
        ids = [rng.randrange(300, 2000) for _ in range(rng.randrange(6, 40))]
        targets = types.TensorData(data=ids[1:], dtype="int64", shape=[len(ids) - 1])
        model_input = types.ModelInput.from_ints(ids[:-1])
        data.append(types.Datum(model_input=model_input, loss_fn_inputs={"target_tokens": targets}))
    return data


def main(steps: int) -> None:
    rng = random.Random(0)
    service = tinker.ServiceClient()
    training = service.create_lora_training_client(base_model="tuft/demo", rank=8, seed=3)
    losses = []
    for step in range(steps):
        passed = training.forward_backward(batch(rng), "cross_entropy")
        stepped = training.optim_step(types.AdamParams(learning_rate=1e-3))
        losses.append(passed.result().metrics["loss:sum"])
        stepped.result()
        print(json.dumps({"step": step, "loss": losses[-1]}), flush=True)
    final = training.forward(batch(random.Random(1)), "cross_entropy").result()
    logprobs = [output["logprobs"].tolist() for output in final.loss_fn_outputs]
    path = training.save_state("final").result().path
    print(
        json.dumps({"losses": losses, "logprobs": logprobs, "path": path, "run": training.model_id}),
        flush=True,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
