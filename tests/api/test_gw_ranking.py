"""The ranking before the queue, as a pure unit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.gateway.ranking import AdmissionWindow, WindowFull

SECOND = 1_000_000


def window(size: int = 100, wait_s: float = 10.0) -> AdmissionWindow[str]:
    return AdmissionWindow(size, int(wait_s * SECOND))


def put(ranked, item: str, tenant: str = "a", priority: int = 0, now: int = 0, weight: int = 1, most: int = 100):
    return ranked.push(item, tenant=tenant, weight=weight, priority=priority, now=now, max_waiting=most)


def order(ranked, now: int = 0) -> list[str]:
    taken = []
    while (first := ranked.pop(now)) is not None:
        taken.append(first.item)
    return taken


def test_urgent_goes_before_ordinary_whatever_came_first() -> None:
    ranked = window()
    put(ranked, "ordinary", priority=99)
    put(ranked, "urgent", priority=100)
    assert order(ranked) == ["urgent", "ordinary"]


def test_inside_a_tenant_priority_then_arrival_decide() -> None:
    ranked = window()
    for item, priority in [("first", 0), ("high", 5), ("second", 0), ("low", -5)]:
        put(ranked, item, priority=priority)
    assert order(ranked) == ["high", "first", "second", "low"]


def test_a_tenant_that_floods_the_window_does_not_delay_another() -> None:
    ranked = window()
    for number in range(50):
        put(ranked, f"flood{number}", "flood", priority=50)
    put(ranked, "single", "quiet", priority=0)
    assert order(ranked).index("single") <= 1


def test_tenants_share_by_their_weights() -> None:
    ranked = window(1000)
    for number in range(60):
        put(ranked, f"heavy{number}", "heavy", weight=3, most=1000)
        put(ranked, f"light{number}", "light", weight=1, most=1000)
    first = order(ranked)[:40]
    assert sum(item.startswith("heavy") for item in first) == pytest.approx(30, abs=1)


def test_idleness_earns_no_credit() -> None:
    ranked = window(1000)
    for number in range(40):
        put(ranked, f"busy{number}", "busy")
    for _ in range(20):
        ranked.pop(0)
    for number in range(20):
        put(ranked, f"back{number}", "back")
    first = order(ranked)[:20]
    assert 9 <= sum(item.startswith("back") for item in first) <= 11


def test_ordinary_work_that_waited_too_long_alternates_with_a_stream_of_urgent_work() -> None:
    ranked = window(wait_s=1)
    put(ranked, "o1", "o", now=0)
    put(ranked, "o2", "o", now=0)
    for number in range(4):
        put(ranked, f"u{number}", "u", priority=100, now=0)
    assert ranked.pop(SECOND // 2).item == "u0"
    late = 2 * SECOND
    assert [ranked.pop(late).item for _ in range(5)] == ["o1", "u1", "o2", "u2", "u3"]


def test_a_full_window_refuses_ordinary_work_and_lets_urgent_work_push_out_the_newest_of_the_largest_tenant() -> None:
    ranked = window(3)
    put(ranked, "a1", "a")
    put(ranked, "b1", "b")
    put(ranked, "b2", "b")
    with pytest.raises(WindowFull) as full:
        put(ranked, "c1", "c")
    assert full.value.scope == "window"
    assert put(ranked, "u1", "c", priority=100).item == "b2"
    assert order(ranked) == ["u1", "a1", "b1"]


def test_urgent_work_does_not_push_out_urgent_work() -> None:
    ranked = window(1)
    put(ranked, "u1", "a", priority=100)
    with pytest.raises(WindowFull):
        put(ranked, "u2", "b", priority=200)


def test_a_tenant_has_its_own_bound() -> None:
    ranked = window()
    put(ranked, "a1", "a", most=1)
    with pytest.raises(WindowFull) as full:
        put(ranked, "a2", "a", priority=100, most=1)
    assert full.value.scope == "tenant"
    put(ranked, "b1", "b", most=1)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(-5, 105), st.integers(1, 4), st.integers(0, 3), st.booleans()),
        max_size=60,
    ),
    st.integers(1, 12),
)
def test_nothing_is_lost_or_doubled_and_the_bound_holds(steps, size) -> None:
    ranked = window(size, 2)
    inside, now = set(), 0
    for number, (tenant, priority, weight, passed, take) in enumerate(steps):
        now += passed * SECOND
        try:
            out = put(ranked, str(number), tenant, priority, now, weight, most=8)
            inside.add(str(number))
            if out is not None:
                inside.remove(out.item)
        except WindowFull:
            pass
        if take and (first := ranked.pop(now)) is not None:
            inside.remove(first.item)
        assert len(ranked) == len(inside) <= size
    assert sorted(order(ranked, now)) == sorted(inside)
