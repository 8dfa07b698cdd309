"""Which backend serves which operation: the whole truth table, and what is said where nobody does."""

from __future__ import annotations

import itertools

import pytest

from tuft_jupyter.config.backends import Backend, BackendsConfig, from_environment
from tuft_jupyter.core.errors import UserError
from tuft_jupyter.engine.remote.routing import route

# Of every operation: whether the training server and the vLLM server can serve it.
OPERATIONS = {
    "sample": (True, True),
    "asample": (True, True),
    "forward_backward": (True, False),
    "optim_step": (True, False),
    "create_model": (True, False),
    "unload_model": (True, False),
}


def of_flags(megatron: bool, vllm: bool) -> BackendsConfig:
    """Both flags alone: where one is off, nothing stands in for it."""
    return BackendsConfig(
        training="external" if megatron else "none",
        sampling="external" if vllm else "auto" if megatron else "none",
    )


def expected(operation: str, megatron: bool, vllm: bool) -> Backend | str:
    if operation in ("sample", "asample"):
        if vllm:
            return Backend.VLLM_SERVER
        return Backend.TRAINING_SERVER if megatron else "No valid sampling backend configured"
    return Backend.TRAINING_SERVER if megatron else "Training not supported in non-Megatron mode"


@pytest.mark.parametrize(
    ("operation", "megatron", "vllm"), list(itertools.product(OPERATIONS, (False, True), (False, True)))
)
def test_every_operation_goes_where_the_table_says(operation: str, megatron: bool, vllm: bool) -> None:
    """S4-21, S4-22, S4-23, S4-24, S4-25, S4-26, S4-27, S4-28, S4-29, S4-30, S4-31, S4-32: all 24 cases."""
    wanted = expected(operation, megatron, vllm)
    backends = of_flags(megatron, vllm)
    if isinstance(wanted, Backend):
        found = route(operation, backends)
        assert found is wanted
        assert OPERATIONS[operation][found is Backend.VLLM_SERVER]
    else:
        with pytest.raises(UserError, match=wanted):
            route(operation, backends)


@pytest.mark.parametrize(
    "operation", ["forward", "load_weights", "save_weights", "save_weights_for_sampler", "anything_else"]
)
def test_whatever_is_no_sample_belongs_to_whoever_trains(operation: str) -> None:
    """S4-29: the dots of "fwdbwd, optim, add_lora, ..."."""
    assert route(operation, of_flags(True, True)) is Backend.TRAINING_SERVER
    assert route(operation, BackendsConfig()) is Backend.WORKERS
    with pytest.raises(UserError, match="no training backend"):
        route(operation, of_flags(False, True))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_with_nothing_set_our_own_workers_serve_everything(operation: str) -> None:
    """X10, S4-38: also with both flags off, since our own backend is there by default."""
    for env in ({}, {"USE_MEGATRON": "false", "USE_VLLM": "false", "MAX_WORKERS": "4"}):
        backends = BackendsConfig(**from_environment({}, env))
        assert route(operation, backends) is Backend.WORKERS


@pytest.mark.parametrize(
    ("training", "sampling"), list(itertools.product(("peft", "external"), ("torch", "vllm")))
)
def test_workers_of_ours_sample_whoever_trains(training: str, sampling: str) -> None:
    """S4-01: the two are chosen independently."""
    backends = BackendsConfig(training, sampling)
    assert route("asample", backends) is Backend.WORKERS
    assert route("optim_step", backends) is (
        Backend.WORKERS if training == "peft" else Backend.TRAINING_SERVER
    )


def test_a_refusal_names_both_ways_out() -> None:
    """S4-33, S4-34: the phrases that people look for, and what to set."""
    with pytest.raises(UserError) as refused:
        route("asample", BackendsConfig("none", "none"))
    assert all(
        word in refused.value.message
        for word in ("No valid sampling backend configured", "USE_VLLM=true", "USE_MEGATRON=true")
    )
    with pytest.raises(UserError) as refused:
        route("create_model", BackendsConfig("none", "external"))
    assert "Training not supported in non-Megatron mode" in refused.value.message
    assert "USE_MEGATRON=true" in refused.value.message
