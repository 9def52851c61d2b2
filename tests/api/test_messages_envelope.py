"""The message format: what is read, what is refused and how the refusal names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.mq.messages import (
    MAX_BYTES,
    MessageRefused,
    decode,
    encode,
    encode_request,
    encode_result,
    result_id,
)

REQ = "0d9e5f0c-6f0e-4a52-9a53-6f1f6a2f7d11"


def raw(header: dict[str, Any] | None = None, body: dict[str, Any] | None = None) -> bytes:
    fields = {"reqNo": REQ, "priority": 5, "taskType": "GC", "group": "shop", **(header or {})}
    return json.dumps(
        {"header": fields, "body": {"method": "sleep", "parameters": {"seconds": 1}, **(body or {})}}
    ).encode()


def test_the_smallest_request_is_read_with_its_defaults() -> None:
    message = decode(raw())
    assert (message.req_no, message.header.priority, message.header.group) == (REQ, 5, "shop")
    assert (message.header.tenant, message.header.deadline, message.header.affinity) == ("default", None, "preferred")
    assert message.body.parameters == {"seconds": 1}


def test_unknown_header_fields_are_tolerated_and_kept() -> None:
    message = decode(raw({"replyTo": "me", "v": 2}))
    assert message.header.model_extra == {"replyTo": "me", "v": 2}


@pytest.mark.parametrize(
    ("header", "body", "names"),
    [
        ({"reqNo": "abc"}, {}, "header.reqNo"),
        ({"priority": "high"}, {}, "header.priority"),
        ({"priority": True}, {}, "header.priority"),
        ({"priority": 1.5}, {}, "header.priority"),
        ({"priority": 10_000}, {}, "header.priority"),
        ({"taskType": "XX"}, {}, "header.taskType"),
        ({"group": "g" * 129}, {}, "header.group"),
        ({"tenant": "../etc"}, {}, "header.tenant"),
        ({"tenant": ""}, {}, "header.tenant"),
        ({"deadline": "tomorrow"}, {}, "header.deadline"),
        ({"deadline": "2027-01-31T12:00:00"}, {}, "header.deadline"),
        ({"affinity": "glue"}, {}, "header.affinity"),
        ({}, {"method": ""}, "body.method"),
        ({}, {"method": "Robert'); DROP"}, "body.method"),
        ({}, {"parameters": []}, "body.parameters"),
        ({}, {"extra": 1}, "body.extra"),
    ],
)
def test_a_wrong_field_is_named(header: dict[str, Any], body: dict[str, Any], names: str) -> None:
    with pytest.raises(MessageRefused, match=names) as caught:
        decode(raw(header, body))
    assert caught.value.code == "invalid"


def test_a_refusal_carries_the_identity_where_it_was_readable() -> None:
    with pytest.raises(MessageRefused) as caught:
        decode(raw({"priority": "high", "tenant": "acme"}))
    assert (caught.value.req_no, caught.value.tenant) == (REQ, "acme")
    assert caught.value.header == {"reqNo": REQ, "priority": 0, "taskType": "GC", "group": "shop", "tenant": "acme"}
    with pytest.raises(MessageRefused) as caught:
        decode(raw({"reqNo": 7}))
    assert (caught.value.req_no, caught.value.tenant) == ("", "")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"\xff\xfe", "not_json"),
        (b"{", "not_json"),
        (b"[" * 100_000, "not_json"),
        (b'{"header": NaN}', "not_json"),
        (b'"\\ud800"', "not_json"),
        (b'{"header": {"x": 1e999}}', "not_json"),
        (b" " * (MAX_BYTES + 1), "too_large"),
        (raw(body={"parameters": json.loads("[" * 0 + '{"a":' * 20 + "1" + "}" * 20)}), "too_deep"),
        (b"[]", "invalid"),
        (b"null", "invalid"),
    ],
)
def test_hostile_bytes_are_refused_with_a_code(content: bytes, code: str) -> None:
    with pytest.raises(MessageRefused) as caught:
        decode(content)
    assert caught.value.code == code


def test_deadlines_are_unix_seconds_or_times_with_a_zone() -> None:
    assert decode(raw({"deadline": 1893456000})).header.deadline == 1893456000
    assert decode(raw({"deadline": "2030-01-01T00:00:00Z"})).header.deadline == 1893456000
    assert decode(raw({"deadline": "2030-01-01T01:00:00+01:00"})).header.deadline == 1893456000


def test_a_request_written_by_us_is_read_by_us() -> None:
    body = encode_request(
        req_no=REQ, task_type="GC", method="sleep", parameters={"seconds": 2}, tenant="acme", deadline=None
    )
    message = decode(body)
    assert (message.header.tenant, message.body.parameters) == ("acme", {"seconds": 2})
    with pytest.raises(MessageRefused, match=r"header\.taskType"):
        encode_request(req_no=REQ, task_type="??", method="sleep", parameters={})


def test_a_result_travels_in_the_same_envelope_with_equal_bytes() -> None:
    header = {"reqNo": REQ, "priority": 5, "taskType": "GC", "group": "", "tenant": "acme"}
    one = encode_result(header, state="finished", attempt=2, reason="", detail="", result={"files": []})
    two = encode_result(dict(header), state="finished", attempt=2, reason="", detail="", result={"files": []})
    assert one == two
    message = decode(one)
    assert message.body.method == "result"
    assert message.body.parameters["state"] == "finished"


def test_result_ids_are_one_for_a_request_and_one_for_each_rerun() -> None:
    assert [result_id("acme", REQ, n) for n in (0, 1)] == [f"acme/{REQ}", f"acme/{REQ}/rerun-1"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200)
    | json_values.map(lambda tree: json.dumps(tree).encode())
    | json_values.map(
        lambda tree: json.dumps(
            {"header": {"reqNo": REQ, "priority": 0, "taskType": "GC", "x": tree}, "body": tree}
        ).encode()
    )
)
def test_any_bytes_are_read_or_refused_and_what_is_read_can_be_written(content: bytes) -> None:
    try:
        message = decode(content)
    except MessageRefused as refused:
        assert str(refused)
        return
    again = encode(message.header.model_dump(mode="json"), message.body.method, message.body.parameters)
    assert decode(again).body == message.body
