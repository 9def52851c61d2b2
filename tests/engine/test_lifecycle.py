"""The two tables of life: every state, every cause, no way out of a terminal state but a revival."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import InvariantViolated
from engine.lifecycle import POD_TABLE, TASK_TABLE, PodCause, TaskCause, mermaid, next_pod_state, next_task_state
from engine.tasks import TERMINAL_STATES, PodState, TaskState

DOCS = Path(__file__).parents[2] / "docs" / "engine.md"


@pytest.mark.parametrize("cause", TaskCause)
@pytest.mark.parametrize("state", TaskState)
def test_a_task_moves_exactly_as_the_table_says(state: TaskState, cause: TaskCause) -> None:
    if cause in TASK_TABLE[state]:
        assert next_task_state(state, cause) is TASK_TABLE[state][cause]
    else:
        with pytest.raises(InvariantViolated, match=f"a task that is {state} cannot {cause}"):
            next_task_state(state, cause)


@pytest.mark.parametrize("cause", PodCause)
@pytest.mark.parametrize("state", PodState)
def test_a_pod_moves_exactly_as_the_table_says(state: PodState, cause: PodCause) -> None:
    if cause in POD_TABLE[state]:
        assert next_pod_state(state, cause) is POD_TABLE[state][cause]
    else:
        with pytest.raises(InvariantViolated, match=f"a Pod that is {state} cannot {cause}"):
            next_pod_state(state, cause)


def test_every_state_has_a_row_and_can_be_reached() -> None:
    assert set(TASK_TABLE) == set(TaskState)
    assert set(POD_TABLE) == set(PodState)
    assert {after for row in TASK_TABLE.values() for after in row.values()} == set(TaskState)
    assert {after for row in POD_TABLE.values() for after in row.values()} | {PodState.CREATING} == set(PodState)


def test_only_the_dead_letter_can_be_left_again() -> None:
    assert {state for state in TERMINAL_STATES if TASK_TABLE[state]} == {TaskState.DEAD}
    assert TASK_TABLE[TaskState.DEAD] == {TaskCause.REVIVE: TaskState.PENDING}


def test_from_every_state_a_terminal_one_can_be_reached() -> None:
    for state in TaskState:
        seen, todo = set(), [state]
        while todo:
            at = todo.pop()
            if at not in seen:
                seen.add(at)
                todo += TASK_TABLE[at].values()
        assert seen & TERMINAL_STATES


def test_the_docs_show_the_diagrams_of_the_tables() -> None:
    assert mermaid().strip() in DOCS.read_text(encoding="utf-8")
