"""Seeded drills of the whole control plane, and proof that they notice broken rules.

More seeds: ``AIGC_DRILL_SEEDS=2500 AIGC_DRILL_FIRST=1000 pytest tests/protocol/test_drill.py``. One seed again:
``python tests/protocol/drill.py SEED``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from drill import Counts, Drill, Plan, run_seed
from mutants import MUTANTS

SEEDS = int(os.environ.get("AIGC_DRILL_SEEDS", "200"))
FIRST = int(os.environ.get("AIGC_DRILL_FIRST", "0"))
PORTION = 20


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS, PORTION))
def test_no_seed_breaks_a_rule_and_everything_ends(first: int) -> None:
    runs = [run_seed(seed) for seed in range(first, min(first + PORTION, FIRST + SEEDS))]
    total = Counts()
    for run in runs:
        total.messages += run.messages
        total.scheduler_crashes += run.scheduler_crashes
        total.agent_crashes += run.agent_crashes
        total.lost += run.lost
    assert total.messages > 500 * len(runs), "the drill was idle"
    if len(runs) == PORTION:
        assert total.lost
        assert total.scheduler_crashes
        assert total.agent_crashes


@pytest.mark.parametrize("seed", [11, 1688])
def test_a_seed_that_once_found_a_fault_finds_none(seed: int) -> None:
    run_seed(seed)


def test_the_same_seed_gives_the_same_run() -> None:
    first, second = Drill(Plan.of(3)), Drill(Plan.of(3))
    assert first.run() == second.run()
    assert first.disk == second.disk


KILLED_BY = {
    "never_fence": (20,),
    "judge_the_lease_at_heartbeats_only": (20,),
    "count_the_lease_from_receipt": (20,),
    "accept_any_session": (19,),
    "acknowledge_what_was_heard_meanwhile": (28,),
    "obey_while_seeking": (622,),
    "number_sessions_anew_in_each_life": (1688,),
}
"""Seeds known to notice a mutant; others are tried when the engine's decisions have changed since."""


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_rule_is_noticed(mutant: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    for seed in (*KILLED_BY.get(mutant.__name__, ()), *range(120)):
        try:
            run_seed(seed)
        except Exception:
            return
    pytest.fail(f"{mutant.__name__} lived through every seed")
