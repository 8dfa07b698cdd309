"""Read who, which and how much from a forward_backward body without decoding it.

This runs on the notebook server's event loop, so it walks only the protobuf tags it needs (the datums'
contents are stepped over), allocates nothing in proportion to the body, and stops after a fixed number of
fields. It does not know what the tensors mean and does not check them: the worker does, in
:mod:`tuft_jupyter.wire.codec`.

It promises that a malformed body of any kind ends in :class:`UserError`, and quickly. Field numbers:
tuft_wire.proto.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from tuft_jupyter.core.errors import TooLarge, UnsupportedMedia, UserError
from tuft_jupyter.core.types import JSON, PROTOBUF

MAX_DATUMS = 8192
"""Datums in one request; the SDK cuts its calls at 1024 unless the server tells it otherwise."""

MAX_CHUNKS = 4096
"""Chunks of one datum in JSON; the SDK joins tokens into one."""

MAX_FIELDS = 100_000
"""Protobuf fields looked at in one request: about 40 ms of the event loop, and 12 per datum of the largest
request."""

MAX_JSON = 10 * 2**20
"""Bytes of a request in JSON, whose tokens have to be read to be counted: 0.1 s of the event loop for what SDKs send,
0.4 s for the worst that can be sent. SDKs that write JSON cut their requests at about half of it."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_INT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Peek:
    """What the event loop has to know of a forward_backward request.

    ``tokens`` is the number of input tokens of all datums; ``data_count`` is how many datums there are.
    """

    run: str
    seq: int
    tokens: int
    data_count: int
    forward_only: bool
    loss_fn: str


def base_type(content_type: str) -> str:
    """``application/json; charset=utf-8`` -> ``application/json``."""
    return content_type.split(";", 1)[0].strip().lower()


def peek_forward_backward(body: bytes, content_type: str = PROTOBUF) -> Peek:
    """Read the head of a request. UserError (or a kind of it) if the body is malformed or too large."""
    media = base_type(content_type)
    if media == PROTOBUF:
        return _Walk(body).request()
    if media == JSON:
        return _peek_json(body)
    raise UnsupportedMedia(f"forward_backward reads {PROTOBUF} or {JSON}, not {media or 'an unnamed type'}")


class _Walk:
    """A walk over the tags of one protobuf body (protobuf encoding specification, sections 'varints' to
    'groups')."""

    __slots__ = ("body", "fields")

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.fields = MAX_FIELDS

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """The varint at ``at`` and the position behind it."""
        body = self.body
        value = shift = 0
        while at < end:
            byte = body[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at
            shift += 7
            if shift >= 70:
                raise _malformed("a varint is longer than ten bytes")
        raise _malformed("the body ends inside a varint")

    def field(self, at: int, end: int) -> tuple[int, int, int, int]:
        """``(number, value, start, stop)`` of the field at ``at``; the next one begins at ``stop``.

        For a varint ``value`` is its value; for bytes it is -1 and the content is ``body[start:stop]``; for
        fixed widths it is -2.
        """
        self.fields -= 1
        if self.fields < 0:
            raise TooLarge(f"the request has more than {MAX_FIELDS} fields; send fewer datums in one call")
        body = self.body
        tag = body[at]
        at += 1
        if tag >= 0x80:
            tag, at = self.varint(at - 1, end)
        wire = tag & 7
        if not 0 < tag >> 3 < 1 << 29:
            raise _malformed("a field has an impossible number")
        if wire == _BYTES:
            if at < end and body[at] < 0x80:  # most lengths in the head of a message are one byte
                length = body[at]
                at += 1
            else:
                length, at = self.varint(at, end)
            if length > end - at:
                raise _malformed("a field is longer than what contains it")
            return tag >> 3, -1, at, at + length
        if wire == _VARINT:
            value, at = self.varint(at, end)
            return tag >> 3, value, at, at
        if wire in (_FIXED64, _FIXED32):
            stop = at + (8 if wire == _FIXED64 else 4)
            if stop > end:
                raise _malformed("the body ends inside a field")
            return tag >> 3, -2, at, stop
        raise _malformed(f"a field has wire type {wire}")

    def text(self, name: str, value: int, start: int, stop: int) -> str:
        _expect(name, value == -1)
        try:
            return self.body[start:stop].decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{name} is not valid UTF-8 text") from None

    def request(self) -> Peek:
        run = loss_fn = ""
        seq = tokens = count = 0
        forward_only = False
        at, end = 0, len(self.body)
        while at < end:
            number, value, start, at = self.field(at, end)
            if number == 3:
                _expect("data", value == -1)
                count += 1
                if count > MAX_DATUMS:
                    raise TooLarge(f"the request has more than {MAX_DATUMS} datums; send fewer in one call")
                tokens += self.datum(count - 1, start, at)
            elif number == 1:
                run = self.text("model_id", value, start, at)
            elif number == 2:
                _expect("seq_id", value >= 0)
                seq = value
            elif number == 4:
                loss_fn = self.text("loss_fn", value, start, at)
            elif number == 6:
                _expect("forward_only", value >= 0)
                forward_only = value != 0
            elif number == 5 or number == 7:
                _expect("loss_fn_config", value == -1)
        return _checked(Peek(run, seq, tokens, count, forward_only, loss_fn))

    def datum(self, index: int, at: int, end: int) -> int:
        """The number of tokens of the datum in ``body[at:end]``: Datum.model_input.encoded_text.tokens."""
        tokens = 0
        while at < end:
            number, value, start, at = self.field(at, end)
            if number == 1:
                _expect(f"data[{index}].model_input", value == -1)
                tokens += self.chunk(index, start, at)
            elif number <= 4:
                _expect(f"data[{index}]", value == -1)
        return tokens

    def chunk(self, index: int, at: int, end: int) -> int:
        size = 0
        while at < end:
            number, value, inner, at = self.field(at, end)
            if number != 1:
                continue  # an image or audio chunk: counts nothing here, and is refused where it is decoded
            _expect(f"data[{index}].model_input", value == -1)
            while inner < at:
                number, value, start, inner = self.field(inner, at)
                if number == 1:
                    _expect(f"data[{index}].model_input.tokens", value == -1)
                    size = inner - start
        if size % _INT32_BYTES:
            raise UserError(f"data[{index}].model_input: {size} bytes are not a whole number of int32 tokens")
        return size // _INT32_BYTES


class _JsonChunk(msgspec.Struct, gc=False):
    tokens: list[int] = []


class _JsonModelInput(msgspec.Struct, gc=False):
    chunks: list[msgspec.Raw] = []


class _JsonDatum(msgspec.Struct, gc=False):
    model_input: _JsonModelInput


class _JsonInput(msgspec.Struct):
    data: list[msgspec.Raw] = []
    loss_fn: str = ""


class _JsonHead(msgspec.Struct):
    model_id: str = ""
    seq_id: int | None = 0
    forward_only: bool = False
    forward_backward_input: _JsonInput | None = None
    forward_input: _JsonInput | None = None


_json_head = msgspec.json.Decoder(_JsonHead)
_json_datum = msgspec.json.Decoder(_JsonDatum)
_json_chunk = msgspec.json.Decoder(_JsonChunk)


def _peek_json(body: bytes) -> Peek:
    """The JSON dialect of SDKs before 0.25. Tensors are skipped by msgspec, tokens have to be read to be
    counted."""
    if len(body) > MAX_JSON:
        raise TooLarge(
            f"a request in JSON may have {MAX_JSON} bytes, this one has {len(body)}: "
            "send fewer datums per request, or protobuf"
        )
    try:
        head = _json_head.decode(body)
        work = head.forward_backward_input or head.forward_input or _JsonInput()
        if len(work.data) > MAX_DATUMS:  # before one of them is looked into
            raise TooLarge(f"the request has more than {MAX_DATUMS} datums; send fewer in one call")
        tokens = sum(_json_tokens(index, datum) for index, datum in enumerate(work.data))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"the request is not a valid forward_backward in JSON: {error}") from None
    forward_only = head.forward_only or head.forward_backward_input is None
    return _checked(Peek(head.model_id, head.seq_id or 0, tokens, len(work.data), forward_only, work.loss_fn))


def _json_tokens(index: int, datum: msgspec.Raw) -> int:
    chunks = _json_datum.decode(datum).model_input.chunks
    if len(chunks) > MAX_CHUNKS:
        raise TooLarge(f"data[{index}].model_input has more than {MAX_CHUNKS} chunks; join them")
    return sum(len(_json_chunk.decode(chunk).tokens) for chunk in chunks)


def _checked(peek: Peek) -> Peek:
    if not peek.run:
        raise UserError("model_id is missing")
    if not 0 <= peek.seq < 1 << 31:
        raise UserError(f"seq_id {peek.seq} is out of range; it counts up from 1")
    if not peek.data_count:
        raise UserError("data is empty; send at least one datum")
    return peek


def _expect(name: str, right: bool) -> None:
    if not right:
        raise UserError(f"{name} has the wrong protobuf wire type")


def _malformed(what: str) -> UserError:
    return UserError(f"the request is not a valid protobuf message: {what}")
