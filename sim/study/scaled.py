"""Makes a busy service out of a small one's trace without changing what its bursts are like.

GenTD26 keeps less than one GPU busy. A service sixteen times as large has sixteen times as many users, each as slow and as restless
as before. So its requests are those of several copies of the trace, each begun at another moment of it and with users of its own.
Sped-up time would be something else: it would squeeze a user's hour into four minutes while a picture still takes half a minute.

Begun at any moment (``superpose``), the copies know nothing of each other, and the index of dispersion keeps its value in every
window: variance and mean of the counts grow alike. Begun at whole days (``days``), they share the hours of the day, which keeps the
variation of gaps and the peaks instead, and lets dispersion grow with the number of copies. No way keeps both: at sixteen times the
rate, the trace's dispersion means smaller waves than the trace's gaps do. Waiting depends on dispersion over spans like those of
service and of queues, so ``superpose`` is the default.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date, datetime
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine.tasks import SECOND, Micros
from sim import gentd26
from sim.draws import unit
from sim.synthetic import Zipf
from sim.workload import Arrival, Workload, WorkloadError, ranked

METHODS = ("superpose", "days")
DAY_US = 86_400 * SECOND
_COPIES_MAX = 100_000
_LORA_US = 4_400_000
"""Median load of an adapter, taken out of a recorded time once per adapter, for the world to put in where one is loaded."""
_LORAS, _LORA_ZIPF = 874, 0.92


@dataclass(frozen=True, slots=True)
class Window:
    """The requests of some whole days, in microseconds from the first day's midnight."""

    arrivals: tuple[Arrival, ...]
    span_us: Micros
    first_day: date
    last_day: date

    @property
    def work_us(self) -> Micros:
        """Recorded run time of all requests."""
        return sum(arrival.truth.work_us or 0 for arrival in self.arrivals)


def window(trace: Path, first_day: str | None, last_day: str | None) -> Window:
    """Read the days from `first_day` to `last_day` (ISO dates, both included; None: as far as the trace goes)."""
    whole, origin = _read(trace, trace.stat().st_mtime_ns if trace.exists() else 0)
    first = _day("from", first_day) or origin.date()
    midnight = datetime.combine(origin.date(), datetime.min.time())
    into_day = round((origin - midnight).total_seconds()) * SECOND
    ends = origin.date().toordinal() + (whole.arrivals[-1].at + into_day) // DAY_US
    last = _day("to", last_day) or date.fromordinal(ends)
    if last < first:
        raise WorkloadError(f"to: {last} comes before {first}; give the last day after the first")
    shift = into_day - (first.toordinal() - origin.date().toordinal()) * DAY_US
    span = (last.toordinal() - first.toordinal() + 1) * DAY_US
    times = [arrival.at + shift for arrival in whole.arrivals]
    begin, end = bisect_left(times, 0), bisect_left(times, span)
    if begin == end:
        raise WorkloadError(
            f"from, to: {trace.name} has no request between {first} and {last}; "
            f"it goes from {origin.date()} to {date.fromordinal(ends)}"
        )
    chosen = (replace(whole.arrivals[place], at=times[place]) for place in range(begin, end))
    return Window(tuple(chosen), span, first, last)


def scaled(
    source: Window, *, busy_gpus: float, hours: float, method: str, tenants: int, urgent_share: float, seed: int
) -> Workload:
    """Return `hours` of requests that keep `busy_gpus` reference GPUs busy on average, loads of models not counted.

    The seed draws where in the window each copy begins, who belongs to which tenant, and what is urgent. The last copy brings only
    so many of its users as the work calls for: whole users, so that their bursts stay.
    """
    if method not in METHODS:
        raise WorkloadError(f"rate_method: unknown {method!r}; use {' or '.join(METHODS)}")
    length = round(hours * 3600 * SECOND)
    wanted = round(busy_gpus * length)
    times = np.array([arrival.at for arrival in source.arrivals], dtype=np.int64)
    found: list[tuple[Micros, int, Arrival]] = []
    copies = work = 0
    while work < wanted:
        if copies >= _COPIES_MAX:
            raise WorkloadError(
                "busy_gpus: these days hold too little work to make so much of; take more days or fewer GPUs"
            )
        copy = list(_copy(source, times, _begin(source, copies, method, seed), length, copies))
        copies += 1
        brings = _work(copy)
        if work + brings > wanted:
            copy = _some_users(copy, wanted - work, seed)
            brings = wanted - work
        work += brings
        found += [(arrival.at, copies, arrival) for arrival in copy]
    found.sort(key=lambda item: (item[0], item[1], item[2].task.req_no))
    arrivals = ranked((arrival for *_, arrival in found), tenants=tenants, urgent_share=urgent_share, seed=seed)
    notes: tuple[tuple[str, int | float | str], ...] = (
        ("days", f"{source.first_day} .. {source.last_day}"),
        ("rate_method", method),
        ("copies", copies),
        ("busy_gpus", round(_work(arrivals) / length, 3)),
    )
    return Workload(f"gentd26-{source.first_day}-{source.last_day}", arrivals, notes)


def _begin(source: Window, copy: int, method: str, seed: int) -> Micros:
    """Return the moment of the window at which a copy begins."""
    if method == "superpose":
        return round(unit(seed, "begin", copy) * (source.span_us - 1))
    days = source.span_us // DAY_US
    turn, place = divmod(copy, days)
    order = sorted(range(days), key=lambda day: unit(seed, "day", turn, day))
    return order[place] * DAY_US


def _copy(source: Window, times: np.ndarray, begin: Micros, length: Micros, number: int) -> Iterator[Arrival]:
    """Yield what arrives within `length` of `begin`, going round at the end of the window, with users of its own."""
    count = len(times)
    place = int(np.searchsorted(times, begin))
    rounds = 0
    while True:
        if place >= count:
            place, rounds = 0, rounds + 1
        at = int(times[place]) + rounds * source.span_us - begin
        if at >= length:
            return
        arrival = source.arrivals[place]
        mark = f"~{number}" if not rounds else f"~{number}.{rounds}"
        task = replace(arrival.task, req_no=arrival.task.req_no + mark, group=arrival.task.group + f"~{number}")
        features = tuple((name, task.group if name == "user" else value) for name, value in task.features)
        yield _with_adapters(replace(arrival, at=at, task=replace(task, features=features)))
        place += 1


def _with_adapters(arrival: Arrival) -> Arrival:
    """Give the adapters names, which the trace keeps to itself: a user keeps to those of his own taste, as popular as published."""
    task, truth = arrival.task, arrival.truth
    count = next((int(value) for name, value in task.features if name == "loras"), 0)
    if not count or truth.work_us is None:
        return arrival
    names = tuple(
        f"lora-{_POPULAR.rank(unit(0, 'lora', task.group, task.model, number)):04d}" for number in range(count)
    )
    work = max(SECOND, truth.work_us - count * _LORA_US)
    return replace(arrival, truth=replace(truth, work_us=min(work, truth.work_us), loras=names))


_POPULAR = Zipf(_LORAS, _LORA_ZIPF)


def _some_users(copy: list[Arrival], wanted: Micros, seed: int) -> list[Arrival]:
    """Keep users, in an order of luck, until their work is enough."""
    by_user: dict[str, Micros] = {}
    for arrival in copy:
        by_user[arrival.task.group] = by_user.get(arrival.task.group, 0) + (arrival.truth.work_us or 0)
    kept: set[str] = set()
    for user in sorted(by_user, key=lambda name: unit(seed, "thin", name)):
        if wanted <= 0:
            break
        kept.add(user)
        wanted -= by_user[user]
    return [arrival for arrival in copy if arrival.task.group in kept]


def _work(arrivals: list[Arrival] | tuple[Arrival, ...]) -> Micros:
    return sum(arrival.truth.work_us or 0 for arrival in arrivals)


def _day(field: str, text: str | None) -> date | None:
    if text is None:
        return None
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise WorkloadError(f"{field}: {text!r} is not a day like 2024-11-20") from None


@lru_cache(maxsize=2)
def _read(trace: Path, _changed_ns: int) -> tuple[Workload, datetime]:
    workload = gentd26.read(trace)
    return workload, datetime.fromisoformat(str(dict(workload.notes)["origin"])).replace(tzinfo=None)
