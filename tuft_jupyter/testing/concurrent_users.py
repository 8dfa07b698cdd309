"""``python -m tuft_jupyter.testing.concurrent_users 4``: do several people who train at once get what each gets alone?

Each user has a client, a thread and an adapter: three times forward_backward and optim_step, then a sample of the
trained weights. All of them at once, then (unless ``--no-alone``) each again by itself with the same seed: the loss
curves must be equal. The server is that of ``TINKER_BASE_URL`` and ``TINKER_API_KEY`` or, without them, the one that
``%tuft init`` would find or start. Ends with 0 if every user succeeded.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

TOLERANCE = 1e-4
"""Relative: fp32 on a CPU is within 1e-6; bf16 rounds differently in other company."""
ROWS, LENGTH, VOCABULARY = 2, 24, 256


@dataclass(frozen=True, slots=True)
class User:
    """What became of one user: its loss per step, or why there is none."""

    name: str
    losses: tuple[float, ...] = ()
    tokens: int = 0
    seconds: float = 0.0
    error: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tuft_jupyter.testing.concurrent_users")
    parser.add_argument("users", nargs="?", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="training steps of each user")
    parser.add_argument("--model", default=None, help="base model; by default the server's first")
    parser.add_argument("--no-alone", dest="alone", action="store_false", help="leave out the comparison")
    options = parser.parse_args(arguments)
    client = connect()
    model = options.model or client.get_server_capabilities().supported_models[0].model_name
    print(f"{options.users} users, {options.steps} steps each, {model}")
    train_and_sample(client, model, 0, 1)  # whoever comes first waits for the model to load
    began = time.perf_counter()
    with ThreadPoolExecutor(options.users) as pool:
        together = list(
            pool.map(lambda user: attempt(client, model, user, options.steps), range(options.users))
        )
    wall = time.perf_counter() - began
    if options.alone:
        together = [compared(client, model, i, user) for i, user in enumerate(together)]
    report(together, wall)
    return int(any(user.error for user in together))


def connect() -> Any:
    """An SDK client of a server that answers ``healthz``."""
    address = os.environ.get("TINKER_BASE_URL")
    if address:
        import tinker

        client = tinker.ServiceClient()
    else:
        import tuft_jupyter

        client = tuft_jupyter.get_service_client()
        address = os.environ["TINKER_BASE_URL"]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{address.rstrip('/')}/api/v1/healthz", timeout=30) as answer:
        print(f"healthz of {address}: {answer.status}")
    return client


def attempt(client: Any, model: str, user: int, steps: int) -> User:
    """A failure of one user is its own."""
    try:
        return train_and_sample(client, model, user, steps)
    except Exception as error:  # noqa: BLE001 - whatever the SDK raises is this user's result
        return User(f"user {user}", error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def train_and_sample(client: Any, model: str, user: int, steps: int) -> User:
    """What one user does, from the new adapter to the sample."""
    from tinker import types

    began = time.perf_counter()
    training = client.create_lora_training_client(base_model=model, rank=8, seed=user)
    training = training.result() if hasattr(training, "result") else training
    data = [_datum(types, user, row) for row in range(ROWS)]
    losses = []
    for _ in range(steps):
        passed = training.forward_backward(data, "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
        losses.append(float(passed.result().metrics["loss:sum"]))
    sampling = training.save_weights_and_get_sampling_client(name=f"user-{user}")
    answer = sampling.sample(
        prompt=types.ModelInput.from_ints(_tokens(user, 0)[:8]),
        num_samples=1,
        sampling_params=types.SamplingParams(max_tokens=8, seed=user),
    ).result()
    tokens = len(answer.sequences[0].tokens)
    if not tokens:
        raise RuntimeError("the sample has no tokens")
    if not all(math.isfinite(loss) for loss in losses) or (steps > 1 and losses[-1] >= losses[0]):
        raise RuntimeError(f"the loss does not fall: {losses}")
    return User(f"user {user}", tuple(losses), tokens, time.perf_counter() - began)


def compared(client: Any, model: str, index: int, user: User) -> User:
    """The same user once more, with nobody else there: a curve that differs is a failure."""
    if user.error:
        return user
    alone = attempt(client, model, index, len(user.losses))
    if alone.error:
        return User(user.name, error=f"alone: {alone.error}")
    gap = max(abs(a - b) / abs(b) for a, b in zip(user.losses, alone.losses, strict=True))
    if gap > TOLERANCE:
        return User(
            user.name, error=f"losses differ by {gap:.1e} from those alone: {user.losses}, {alone.losses}"
        )
    return user


def report(users: Sequence[User], wall: float) -> None:
    """Each user's time, the mean, and what working at once gained over one after the other."""
    for user in users:
        losses = " -> ".join(f"{loss:.3f}" for loss in user.losses)
        print(f"{user.name}: " + (user.error or f"{user.seconds:.2f} s, loss {losses}, {user.tokens} tokens"))
    times = [user.seconds for user in users if not user.error]
    if times:
        print(f"Mean time per user: {statistics.mean(times):.2f} s")
        print(f"Wall time: {wall:.2f} s, speedup: {sum(times) / wall:.2f}x")
    failed = sum(bool(user.error) for user in users)
    print(f"Successful: {len(users) - failed}, Failed: {failed}")


def _datum(types: Any, user: int, row: int) -> Any:
    tokens = _tokens(user, row)
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * LENGTH}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def _tokens(user: int, row: int) -> list[int]:
    return [(31 * user + 7 * row + 13 * i) % VOCABULARY for i in range(LENGTH + 1)]


if __name__ == "__main__":
    sys.exit(main())
