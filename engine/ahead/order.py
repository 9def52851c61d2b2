"""In which order waiting tasks will be served: the waiting lines' own order, worked out for all of them at once.

The engine's lines answer who is next now; here virtual times are moved on as if everybody before had been served, and an ordinary
task that will have aged by its turn stands where the aged stand.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.entities import Task
from engine.levels.ordering import AGED, ORDINARY, Ordering
from engine.tasks import Micros

Ints = npt.NDArray[np.int64]


def in_order(tasks: Sequence[Task], ordering: Ordering, now: Micros, at_once: int) -> list[int]:
    """Return the indices of `tasks` in the order of service; `at_once` tasks are served at a time."""
    if not tasks:
        return []
    rank = ordering.rank
    ranks = [rank(task, now) for task in tasks]
    band = np.array([each[0] for each in ranks], dtype=np.int64)
    key = np.array([each[1] for each in ranks], dtype=np.int64)
    seq = np.array([task.seq for task in tasks], dtype=np.int64)
    if ordering.fair_tenants:
        order = _shared(tasks, band, key, seq, ordering.fair_groups)
    else:
        order = np.lexsort((seq, key, band))
    if ordering.age_us and (band == ORDINARY).any():
        order = _aged_in(tasks, order, band, ordering.age_us, now, at_once)
    found: list[int] = order.tolist()
    return found


def _shared(tasks: Sequence[Task], band: Ints, key: Ints, seq: Ints, groups_share: bool) -> Ints:
    """Order by the virtual times that tenants and groups will have when a task's turn comes."""
    ordinary = band != AGED
    tenant = np.where(ordinary, np.array([task.tenant.seq for task in tasks], dtype=np.int64), -1)
    cost = np.array([task.cost_of(task.predicted_us) for task in tasks], dtype=np.int64)
    zero = np.zeros(len(tasks), dtype=np.int64)
    group, group_tag = zero, zero
    if groups_share:
        group = np.array([-1 if task.group is None else task.group.seq for task in tasks], dtype=np.int64)
        group = np.where(ordinary, group, -1)
        begins = np.array([0 if task.group is None else task.group.vtime for task in tasks], dtype=np.int64)
        credit = np.array([0 if task.group is None else task.group.credit for task in tasks], dtype=np.int64)
        order = np.lexsort((seq, key, group, tenant, band))
        before = _sums_before(cost, order, (band, tenant, group))
        group_tag = np.where(group >= 0, begins + np.maximum(0, before - credit), 0)
    begins = np.array([task.tenant.vtime for task in tasks], dtype=np.int64)
    credit = np.array([task.tenant.credit for task in tasks], dtype=np.int64)
    weight = np.array([task.tenant.weight for task in tasks], dtype=np.int64)
    order = np.lexsort((seq, key, group, group_tag, tenant, band))
    before = _sums_before(cost * 1000 // weight, order, (band, tenant))
    tenant_tag = np.where(ordinary, begins + np.maximum(0, before - credit), 0)
    return np.lexsort((seq, key, group, group_tag, tenant, tenant_tag, band))


def _sums_before(amount: Ints, order: Ints, parts: tuple[Ints, ...]) -> Ints:
    """Return for each item the sum of the amounts of those before it in its part."""
    sorted_amount = amount[order]
    sums = np.cumsum(sorted_amount) - sorted_amount
    first = np.ones(len(order), dtype=bool)
    first[1:] = False
    for part in parts:
        here = part[order]
        first[1:] |= here[1:] != here[:-1]
    starts = np.flatnonzero(first)
    base = np.repeat(sums[starts], np.diff(np.append(starts, len(order))))
    result = np.empty_like(sums)
    result[order] = sums - base
    return result


def _aged_in(tasks: Sequence[Task], order: Ints, band: Ints, age_us: Micros, now: Micros, at_once: int) -> Ints:
    """Move ordinary tasks that will have aged before their turn to the time at which they age."""
    work = np.array([task.predicted_us for task in tasks], dtype=np.float64)[order]
    turn = now + (np.cumsum(work) - work) / max(1, at_once)
    ages = np.array([task.submitted_at + age_us for task in tasks], dtype=np.float64)[order]
    due = np.minimum(turn, ages)
    due[band[order] == 0] = -np.inf
    found: Ints = order[np.argsort(due, kind="stable")]
    return found
