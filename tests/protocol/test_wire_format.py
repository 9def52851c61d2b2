"""Messages as bytes: round trips, limits, hostile bytes, and an end of another version."""

from __future__ import annotations

import dataclasses
import typing

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.protocol import messages as m
from engine.resources import GpuSpec, NodeSpec, ResidentModel, Tier
from executors import wire

NODE = NodeSpec("n", (GpuSpec("u", "a100", 80 << 30),), 64_000, 1 << 40, extra=(("nic", 2),), labels=(("zone", "b"),))
SAMPLES: list[m.Message] = [
    m.Hello(1, 1, NODE, 7, 2, 3, (1, 2), (3,), (("r", 1, 0),), (("s", 2, 1),), 4, 1),
    m.Welcome(1, 2, 3, 4, 5, 6, 10_000_000, 1_000_000),
    m.Heartbeat(1, 2, 3, 4, 5, 6, 7),
    m.HeartbeatAck(1, 2, 3, 4),
    m.Orders(
        1, 2, 3, 4,
        (
            m.CreatePod(1, "sleep", {"adapter": {"lora": "ab"}, "path": None}, ("u",), 500, 1 << 30, 1000, 1 << 30, 4),
            m.DeletePod(1, 5),
            m.Dispatch("r", 1, 0, 1, {"prompt": "ein Bär", "steps": 20, "list": [1, 2.5, None, True]}, "cp"),
            m.Dispatch("s", 1, 0, 1, {}, "", {"adapters": [{"model": "lora", "files": {"a": "ab"}}], "priority": 100}),
            m.Kill("r", 1, 0, 1, 10, True),
            m.Prefetch({"id": "m"}),
            m.Release("m", True),
        ),
        9,
    ),
    m.Reports(
        1, 2,
        (
            m.PodUp(1, 2), m.PodDown(1, "crashed", "tail"), m.Started("r", 1), m.Done("r", 1, 0, "{}", 5, 6),
            m.Done("s", 1, 0, "{}", 9, 6, 5, 1500),
            m.Failed("r", 1, 0, "out_of_memory", "d", 7), m.Stopped("r", 1, 0, "cp"),
            m.Devices(NODE.gpus, (("u", 5),), (("u", 900),)),
            m.Devices(NODE.gpus, (), (), (ResidentModel("m", Tier.MEMORY, 7, True), ResidentModel("n")), (("disk_hits", 3),)),
        ),
        3, 4,
    ),
    m.Credit(1, 2, 3), m.DoneAck(1, 2, 3), m.Progress(1, "r", 1, 0, 5, 20),
    m.Progress(1, "r", 1, 0, 5, 20, "c", "n", "p"), m.Drain(1), m.Bye(1),
    m.Rejoin(1, 2), m.Fence(1, 2, 3, "why"), m.Nack(1, 2, "stale", "d"),
]  # fmt: skip


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_every_message_survives_the_wire(message: m.Message) -> None:
    frames = list(wire.encode(message))
    assert [wire.decode(frame) for frame in frames] == [message]


def test_every_kind_of_message_has_a_sample() -> None:
    kinds = {*typing.get_args(m.FromNode), *typing.get_args(m.FromScheduler)}
    assert {type(sample) for sample in SAMPLES} == kinds
    items = {*typing.get_args(m.Order), *typing.get_args(m.Report)} - {m.UnknownItem}
    assert {
        type(item) for sample in SAMPLES if isinstance(sample, m.Orders | m.Reports) for item in sample.items
    } == items


def test_a_long_stretch_is_cut_into_frames_that_follow_on() -> None:
    items = tuple(m.Dispatch(f"r{n}", 1, 0, 1, {"prompt": "x" * 20_000}) for n in range(8))
    frames = list(wire.encode(m.Orders(1, 1, 1, 10, items)))
    assert len(frames) > 1
    assert all(len(frame) <= wire.MAX_BYTES for frame in frames)
    read = [wire.decode(frame) for frame in frames]
    together: list[m.Order] = []
    for part in read:
        assert isinstance(part, m.Orders)
        assert part.first == 10 + len(together)
        together.extend(part.items)
    assert tuple(together) == items


def test_an_item_that_is_too_large_is_refused_with_the_remedy() -> None:
    with pytest.raises(wire.WireError, match="file store"):
        wire.encode_item(m.Dispatch("r", 1, 0, 1, {"prompt": "x" * 70_000}))


def test_a_body_that_is_no_plain_data_is_refused() -> None:
    with pytest.raises(wire.WireError, match="Dispatch"):
        wire.encode_item(m.Dispatch("r", 1, 0, 1, {"prompt": object()}))


def test_surplus_fields_of_a_newer_end_are_ignored() -> None:
    raw = msgspec.msgpack.decode(next(wire.encode(m.Credit(1, 2, 3))))
    assert wire.decode(msgspec.msgpack.encode([*raw, "new", {"more": 1}])) == m.Credit(1, 2, 3)


def test_fields_that_an_older_end_does_not_send_take_their_defaults() -> None:
    raw = msgspec.msgpack.decode(next(wire.encode(m.Heartbeat(1, 2, 3, 4, 5, 6, 7))))
    assert wire.decode(msgspec.msgpack.encode(raw[:5])) == m.Heartbeat(1, 2, 3, 4)


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_only_fields_with_a_default_may_ever_be_added(message: m.Message) -> None:
    """The version before this one sent FIRST_FIELDS[kind] fields; they must still be enough, in this order."""
    names = [field.name for field in dataclasses.fields(message)]
    assert names[: len(FIRST_FIELDS[type(message).__name__])] == FIRST_FIELDS[type(message).__name__]
    for field in dataclasses.fields(message)[len(FIRST_FIELDS[type(message).__name__]) :]:
        assert field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING, field.name


FIRST_FIELDS: dict[str, list[str]] = {
    "Hello": ["proto_min", "proto_max", "node", "boot", "phase", "n"],
    "Welcome": ["proto", "session", "epoch", "boot", "phase", "n", "lease_us", "heartbeat_us"],
    "Heartbeat": ["session", "n", "applied", "limit"],
    "HeartbeatAck": ["session", "epoch", "n", "durable"],
    "Orders": ["session", "epoch", "lease_ref", "first", "items"],
    "Reports": ["session", "first", "items"],
    "Credit": ["session", "applied", "limit"],
    "DoneAck": ["session", "epoch", "durable"],
    "Progress": ["session", "req_no", "attempt", "rank", "done", "total"],
    "Drain": ["session"],
    "Bye": ["session"],
    "Rejoin": ["session", "epoch"],
    "Fence": ["boot", "epoch", "above"],
    "Nack": ["session", "number", "reason"],
}


def test_an_order_of_an_unknown_kind_keeps_its_place_in_the_stream() -> None:
    known = m.Started("r", 1)
    raw = msgspec.msgpack.decode(next(wire.encode(m.Reports(1, 1, (known, known, known)))))
    raw[3][1] = [99, "from the future"]
    read = wire.decode(msgspec.msgpack.encode(raw))
    assert isinstance(read, m.Reports)
    assert read.items[0] == read.items[2] == known
    assert isinstance(read.items[1], m.UnknownItem)
    assert read.items[1].tag == 99


def test_an_unknown_message_names_its_tag() -> None:
    with pytest.raises(wire.WireError) as raised:
        wire.decode(msgspec.msgpack.encode([77, 1, 2]))
    assert raised.value.tag == 77


@given(st.binary(max_size=300))
@example(b"\x91" * 5000)
@example(b"\xa4\xff\xfe\xfd\xfc")
@example(b"")
@example(b"x" * (wire.MAX_BYTES + 1))
def test_bytes_that_are_no_message_are_refused_and_nothing_else_happens(data: bytes) -> None:
    try:
        wire.decode(data)
    except wire.WireError:
        return


@given(st.sampled_from(SAMPLES), st.data())
def test_a_damaged_message_is_read_as_another_or_refused(message: m.Message, data: st.DataObject) -> None:
    frame = bytearray(next(wire.encode(message)))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    try:
        wire.decode(bytes(frame))
    except wire.WireError:
        return
