"""Orderings by how long a task takes: shortest first, by several measures, Gittins, least attained, earliest deadline.

With an oracle for a forecaster the predicted durations are the true ones; with an online predictor the same policies rank by
what it believes. Both are only the estimate to them.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.entities import Task
from engine.levels.ordering import AGED, ORDINARY, Policy
from engine.tasks import NEVER, SECOND, Estimate, Micros, Quantiles


def ran_us(task: Task, now: Micros) -> Micros:
    """Return how long a task has run in all its attempts, the current one included."""
    return task.ran_us + (now - task.started_at if task.started_at and task.pods else 0)


def remaining_us(task: Task, now: Micros) -> Micros:
    """Return how long a task still runs by its prediction; one that has outlived it needs as long again as it overran."""
    done = task.kept_us + (now - task.started_at if task.started_at and task.pods else 0)
    left = task.predicted_us - done
    return left if left > 0 else max(1, -left)


def typical_us(task: Task) -> Micros:
    """Return the median of the predicted run time; without a forecast, what was declared."""
    estimate: Estimate | None = task.estimate
    if estimate is None or not estimate.serves_every_model:
        return task.predicted_us
    return max(1, estimate.duration().p50)


@dataclass(frozen=True, slots=True)
class Sjf(Policy):
    """Shortest job first, by the median of the predicted run time; nobody is stopped."""

    def key(self, task: Task, now: Micros) -> int:
        """Rank by the median."""
        return typical_us(task)


@dataclass(frozen=True, slots=True)
class Sept(Policy):
    """Shortest expected processing time first: by the mean of the predicted run time."""

    def key(self, task: Task, now: Micros) -> int:
        """Rank by the mean."""
        return task.predicted_us


@dataclass(frozen=True, slots=True)
class Srtf(Policy):
    """Shortest remaining time first: a running task goes for one that ends so much sooner that the exchange pays its cost."""

    preemptive: bool = True

    def key(self, task: Task, now: Micros) -> int:
        """Rank by what remains; while a task waits that is constant."""
        return max(1, task.predicted_us - task.kept_us)

    def outranks(self, waiting: Task, running: Task, now: Micros, loss_us: Micros) -> bool:
        """Weigh what the waiting task is saved against what the running one loses and has to wait."""
        return remaining_us(running, now) - self.key(waiting, now) > loss_us

    def standing(self, running: Task, now: Micros) -> int:
        """Rank by what remains."""
        return remaining_us(running, now)

    def next_change_at(self, running: Task, now: Micros) -> Micros:
        """A running task only gains on the waiting ones until it outlives its prediction."""
        return NEVER


@dataclass(frozen=True, slots=True)
class Gittins(Policy):
    """The largest Gittins index first: the best chance of ending per time spent, from predicted quantiles and the time had so far.

    Half of the tasks with such a prediction are taken to end at its median, four in ten at P90 and the rest at P99. Preemption is
    optional (`preemptive`): an index may fall while a task runs, so a running one goes when its own has become worse.
    """

    def key(self, task: Task, now: Micros) -> int:
        """Rank by the inverse index: predicted microseconds per completion."""
        return cost_per_end(quantiles_of(task), ran_us(task, now))

    def outranks(self, waiting: Task, running: Task, now: Micros, loss_us: Micros) -> bool:
        """Compare the indices; the exchange has to pay what it costs."""
        return self.key(running, now) - self.key(waiting, now) > loss_us

    def standing(self, running: Task, now: Micros) -> int:
        """Rank by the inverse index now."""
        return self.key(running, now)

    def next_change_at(self, running: Task, now: Micros) -> Micros:
        """The index falls when a running task has outlived a quantile."""
        ran = ran_us(running, now)
        later = [at for at in _points(quantiles_of(running)) if at > ran]
        return now + min(later) - ran if later else NEVER


def quantiles_of(task: Task) -> Quantiles:
    """Return the predicted quantiles; without a forecast, the declared run time for all of them."""
    estimate: Estimate | None = task.estimate
    if estimate is None or not estimate.serves_every_model:
        return Quantiles(task.predicted_us, task.predicted_us, task.predicted_us, task.predicted_us)
    return estimate.duration()


def _points(q: Quantiles) -> tuple[int, int, int]:
    median = max(1, q.p50)
    late = max(median, q.p90)
    return median, late, max(late, q.p99)


def cost_per_end(q: Quantiles, ran: Micros) -> int:
    """Return the inverse Gittins index after `ran` microseconds of service: min over d of E[min(S - ran, d)] / P(S - ran <= d).

    The minimum lies at one of the points where tasks end. A task that has outlived them all is taken to need as long again.
    """
    ends = [(at - ran, mass) for at, mass in zip(_points(q), (50, 40, 10), strict=True) if at > ran]
    if not ends:
        return max(1, ran)
    best = NEVER
    for horizon, _ in ends:
        spent = sum(min(left, horizon) * mass for left, mass in ends)
        ending = sum(mass for left, mass in ends if left <= horizon)
        best = min(best, spent // ending)
    return max(1, best)


@dataclass(frozen=True, slots=True)
class Las(Policy):
    """Least attained service in discrete queues (Tiresias' 2D-LAS): GPUs x time a task has had decides its queue.

    A task starts in the first queue and moves to the next one when its attained GPU time passes a threshold. Lower queues go first
    and stop tasks of higher ones; inside a queue the one that first started earliest goes first.
    """

    preemptive: bool = True
    queues_gpu_us: tuple[Micros, ...] = (3_600 * SECOND, 36_000 * SECOND)
    """Attained GPU time at which a task moves on to the next queue, rising."""

    def key(self, task: Task, now: Micros) -> int:
        """Rank by the queue, then by when the first attempt started; those that never did come last in theirs."""
        had = task.cost_of(ran_us(task, now))
        queue = sum(1 for threshold in self.queues_gpu_us if had >= threshold)
        return queue * NEVER + (task.began_at or NEVER - 1)

    def next_change_at(self, running: Task, now: Micros) -> Micros:
        """A running task moves on when its attained GPU time reaches the next threshold."""
        per_second = max(1, running.cost_of(SECOND))
        had = running.cost_of(ran_us(running, now))
        for threshold in self.queues_gpu_us:
            if had < threshold:
                return now + max(1, -(-(threshold - had) * SECOND // per_second))
        return NEVER


@dataclass(frozen=True, slots=True)
class Edf(Policy):
    """Earliest deadline first: by the time at which a task must have started; those without one come last, as they came."""

    def key(self, task: Task, now: Micros) -> int:
        """Rank by the start deadline."""
        return task.deadline if task.deadline is not None else NEVER

    def rank(self, task: Task, now: Micros) -> tuple[int, int]:
        """Rank by the deadline; ageing is for those that have none."""
        if self.age_us and task.deadline is None and task.submitted_at + self.age_us <= now:
            return AGED, task.submitted_at + self.age_us
        return ORDINARY, self.key(task, now)
