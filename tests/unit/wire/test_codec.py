"""Bodies to values and back, with the SDK's own encoder and decoders as the oracle."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from tinker import types as sdk
from tinker.lib.chunked_fwdbwd_helpers import combine_fwd_bwd_output_results
from tinker.proto import tinker_public_pb2 as sdk_pb
from tinker.proto.response_conv import deserialize_forward_backward_output

from tests.support.sdk_bodies import RUN, sdk_body, sdk_datum
from tuft_jupyter.core.errors import ServerError, TooLarge, UnsupportedMedia, UserError
from tuft_jupyter.core.types import JSON, ForwardBackward, ForwardBackwardResult
from tuft_jupyter.wire import codec
from tuft_jupyter.wire import tuft_wire_pb2 as pb
from tuft_jupyter.wire.peek import Peek


def result(*logprobs: np.ndarray, **metrics: float) -> ForwardBackwardResult:
    return ForwardBackwardResult(
        logprobs=logprobs,
        loss_sum=2.5,
        weight_sum=3.0,
        metrics={k.replace("__", ":"): v for k, v in metrics.items()},
    )


# ---- schema


def test_our_messages_have_the_numbers_names_and_types_of_the_sdk() -> None:
    unused = {"SamplingParams", "StopStrings", "StopTokens"}  # in the SDK's file, never on the wire
    theirs = {k: v for k, v in sdk_pb.DESCRIPTOR.message_types_by_name.items() if k not in unused}
    ours = pb.DESCRIPTOR.message_types_by_name
    assert set(ours) == set(theirs)

    def fields(message: Any) -> dict[int, tuple[Any, ...]]:
        found = {
            f.number: (
                f.name,
                f.type,
                f.is_repeated,
                f.has_presence,
                f.message_type and f.message_type.name,
                f.containing_oneof and f.containing_oneof.name,
            )
            for f in message.fields
        }
        for nested in message.nested_types:  # the entries of maps
            found[-len(found)] = (nested.name, tuple(fields(nested).items()))
        return found

    for name, message in theirs.items():
        assert fields(ours[name]) == fields(message), name
    for name, enum in sdk_pb.DESCRIPTOR.enum_types_by_name.items():
        assert pb.DESCRIPTOR.enum_types_by_name[name].values_by_number.keys() == enum.values_by_number.keys()


# ---- requests from the SDK


@pytest.mark.parametrize("forward_only", [False, True])
def test_a_request_of_the_sdk_is_read_as_it_was_meant(forward_only: bool) -> None:
    weights = np.array([0, 0.5, -1, 2, 1], np.float32)
    body = sdk_body(
        [sdk_datum(target_tokens=[1, 2, 3, 4, 5], weights=weights), sdk_datum(2)],
        "ppo",
        {"clip_low_threshold": 0.9, "mode": "soft"},
        forward_only=forward_only,
    )
    request = codec.decode_forward_backward(body)

    assert isinstance(request, ForwardBackward)
    assert request.loss_fn == "ppo"
    assert request.loss_config == {"clip_low_threshold": 0.9, "mode": "soft"}
    assert request.backward is not forward_only
    first, second = request.data
    assert first.tokens.dtype == np.int32
    assert first.tokens.tolist() == [10, 11, 12, 13, 14]
    assert first.inputs["target_tokens"].dtype == np.int64
    assert first.inputs["target_tokens"].tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(first.inputs["weights"], weights)
    assert second.tokens.tolist() == [10, 11]
    assert all(array.flags.writeable and array.flags.owndata for array in (first.tokens, second.tokens))


def test_the_newer_loss_config_wins_over_the_older_one() -> None:
    message = sdk_pb.ForwardBackwardRequest.FromString(sdk_body([sdk_datum()], "ppo", {"clip": 0.9}))
    message.loss_fn_config["clip"] = 0.1
    message.loss_fn_config["older"] = 0.2
    request = codec.decode_forward_backward(message.SerializeToString())
    assert request.loss_config == {"clip": 0.9, "older": 0.2}


def test_soft_targets_are_read_dense_and_sparse_alike() -> None:
    targets = torch.zeros(6, 20, dtype=torch.int64)
    targets[0, 0], targets[3, 7], targets[5, 19] = 5, 9, 11
    weights = torch.rand(6, 3)  # too full to be worth CSR
    datum = sdk_datum(6, target_tokens=targets, weights=weights)
    assert datum.loss_fn_inputs["target_tokens"].sparse_crow_indices is not None
    assert datum.loss_fn_inputs["weights"].sparse_crow_indices is None

    inputs = codec.decode_forward_backward(sdk_body([datum])).data[0].inputs

    np.testing.assert_array_equal(inputs["target_tokens"], targets.numpy())
    np.testing.assert_array_equal(inputs["weights"], weights.numpy())


def test_int32_and_bfloat16_are_widened() -> None:
    message = pb.ForwardBackwardRequest(model_id=RUN, seq_id=1, loss_fn="cross_entropy")
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.arange(2, dtype=np.int32).tobytes()
    whole = datum.loss_fn_inputs["target_tokens"]
    whole.dtype, whole.dense = pb.DTYPE_INT32, np.array([-1, 2], np.int32).tobytes()
    half = datum.loss_fn_inputs["weights"]
    half.dtype = pb.DTYPE_BFLOAT16
    half.dense = torch.tensor([0.5, -3.0]).bfloat16().view(torch.int16).numpy().tobytes()
    inputs = codec.decode_forward_backward(message.SerializeToString()).data[0].inputs
    assert (inputs["target_tokens"].dtype, inputs["target_tokens"].tolist()) == (np.int64, [-1, 2])
    assert (inputs["weights"].dtype, inputs["weights"].tolist()) == (np.float32, [0.5, -3.0])


def test_several_chunks_are_one_sequence_and_provenance_is_ignored() -> None:
    span = sdk.SampledProvenanceSpan(sequence_id="s", length=3)
    datum = sdk.Datum(
        model_input=sdk.ModelInput(
            chunks=[sdk.EncodedTextChunk(tokens=[1]), sdk.EncodedTextChunk(tokens=[2, 3])]
        ),
        loss_fn_inputs={"target_tokens": [2, 3, 4]},
    ).with_provenance(model_input=[span], loss_fn_inputs=[span])
    body = sdk_body([datum])
    assert codec.decode_forward_backward(body).data[0].tokens.tolist() == [1, 2, 3]
    assert codec.peek_forward_backward(body).tokens == 3


def test_the_json_of_older_sdks_means_the_same() -> None:
    matrix = {
        "data": [5, 9],
        "dtype": "int64",
        "shape": [3, 4],
        "sparse_crow_indices": [0, 1, 1, 2],
        "sparse_col_indices": [1, 3],
    }
    body = {
        "model_id": RUN,
        "seq_id": 7,
        "forward_backward_input": {
            "data": [
                {
                    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
                    "loss_fn_inputs": {
                        "target_tokens": matrix,
                        "weights": {"data": [1, 0.5, 2], "dtype": "float32", "shape": None},
                    },
                }
            ],
            "loss_fn": "cross_entropy",
            "loss_fn_config": {"beta": 1},
        },
        "some_later_field": {"x": 1},
    }
    raw = json.dumps(body).encode()
    assert codec.peek_forward_backward(raw, JSON) == Peek(RUN, 7, 3, 1, False, "cross_entropy")
    request = codec.decode_forward_backward(raw, "application/json; charset=utf-8")
    assert request.data[0].tokens.tolist() == [1, 2, 3]
    assert request.data[0].inputs["target_tokens"].tolist() == [[0, 5, 0, 0], [0] * 4, [0, 0, 0, 9]]
    assert request.data[0].inputs["weights"].tolist() == [1.0, 0.5, 2.0]
    assert request.loss_config == {"beta": 1.0}

    forward = {"model_id": RUN, "seq_id": 7, "forward_input": body["forward_backward_input"]}
    assert not codec.decode_forward_backward(json.dumps(forward).encode(), JSON).backward


def test_a_number_in_json_that_no_float_holds_is_refused_by_name() -> None:
    weights = {"data": [10**400], "dtype": "float32"}
    datum = {"model_input": {"chunks": [{"tokens": [1]}]}, "loss_fn_inputs": {"weights": weights}}
    body = {"model_id": "m", "forward_backward_input": {"loss_fn": "cross_entropy", "data": [datum]}}
    with pytest.raises(UserError, match=r"data\[0\].*'weights'.*float32"):
        codec.decode_forward_backward(json.dumps(body).encode(), JSON)


def test_json_integers_beyond_a_double_arrive_exactly() -> None:
    big = 2**62 + 1
    body = {
        "model_id": RUN,
        "forward_backward_input": {
            "data": [
                {
                    "model_input": {"chunks": [{"tokens": [1]}]},
                    "loss_fn_inputs": {"target_tokens": {"data": [big], "dtype": "int64"}},
                }
            ],
            "loss_fn": "cross_entropy",
        },
    }
    request = codec.decode_forward_backward(json.dumps(body).encode(), JSON)
    assert request.data[0].inputs["target_tokens"].tolist() == [big]


# ---- requests that are wrong


def _broken(change: Any) -> bytes:
    message = pb.ForwardBackwardRequest.FromString(sdk_body([sdk_datum(), sdk_datum(weights=np.ones(5))]))
    change(message)
    return message.SerializeToString()


def _weights(message: Any) -> Any:
    return message.data[1].loss_fn_inputs["weights"]


def _csr(rows: int, columns: int, crow: list[int], col: list[int], values: int | None = None) -> Any:
    def change(message: Any) -> None:
        tensor = _weights(message)
        tensor.sparse_csr.values = np.ones(len(col) if values is None else values, np.float32).tobytes()
        tensor.sparse_csr.crow_indices = np.array(crow, np.int64).tobytes()
        tensor.sparse_csr.col_indices = np.array(col, np.int64).tobytes()
        tensor.shape[:] = [rows, columns]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.ClearField("data"), "data is empty"),
        (lambda m: m.ClearField("model_id"), "model_id is missing"),
        (lambda m: setattr(m, "seq_id", -1), "seq_id"),
        (
            lambda m: _weights(m).shape.__setitem__(0, 6),
            r"data\[1\].*'weights'.*shape \[6\].*6 numbers.*5 were",
        ),
        (lambda m: _weights(m).shape.__setitem__(0, -5), r"data\[1\].*negative"),
        (lambda m: _weights(m).shape.extend([1, 1]), r"data\[1\].*dimensions"),
        (lambda m: setattr(_weights(m), "dense", b"abc"), r"data\[1\].*3 bytes"),
        (lambda m: setattr(_weights(m), "dtype", 0), r"data\[1\].*dtype"),
        (lambda m: setattr(_weights(m), "dtype", 99), r"data\[1\].*dtype"),
        (lambda m: setattr(m.data[1].model_input[0].encoded_text, "tokens", b"12345"), r"data\[1\].*int32"),
        (
            lambda m: setattr(m.data[1].model_input[0].image, "format", "png"),
            r"data\[1\].*chunks\[0\].*image",
        ),
        (lambda m: setattr(m.data[1].model_input[0].dmel, "dmel", b"x"), r"data\[1\].*chunks\[0\].*dmel"),
        (lambda m: m.data[1].model_input.add(), r"data\[1\].*chunks\[1\].*empty"),
        (lambda m: m.loss_fn_config_v2["beta"].Clear(), r"loss_fn_config\['beta'\]"),
        (_csr(2, 3, [0, 1], [0]), r"data\[1\].*crow_indices"),
        (_csr(2, 3, [0, 2, 1], [0]), r"data\[1\].*crow_indices"),
        (_csr(3, 3, [0, 2**63 - 1, -2, 1], [0]), r"data\[1\].*crow_indices"),
        (_csr(2, 3, [0, 0, 1], [3]), r"data\[1\].*col_indices must lie in 0..2"),
        (_csr(2, 3, [0, 0, 1], [-1]), r"data\[1\].*col_indices"),
        (_csr(2, 3, [0, 0, 1], [0], values=2), r"data\[1\].*2 values for 1"),
        (_csr(2, 1 << 40, [0, 0, 1], [0]), r"data\[1\].*shape"),
        (_csr(2, 1 << 30, [0, 0, 1], [0]), r"data\[1\].*cells"),
        (_csr(0, 1 << 62, [0], []), r"data\[1\].*shape"),
    ],
)
def test_a_wrong_request_is_refused_by_name(change: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        codec.decode_forward_backward(_broken(change))


def test_sparse_tensors_share_one_limit_over_the_request() -> None:
    def change(message: Any) -> None:
        _csr(5, 3_000_000, [0, 0, 0, 0, 0, 1], [7])(message)
        message.data.add().CopyFrom(message.data[1])

    with pytest.raises(TooLarge, match=r"data\[2\]"):
        codec.decode_forward_backward(_broken(change))


def test_an_unknown_media_type_is_named() -> None:
    with pytest.raises(UnsupportedMedia, match="text/csv"):
        codec.decode_forward_backward(b"", "text/csv")


# ---- answers that the SDK reads


def test_the_sdk_reads_back_the_logprobs_of_every_datum() -> None:
    """S1-37: one logprobs array per datum, and the loss as a metric that the SDK can reduce."""
    logprobs = [
        np.float32([-1, -2]),
        np.float32([-3]),
        np.float32([[-1, -2], [-3, -4], [0, -9]]),
        np.float32([-7]),
    ]
    answer = deserialize_forward_backward_output(
        codec.encode_forward_backward_output(result(*logprobs, tokens__sum=8.0))
    )
    assert [output["logprobs"].shape for output in answer.loss_fn_outputs] == [[2], [1], [3, 2], [1]]
    for output, expected in zip(answer.loss_fn_outputs, logprobs, strict=True):
        np.testing.assert_array_equal(output["logprobs"].to_numpy(), expected)
    combined = combine_fwd_bwd_output_results([answer, answer])
    assert combined.metrics == {"loss:sum": 5.0, "tokens:sum": 16.0}
    assert len(combined.loss_fn_outputs) == 8


@pytest.mark.parametrize("name", ["tokens", "tokens__sum__x"])
def test_a_metric_that_would_break_the_sdk_is_not_sent(name: str) -> None:
    with pytest.raises(ServerError, match="name:reduction"):
        codec.encode_forward_backward_output(result(np.zeros(1, np.float32), **{name: 1.0}))


def test_json_answers_hold_no_nan() -> None:
    array = np.array([[np.nan, -1.5]], np.float32)
    answer = json.loads(codec.encode_forward_backward_output_json(result(array, x__sum=math.inf)))
    assert answer["loss_fn_outputs"] == [
        {"logprobs": {"data": [None, -1.5], "dtype": "float32", "shape": [1, 2]}}
    ]
    assert answer["metrics"] == {"loss:sum": 2.5, "x:sum": None}
