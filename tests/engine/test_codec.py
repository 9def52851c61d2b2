"""The codec: whatever goes in comes out, and whatever is wrong is named."""

from __future__ import annotations

from typing import get_args

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from engine import codec
from engine.commands import Command, DeletePod, Notify
from engine.events import Event, TaskFinished, TaskSubmitted
from engine.journal import Record, decode_record, encode_record
from engine.making import notify, start_task
from engine.tasks import TaskState

KINDS = (*get_args(Event), *get_args(Command))
# JSON has no place for infinities, and -0.0 and 0.0 are equal: any other float comes back as it was.
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_every_event_and_command_comes_back_as_it_was(kind: type, data: st.DataObject) -> None:
    item = data.draw(st.from_type(kind))
    back = codec.decode(codec.encode(item))
    assert back == item
    assert type(back) is kind


def test_a_record_comes_back_as_it_was() -> None:
    record = Record(
        3, 17, (TaskFinished("r", 1, result="é\n"),), (notify("r", TaskState.FINISHED, 1, 17), DeletePod(1, "idle"))
    )
    assert decode_record(encode_record(record)) == record


def test_fields_at_their_defaults_are_not_written() -> None:
    assert codec.encode(DeletePod(7, "idle")) == b'[1,"DeletePod",{"pod":7,"reason":"idle"}]'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[2,"DeletePod",{"pod":7,"reason":"x"}]', "version 2 is unknown, this build reads version 1"),
        (b'[1,"Explode",{}]', "'Explode' is no event or command"),
        (b'[1,"DeletePod",{"pod":"7","reason":"x"}]', "DeletePod.pod: '7' is no int"),
        (b'[1,"DeletePod",{"pod":true,"reason":"x"}]', "DeletePod.pod: True is no int"),
        (b'[1,"DeletePod",{"pod":7}]', "DeletePod: the field reason is missing"),
        (b'[1,"DeletePod",{"pod":7,"reason":"x","why":1}]', "DeletePod.why: there is no such field"),
        (b'[1,"Notify",{"req_no":"r","state":"gone"}]', "Notify.state: 'gone' is none of"),
        (b'[1,"NodeReported",{"node":"n","gpus":3}]', "NodeReported.gpus: 3 is no list"),
        (b'[1,"ModelDeployed",{"model":"m","method":"x","demand":{"extra":[["a"]]}}]', "1 entries instead of 2"),
        (b"[1", "no JSON"),
        (b"{}", "no list"),
        (b'[1,"DeletePod"]', "no list of type and fields"),
        (b"[" * 100_000, "no JSON"),
    ],
)
def test_what_is_wrong_is_named(data: bytes, message: str) -> None:
    with pytest.raises(codec.CodecError, match=message.replace("[", r"\[")):
        codec.decode(data)


def test_a_damaged_record_is_refused() -> None:
    for data in (b"[1,2]", b"[]", b"[9,1,1,[],[]]", b"[1,1,1,{},[]]", b'[1,"1",1,[],[]]'):
        with pytest.raises(codec.CodecError):
            decode_record(data)


def test_commands_that_are_made_fast_are_the_same_commands() -> None:
    from engine.commands import StartTask

    made = notify("r", TaskState.DEAD, 2, 5, "why", "so", "res", "n", 9)
    assert made == Notify("r", TaskState.DEAD, 2, "why", "so", "res", "n", 5, 9)
    assert hash(made) == hash(Notify("r", TaskState.DEAD, 2, "why", "so", "res", "n", 5, 9))
    assert start_task("r", 1, 2, "n", 3, "c") == StartTask("r", 1, 2, "n", 3, "c")


def test_features_keep_their_types() -> None:
    data = codec.loads(
        b'{"req_no":"r","tenant":"t","group":"","task_type":"GC","method":"m","features":[["a",1],["b",1.5],["c","x"]]}'
    )
    item = codec.untagged(["TaskSubmitted", {"task": data}])
    assert isinstance(item, TaskSubmitted)
    assert item.task.features == (("a", 1), ("b", 1.5), ("c", "x"))
