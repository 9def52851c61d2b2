"""Records made field by field equal those that their constructors make."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from engine.events import TaskFinished, TaskStarted
from engine.tasks import TaskSpec, TaskType
from sim.maker import Maker
from sim.synthetic import SyntheticConfig, make


def test_a_made_record_equals_a_constructed_one() -> None:
    """Equal, of the same class, with the same hash, and as frozen."""
    made = Maker(TaskStarted).make(("r", 2, 1))
    assert made == TaskStarted("r", 2, 1) and hash(made) == hash(TaskStarted("r", 2, 1))
    with pytest.raises(AttributeError):
        made.rank = 3


def test_a_missing_value_is_refused() -> None:
    """A field that was added since may not stay unset."""
    with pytest.raises(TypeError, match=f"TaskFinished: 2 values for {len(fields(TaskFinished))} fields"):
        Maker(TaskFinished).make(("r", 1))


def test_a_class_that_checks_itself_is_refused() -> None:
    """Its check would be passed over."""

    @dataclass(frozen=True, slots=True)
    class Checked:
        value: int

        def __post_init__(self) -> None:
            if self.value < 0:
                raise ValueError("value: below 0")

    with pytest.raises(TypeError, match="__post_init__"):
        Maker(Checked)


def test_tasks_of_columns_equal_constructed_ones() -> None:
    """What the columns leave out has its default."""
    workload = make(SyntheticConfig(tasks=20))
    for arrival in workload.arrivals:
        task = arrival.task
        assert isinstance(task, TaskSpec) and task.task_type in TaskType
        assert task == TaskSpec(
            task.req_no,
            task.tenant,
            task.group,
            task.task_type,
            task.method,
            task.model,
            task.priority,
            task.demand,
            task.slots,
            declared_us=task.declared_us,
            features=task.features,
        )
