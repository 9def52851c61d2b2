"""The bookkeeping of a tier: never over its budget, what is pinned or held stays, and what is worth least goes first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from executors.residency.ledger import Entry, TierLedger

NAMES = st.sampled_from("abcdefgh")
SIZES = st.integers(0, 60)


class LedgerMachine(RuleBasedStateMachine):
    """Any calls in any order, beside a plain model of what must be there."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = TierLedger(100)
        self.sizes: dict[str, int] = {}
        self.pins: set[str] = set()
        self.holds: dict[str, int] = {}
        self.evicted = 0

    @rule(name=NAMES, size=SIZES, cost=st.integers(0, 10**7))
    def admit(self, name: str, size: int, cost: int) -> None:
        safe = {each for each in self.sizes if each in self.pins or self.holds.get(each)}
        kept = sum(self.sizes[each] for each in safe)
        going = self.ledger.admit(name, size, cost)
        if name in self.sizes:
            assert going == []
        elif going is None:
            assert kept + size > self.ledger.budget_bytes, "refused although it would have fitted"
        else:
            assert not safe & set(going)
            for each in going:
                del self.sizes[each]
            self.evicted += len(going)
            self.sizes[name] = size

    @rule(name=NAMES)
    def use(self, name: str) -> None:
        assert self.ledger.use(name) == (name in self.sizes)

    @rule(name=NAMES)
    def pin(self, name: str) -> None:
        self.ledger.pin(name)
        self.pins.add(name)

    @rule(name=NAMES)
    def unpin(self, name: str) -> None:
        self.ledger.unpin(name)
        self.pins.discard(name)

    @rule(name=NAMES)
    def hold(self, name: str) -> None:
        self.ledger.hold(name)
        self.holds[name] = self.holds.get(name, 0) + 1

    @rule(name=NAMES)
    def release(self, name: str) -> None:
        if self.holds.get(name):
            self.ledger.release(name)
            self.holds[name] -= 1
        else:
            with pytest.raises(ValueError, match="more often"):
                self.ledger.release(name)

    @rule(name=NAMES)
    def drop(self, name: str) -> None:
        assert self.ledger.drop(name) == (self.sizes.pop(name, None) is not None)

    @rule(budget=st.integers(0, 150))
    def resize(self, budget: int) -> None:
        safe = {each for each in self.sizes if each in self.pins or self.holds.get(each)}
        if sum(self.sizes[each] for each in safe) > budget:
            with pytest.raises(ValueError, match="budget_bytes"):
                self.ledger.resize(budget)
            return
        going = self.ledger.resize(budget)
        assert not safe & set(going)
        for each in going:
            del self.sizes[each]
        self.evicted += len(going)

    @invariant()
    def sizes_are_right_and_within_the_budget(self) -> None:
        assert self.ledger.used_bytes == sum(self.sizes.values())
        assert self.ledger.used_bytes <= self.ledger.budget_bytes
        assert set(self.ledger) == set(self.sizes)
        assert self.ledger.counts.evictions == self.evicted


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def _full(*entries: tuple[str, int, int]) -> TierLedger:
    ledger = TierLedger(sum(size for _, size, _ in entries))
    for name, size, cost in entries:
        assert ledger.admit(name, size, cost) == []
    return ledger


def test_among_equals_the_least_recently_used_goes() -> None:
    ledger = _full(("a", 10, 10**6), ("b", 10, 10**6), ("c", 10, 10**6))
    assert ledger.admit("d", 10, 10**6) == ["a"]
    assert ledger.admit("e", 10, 10**6) == ["b"]


def test_what_is_costly_to_bring_again_outlives_what_is_cheap() -> None:
    ledger = _full(("costly", 10, 20 * 10**6), ("cheap", 10, 10**6))
    assert ledger.admit("new", 10, 10**6) == ["cheap"]


def test_what_is_used_often_outlives_what_was_used_once() -> None:
    ledger = _full(("often", 10, 10**6), ("once", 10, 10**6))
    for _ in range(5):
        ledger.use("often")
    assert ledger.admit("new", 10, 10**6) == ["once"]


def test_one_large_entry_goes_before_many_small_ones_of_the_same_cost() -> None:
    ledger = _full(("large", 80, 10**6), ("s1", 10, 10**6), ("s2", 10, 10**6))
    assert ledger.admit("new", 20, 10**6) == ["large"]


def test_what_was_worth_much_once_is_not_kept_for_ever() -> None:
    ledger = _full(("old", 10, 50 * 10**6), ("x", 10, 10**6))
    for number in range(200):
        name = f"n{number}"
        gone = ledger.admit(name, 10, 10**6)
        ledger.use(name)
        if gone == ["old"]:
            return
    pytest.fail("an entry that is never used again stayed through 200 newer ones")


def test_differences_of_quick_loads_are_noise() -> None:
    ledger = _full(("a", 10, 90_000), ("b", 10, 1_000))
    assert ledger.admit("c", 10, 5) == ["a"]


def test_a_negative_size_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="size_bytes of 'x'"):
        TierLedger(10).admit("x", -1)


@given(st.dictionaries(NAMES, st.integers(1, 60), min_size=1), st.integers(1, 100))
def test_a_restored_ledger_above_its_budget_names_what_must_go(sizes: dict[str, int], budget: int) -> None:
    ledger = TierLedger(budget)
    for number, (name, size) in enumerate(sizes.items()):
        ledger.restore(name, Entry(size, last_use=number))
    for name in ledger.overflow():
        ledger.evict(name)
    assert ledger.used_bytes <= budget
