"""A loss of one's own on a server whose operator allows it: the stock SDK uploads its graph and trains with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tinker
from tinker import types

from examples.run_on_server import Server
from tests.contract.conftest import clean_environment
from tests.support.live import key_of, sdk
from tests.support.sdk_verbs import datum

SECONDS = 120

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tinker.ServiceClient]:
    home = tmp_path_factory.mktemp("custom-loss")
    root = home / "notebooks"
    root.mkdir()
    env = {**clean_environment(home), "TUFT_CUSTOM_LOSS_SERVER_SIDE": "true"}
    with (
        Server(root, home, base_url="/user/alice/", env=env) as server,
        sdk(f"{server.url}tuft", key_of(server.work)) as client,
    ):
        yield client


def hinge(logprobs: Any, weights: Any, margin: Any) -> Any:
    """Below the margin, a position pulls harder the further off it is."""
    import torch

    gap = torch.clamp(margin - logprobs, min=0) * weights
    return (gap**2).sum() / 2, {"custom/gap:mean": gap.mean(), "custom/below:sum": (gap > 0).float().sum()}


def as_a_callable(data: list[types.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    """The same for :meth:`forward_backward_custom` as every SDK has it."""
    import torch

    parts = [
        hinge(p, d.loss_fn_inputs["weights"].to_torch(), d.loss_fn_inputs["margin"].to_torch())
        for d, p in zip(data, logprobs, strict=True)
    ]
    return torch.stack([loss for loss, _ in parts]).sum(), {}


def test_the_stock_sdk_uploads_its_loss_and_three_steps_are_those_of_the_client_side(
    client: tinker.ServiceClient,
) -> None:
    """H9, S0-01: one HTTP round trip in place of two passes; the same losses, gradients norms and weights after."""
    handle = client.create_custom_loss(hinge, {"logprobs": 1, "weights": 1, "margin": 1}).result(
        timeout=SECONDS
    )
    assert handle.loss_id is not None
    data = [datum(weights=[1, 0, 2, 0.5, 1, 3, 1], margin=[-2.0] * 7)] * 3
    data += [datum([101, 42, 37], weights=[1, 2], margin=[-1.0, -9.0])]
    seen = []
    for loss in (handle, as_a_callable):
        run = client.create_lora_training_client(base_model="tuft/demo", rank=8, seed=7).result(
            timeout=SECONDS
        )
        for _ in range(3):
            passed = run.forward_backward_custom(data, loss).result(timeout=SECONDS)
            step = run.optim_step(types.AdamParams(learning_rate=1e-2)).result(timeout=SECONDS)
            seen.append([passed.metrics["loss:sum"], step.metrics["grad_norm"]])
            if loss is handle:
                assert passed.metrics["custom/below:sum"] > 0
                assert passed.metrics["custom/gap:mean"] > 0
        last = run.forward(data, "cross_entropy").result(timeout=SECONDS)
        seen.append([last.metrics["loss:sum"]])
    assert seen[0][0] > seen[2][0], "it learns"
    for here, there in zip(seen[:4], seen[4:], strict=True):
        assert here == pytest.approx(there, rel=1e-4)


def test_a_loss_the_server_does_not_compute_is_refused_when_it_is_uploaded(
    client: tinker.ServiceClient,
) -> None:
    """H9: by node and name, as a 4xx that the SDK does not retry; a callable still works."""

    def sorted_by_mask(logprobs: Any, weights: Any) -> Any:
        import torch

        return torch.masked_select(logprobs, weights > 0).sum(), {}

    with pytest.raises(tinker.BadRequestError, match=r"masked_select.*may not be called"):
        client.create_custom_loss(sorted_by_mask, {"logprobs": 1, "weights": 1}).result(timeout=SECONDS)


def test_a_datum_that_does_not_fit_is_the_users_failure(client: tinker.ServiceClient) -> None:
    """S1-34: the run goes on."""

    def weighed(logprobs: Any, weights: Any) -> Any:
        return -(logprobs * weights[:3]).sum(), {}

    handle = client.create_custom_loss(weighed, {"logprobs": 1, "weights": 1}).result(timeout=SECONDS)
    run = client.create_lora_training_client(base_model="tuft/demo", rank=8, seed=7).result(timeout=SECONDS)
    with pytest.raises(tinker.RequestFailedError, match=r"datum 0: custom loss, node mul \(operator\.mul\)"):
        run.forward_backward_custom([datum(weights=[1.0] * 7)], handle).result(timeout=SECONDS)
    assert run.forward_backward([datum()], "cross_entropy").result(timeout=SECONDS).metrics["loss:sum"] > 0
