"""The numbered streams under both directions of the protocol."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.protocol.streams import BATCH_ITEMS, RESEND_US, Receiver, Sender


def test_items_are_numbered_and_sent_in_stretches() -> None:
    sender: Sender[str] = Sender()
    for number in range(BATCH_ITEMS + 3):
        assert sender.push(f"i{number}") == number + 1
    stretches = list(sender.take(0))
    assert [(first, len(items)) for first, items in stretches] == [(1, BATCH_ITEMS), (BATCH_ITEMS + 1, 3)]
    assert list(sender.take(1)) == []


def test_what_is_not_acknowledged_is_sent_again_and_ever_less_often() -> None:
    sender: Sender[str] = Sender()
    sender.push("a")
    list(sender.take(0))
    assert sender.resend_at == RESEND_US
    assert list(sender.take(RESEND_US)) == [(1, ("a",))]
    assert sender.resend_at == RESEND_US + 2 * RESEND_US


def test_a_steady_flow_of_new_items_does_not_put_off_the_resending_of_a_lost_one() -> None:
    sender: Sender[int] = Sender()
    for now in range(0, RESEND_US, RESEND_US // 10):
        sender.push(now)
        list(sender.take(now))
    assert sender.resend_at == RESEND_US
    (first, items) = next(iter(sender.take(RESEND_US)))
    assert (first, len(items)) == (1, 10)


def test_an_acknowledgement_forgets_and_a_late_one_after_a_rewind_still_counts() -> None:
    sender: Sender[str] = Sender()
    for name in "abc":
        sender.push(name)
    list(sender.take(0))
    sender.rewind()
    assert sender.acknowledge(5, 2) == ["a", "b"]
    assert [items for _, items in sender.take(6)] == [("c",)]


def test_an_acknowledgement_of_what_was_never_sent_is_ignored() -> None:
    sender: Sender[str] = Sender()
    sender.push("a")
    assert sender.acknowledge(0, 1) == []
    assert len(sender) == 1


def test_no_more_is_sent_than_was_granted_and_a_grant_never_shrinks() -> None:
    sender: Sender[int] = Sender(limit=2)
    for number in range(5):
        sender.push(number)
    assert [items for _, items in sender.take(0)] == [(0, 1)]
    assert not sender.ready()
    sender.grant(1)
    sender.grant(4)
    assert sender.ready()
    assert [items for _, items in sender.take(0)] == [(2, 3)]


def test_a_receiver_applies_each_item_once_and_nothing_over_a_gap() -> None:
    receiver = Receiver()
    assert receiver.fresh(1, ("a", "b")) == ("a", "b")
    assert receiver.fresh(1, ("a", "b")) == ()
    assert receiver.fresh(2, ("b", "c")) == ("c",)
    assert receiver.fresh(5, ("e",)) == ()
    assert receiver.applied == 3


@given(
    st.lists(st.sampled_from(["push", "carry", "lose", "double", "ack"]), max_size=60),
    st.randoms(use_true_random=False),
)
def test_whatever_the_channel_does_items_arrive_once_and_in_order(steps: list[str], rng: object) -> None:
    sender: Sender[int] = Sender()
    receiver = Receiver()
    got: list[int] = []
    now = pushed = 0
    for step in steps:
        now += RESEND_US
        if step == "push":
            sender.push(pushed)
            pushed += 1
        elif step == "ack":
            sender.acknowledge(now, receiver.applied)
        else:
            for first, items in sender.take(now):
                for _ in range({"carry": 1, "lose": 0, "double": 2}[step]):
                    got.extend(receiver.fresh(first, items))
    for _ in range(3):
        now += 10 * RESEND_US
        for first, items in sender.take(now):
            got.extend(receiver.fresh(first, items))
        sender.acknowledge(now, receiver.applied)
    assert got == list(range(pushed))
    assert len(sender) == 0
