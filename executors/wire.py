"""The protocol's messages as bytes: MessagePack arrays ``[tag, field, field, ...]``, at most 64 KiB each.

Fields are told apart by position, new ones are appended with a default: an older end ignores the surplus, a newer one fills in
what is missing. Orders and reports are nested arrays with tags of their own; one that this end cannot read still takes its place
in the stream, as `UnknownItem`, so that a single strange item never blocks the others.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from engine.protocol import messages as m

MAX_BYTES = 64 * 1024
_ITEMS_BYTES = MAX_BYTES - 512

_ORDER_TAGS: dict[int, type] = {
    20: m.CreatePod,
    21: m.DeletePod,
    22: m.Dispatch,
    23: m.Kill,
    24: m.Prefetch,
    25: m.Release,
}
_REPORT_TAGS: dict[int, type] = {
    40: m.PodUp,
    41: m.PodDown,
    42: m.Started,
    43: m.Done,
    44: m.Failed,
    45: m.Stopped,
    46: m.Devices,
}
_MESSAGE_TAGS: dict[int, type] = {
    1: m.Hello,
    2: m.Welcome,
    3: m.Heartbeat,
    4: m.HeartbeatAck,
    5: m.Orders,
    6: m.Reports,
    7: m.Credit,
    8: m.DoneAck,
    9: m.Progress,
    10: m.Drain,
    11: m.Bye,
    12: m.Rejoin,
    13: m.Fence,
    14: m.Nack,
}


class WireError(ValueError):
    """Bytes that are no message of this protocol, or a message that has no bytes. `tag` is its kind where it could be read."""

    def __init__(self, detail: str, tag: int = 0) -> None:
        super().__init__(detail)
        self.tag = tag


@dataclasses.dataclass(frozen=True, slots=True)
class _Codec:
    tag: int
    cls: type
    mirror: type[msgspec.Struct]
    names: tuple[str, ...]

    def pack(self, value: Any) -> list[Any]:
        return [self.tag, *[getattr(value, name) for name in self.names]]

    def unpack(self, struct: msgspec.Struct) -> Any:
        return self.cls(*[getattr(struct, name) for name in self.names])


def _codec(tag: int, cls: type) -> _Codec:
    hints = typing.get_type_hints(cls)
    fields: list[Any] = []
    for field in dataclasses.fields(cls):
        kind = tuple[msgspec.Raw, ...] if field.name == "items" else hints[field.name]
        kind = dict[str, Any] if typing.get_origin(kind) is not None and "Mapping" in str(kind) else kind
        if field.default is not dataclasses.MISSING:
            fields.append((field.name, kind, field.default))
        elif field.default_factory is not dataclasses.MISSING:
            fields.append((field.name, kind, msgspec.field(default_factory=field.default_factory)))
        else:
            fields.append((field.name, kind))
    mirror = msgspec.defstruct(f"Wire{cls.__name__}", fields, tag=tag, array_like=True, frozen=True, gc=False)
    return _Codec(tag, cls, mirror, tuple(field.name for field in dataclasses.fields(cls)))


def _codecs(tags: dict[int, type]) -> dict[type, _Codec]:
    return {cls: _codec(tag, cls) for tag, cls in tags.items()}


def _decoder(codecs: dict[type, _Codec]) -> Callable[[Any], Any]:
    union: Any = typing.Union.__getitem__(tuple(codec.mirror for codec in codecs.values()))
    decode = msgspec.msgpack.Decoder(union).decode
    by_mirror = {codec.mirror: codec for codec in codecs.values()}

    def unpack(data: Any) -> Any:
        struct = decode(data)
        return by_mirror[type(struct)].unpack(struct)

    return unpack


_ORDERS = _codecs(_ORDER_TAGS)
_REPORTS = _codecs(_REPORT_TAGS)
_MESSAGES = _codecs(_MESSAGE_TAGS)
_ITEMS = {**_ORDERS, **_REPORTS}
_decode_order = _decoder(_ORDERS)
_decode_report = _decoder(_REPORTS)
_decode_message = _decoder(_MESSAGES)
_encode = msgspec.msgpack.Encoder().encode
_decode_any = msgspec.msgpack.Decoder(list).decode
_READ_ERRORS = (ValueError, TypeError, RecursionError, OverflowError, msgspec.MsgspecError)


def encode_item(item: m.Order | m.Report) -> bytes:
    """Return the bytes of one order or report; raises WireError when it has none or too many."""
    try:
        data = _encode(_ITEMS[type(item)].pack(item))
    except (*_READ_ERRORS, KeyError) as error:
        raise WireError(f"{type(item).__name__}: {error}") from error
    if len(data) > _ITEMS_BYTES:
        raise WireError(
            f"{type(item).__name__}: {len(data)} bytes, the limit is {_ITEMS_BYTES}; put large content into the file store"
        )
    return data


def encode(message: m.Message) -> Iterator[bytes]:
    """Yield the frames of a message: one, or several where a stretch of items is too long for one."""
    if isinstance(message, m.Orders | m.Reports):
        yield from _encode_stretch(message)
        return
    data = _encode(_MESSAGES[type(message)].pack(message))
    if len(data) > MAX_BYTES:
        raise WireError(f"{type(message).__name__}: {len(data)} bytes, the limit is {MAX_BYTES}")
    yield data


def _encode_stretch(message: m.Orders | m.Reports) -> Iterator[bytes]:
    codec = _MESSAGES[type(message)]
    first, size = message.first, 0
    batch: list[msgspec.Raw] = []
    for item in message.items:
        data = encode_item(item)
        if batch and size + len(data) > _ITEMS_BYTES:
            yield _encode(_stretch(codec, message, first, batch))
            first, size = first + len(batch), 0
            batch = []
        batch.append(msgspec.Raw(data))
        size += len(data)
    yield _encode(_stretch(codec, message, first, batch))


def _stretch(codec: _Codec, message: m.Orders | m.Reports, first: int, items: list[msgspec.Raw]) -> list[Any]:
    packed = codec.pack(message)
    packed[1 + codec.names.index("first")] = first
    packed[1 + codec.names.index("items")] = items
    return packed


def decode(data: bytes) -> m.Message:
    """Read one frame; raises WireError for anything that is no message."""
    if len(data) > MAX_BYTES:
        raise WireError(f"{len(data)} bytes, the limit is {MAX_BYTES}")
    try:
        message = _decode_message(data)
    except _READ_ERRORS as error:
        raise WireError(f"no message of this protocol: {error}", _tag(data)) from error
    if isinstance(message, m.Orders):
        return dataclasses.replace(message, items=_unpack_items(message.items, _decode_order))
    if isinstance(message, m.Reports):
        return dataclasses.replace(message, items=_unpack_items(message.items, _decode_report))
    return typing.cast(m.Message, message)


def decode_report(data: bytes) -> m.Report:
    """Read one report, as the spool keeps it; raises WireError."""
    try:
        return typing.cast(m.Report, _decode_report(data))
    except _READ_ERRORS as error:
        raise WireError(f"no report: {error}", _tag(data)) from error


def _unpack_items(items: Any, decode_one: Callable[[Any], Any]) -> Any:
    read = []
    for raw in items:
        try:
            read.append(decode_one(raw))
        except _READ_ERRORS as error:
            read.append(m.UnknownItem(_tag(bytes(raw)), str(error)))
    return tuple(read)


def _tag(data: bytes) -> int:
    try:
        head = _decode_any(data)
    except _READ_ERRORS:
        return 0
    return head[0] if head and isinstance(head[0], int) else 0
