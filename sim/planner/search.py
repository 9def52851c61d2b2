"""The search: the fewest GPUs of one model by bracketing and bisection, the cheapest mix by pruning.

More GPUs are usually better, but nobody promises it: placement, group affinity and ties can make a larger cluster worse. So what
the search found is confirmed with every seed, its neighbours on both sides are simulated, and a larger cluster that misses
sends it on upwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product

from sim.planner.objectives import shown
from sim.planner.request import PlanRequest, Pool, pool_text
from sim.planner.trials import Trial, Trials, binding

_GROWTH = 1.5
_PLATEAU = 0.02
"""Three enlargements in a row that improve the nearest objective by less than this bring nothing."""
_FRUITLESS = 20
"""Enlargements with every seed of what held with fewer, before the interval is taken to be too wide for an answer."""
_CANDIDATES = 20_000
_PROMISING = 0.8
"""Mixes that should manage less than this part of the work are not worth a simulation."""


@dataclass(frozen=True, slots=True)
class Fewest:
    """The answer for one GPU model under one profile."""

    model: str
    count: int | None
    """None: no number of GPUs keeps the objectives."""
    trial: Trial | None
    """Of `count`, with every seed."""
    below: Trial | None
    """Of one GPU less, with every seed; None where there is none less."""
    above: Trial | None
    bound: int
    """Fewest that are not impossible by the work alone."""
    largest: Trial | None = None
    """Where more GPUs do not help: the largest cluster that was tried, with every seed."""
    why: str = ""
    """Where there is no answer: the reason and the remedy."""
    breaches: tuple[str, ...] = ()
    """Where a larger cluster did worse than a smaller one."""


@dataclass(slots=True)
class _Hunt:
    """One search over the number of GPUs."""

    model: str
    judge: Callable[[int, bool], Trial]
    prepare: Callable[[list[int]], None]
    """Runs every seed of these numbers of GPUs, together."""
    bound: int
    most: int
    breaches: list[str] = field(default_factory=list)

    def run(self, start: int, worth: Callable[[Trial], float]) -> tuple[int | None, str]:
        low, high = self.bound - 1, None
        count, step = min(max(start, self.bound), self.most), 1
        previous: list[float] = []
        while high is None:
            trial = self.judge(count, False)
            if trial.holds:
                high = count
                break
            low = max(low, count)
            previous.append(worth(trial))
            if count >= self.most or self._in_vain(previous):
                return None, "plateau" if count < self.most else "most"
            step = max(step + 1, math.ceil(count * (_GROWTH - 1)))
            count = min(self.most, count + step)
        low, high = self._bisect(low, high)
        return self._confirm(high)

    def _in_vain(self, values: list[float]) -> bool:
        """Whether the last three enlargements brought nothing."""
        if len(values) < 4:
            return False
        old, new = values[-4], values[-1]
        return not math.isinf(new) and new > old * (1 - _PLATEAU)

    def _bisect(self, low: int, high: int) -> tuple[int, int]:
        step = 1
        while high - low > 1 and high - step > low and step < (high - low) // 2:
            if not self.judge(high - step, False).holds:
                low = high - step
                break
            high -= step
            step *= 2
        while high - low > 1:
            middle = (low + high) // 2
            if self.judge(middle, False).holds:
                high = middle
            else:
                low = middle
        return low, high

    def _confirm(self, count: int) -> tuple[int | None, str]:
        """Settle on the smallest count that holds with every seed and whose larger neighbour holds too."""
        misses = 0
        while count <= self.most:
            self.prepare(
                [each for each in (count - 1, count, count + 1) if 1 <= each <= self.most and not misses] or [count]
            )
            if not self.judge(count, True).holds:
                misses += 1
                if misses > _FRUITLESS:
                    return None, "plateau"
                count += max(1, count // 50) * (1 + misses // 3)
                continue
            if count < self.most and not self.judge(count + 1, True).holds:
                self.breaches.append(f"{count} {self.model} hold, {count + 1} do not: the answer is sought above")
                count += 2
                continue
            break
        else:
            return None, "most"
        while count > 1 and self.judge(count - 1, True).holds:
            count -= 1
        return count, ""


class Search:
    """Finds answers for a request; `impossible`, `fewest_possible` and `unfit` are the bounds of `sim.planner.bounds`."""

    def __init__(
        self,
        request: PlanRequest,
        trials: Trials,
        impossible: Callable[[Pool], bool],
        fewest_possible: Callable[[str, int], int],
        unfit: Callable[[str], str],
    ) -> None:
        self._request = request
        self._trials = trials
        self._impossible = impossible
        self._fewest_possible = fewest_possible
        self._unfit = unfit

    def fewest(self, model: str, start: int, profile: str | None = None) -> Fewest:
        """Return the fewest GPUs of a model, beginning at a guess."""
        request, most = self._request, self._request.most_gpus
        bound = self._fewest_possible(model, most)
        unfit = self._unfit(model)
        if unfit:
            return Fewest(model, None, None, None, None, bound, why=unfit)
        if bound > most:
            return Fewest(model, None, None, None, None, bound, why=self._too_few(model, bound))

        def judge(count: int, full: bool) -> Trial:
            return self._trials.judge(((model, count),), profile, full=full)

        def worth(trial: Trial) -> float:
            return trial.estimates[binding(request.objectives, trial)].mean

        def prepare(counts: list[int]) -> None:
            self._trials.prepare([((model, count),) for count in counts], profile)

        hunt = _Hunt(model, judge, prepare, bound, most)
        count, stopped = hunt.run(start, worth)
        if count is None:
            if stopped == "most":
                return Fewest(model, None, None, None, None, bound, why=self._too_few(model, most + 1))
            largest = judge(max(trial.pool[0][1] for trial in self._tried(model, profile)), True)
            return Fewest(model, None, None, None, None, bound, largest, self._in_vain(model, largest))
        below = judge(count - 1, True) if count > 1 else None
        above = judge(count + 1, True) if count < most else None
        return Fewest(model, count, judge(count, True), below, above, bound, breaches=tuple(hunt.breaches))

    def mixes(self, pure: list[Fewest]) -> tuple[list[Trial], int]:
        """Try mixed clusters that are cheaper than the cheapest pure one, the most capable first.

        Returns those that hold and go on holding with one GPU more: of many that are tried, one may hold by luck. The number is
        of promising candidates that were left untried for want of budget (`PlanRequest.mixes`).
        """
        request = self._request
        costs = [request.cost(each.trial.pool) for each in pure if each.trial is not None]
        if len(request.offers) < 2 or not costs or not request.mixes:
            return [], 0
        best = min(costs)
        misses = [trial.pool for trial in self._trials.all() if not trial.holds]
        steady: list[Trial] = []
        tried = 0
        candidates = list(self._candidates(pure, best))
        while candidates and tried < request.mixes:
            candidates = [
                pool
                for pool in candidates
                if request.cost(pool) < best - 1e-9
                and self._power(pool, pure) >= _PROMISING
                and not any(_within(pool, missed) for missed in misses)
            ]
            if not candidates:
                break
            pool = max(candidates, key=lambda each: (self._power(each, pure), -request.cost(each), pool_text(each)))
            trial = self._trials.judge(pool)
            if trial.holds:
                trial = self._trials.judge(pool, full=True)
            candidates.remove(pool)
            if not trial.holds:
                misses.append(pool)
            elif self._trials.judge(enlarged(pool), full=True).holds:
                best = request.cost(pool)
                steady.append(trial)
            tried += 1
        left = [pool for pool in candidates if request.cost(pool) < best - 1e-9]
        return steady, sum(not any(_within(pool, missed) for missed in misses) for pool in left)

    def _candidates(self, pure: list[Fewest], best: float) -> Iterator[Pool]:
        """Give every mix below a cost that the bounds allow, of models that have an answer of their own."""
        ranges = []
        size = 1
        for offer, found in zip(self._request.offers, pure, strict=True):
            top = found.count or 0
            if offer.per_hour > 0:
                top = min(top, int(best / offer.per_hour))
            ranges.append(range(top + 1))
            size *= top + 1
        step = 1
        while size / step ** len(ranges) > _CANDIDATES:
            step += 1
        for counts in product(*(each[::step] for each in ranges)):
            pool = self._request.pool(counts)
            if len(pool) > 1 and self._request.cost(pool) < best - 1e-9 and not self._impossible(pool):
                yield pool

    def _power(self, pool: Pool, pure: list[Fewest]) -> float:
        """Return how much of the task a mix should manage, were GPUs worth what their pure clusters show; 1 is just enough."""
        needed = {each.model: each.count for each in pure if each.count}
        return sum(count / needed[model] for model, count in pool if model in needed)

    def _too_few(self, model: str, bound: int) -> str:
        most = self._request.most_gpus
        reason = f"the work alone needs more than {most}" if bound > most else f"{most} do not keep the objectives"
        return f"{model}: {reason}; raise --most-gpus, lower the load, or relax the objective"

    def _tried(self, model: str, profile: str | None) -> list[Trial]:
        return [trial for trial in self._trials.all(profile) if len(trial.pool) == 1 and trial.pool[0][0] == model]

    def _in_vain(self, model: str, largest: Trial) -> str:
        """Say what a cluster that is large enough still takes, and why GPUs do not help."""
        request = self._request
        number = binding(request.objectives, largest)
        objective, value = request.objectives[number], largest.estimates[number].mean
        if objective.kept(value):
            return (
                f"{model}: no number of GPUs is sure to be enough, {objective.name} is {shown(value, objective.unit)} on average "
                f"with {largest.pool[0][1]} of them, but its interval ends at "
                f"{shown(largest.estimates[number].high, objective.unit)}; take more --seeds, or relax the objective"
            )
        return (
            f"{model}: more GPUs do not help, {objective.name} stays at {shown(value, objective.unit)} with "
            f"{largest.pool[0][1]} of them; it is the time of loads and runs, not of queueing: relax the objective, speed up "
            "loads, keep models deployed, or try another profile"
        )


def enlarged(pool: Pool, by: int = 1) -> Pool:
    """Return a cluster with one GPU more, or less, of the model that it has most of."""
    most = max(pool, key=lambda pair: pair[1])[0]
    changed = ((model, count + by * (model == most)) for model, count in pool)
    return tuple((model, count) for model, count in changed if count)


def _within(pool: Pool, other: Pool) -> bool:
    """Whether a cluster has no more of any model than another."""
    has = dict(other)
    return all(count <= has.get(model, 0) for model, count in pool)
