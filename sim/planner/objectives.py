"""Service level objectives as people write them: ``p99_wait<8s``, ``urgent_p99_wait<2s``, ``mean_slowdown[tenant=lab]<=3``.

objective = [class "_"] statistic "_" measure ["[" selector "]"] ("<" | "<=") limit
class     = urgent | ordinary
statistic = mean | p50 | p90 | p95 | p99
measure   = wait | completion | slowdown
selector  = all | urgent | ordinary | tenant=NAME | type=TP | type=GC
limit     = number unit, where the unit is ms, s, min, h or d; a slowdown is a plain number
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STATISTICS = ("mean", "p50", "p90", "p95", "p99")
MEASURES = ("wait", "completion", "slowdown")
ALL = "all"
_CLASSES = ("urgent", "ordinary")
_TYPES = ("TP", "GC")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SHAPE = re.compile(
    r"(?P<name>[^<>=\[\]]*)(?:\[(?P<selector>[^\]]*)\])?\s*(?P<sign><=|<|>=|>|=)?(?P<limit>.*)", re.DOTALL
)
_EXAMPLE = "such as p99_wait<8s"


class ObjectiveError(ValueError):
    """An objective cannot be understood; names the part and the remedy."""


@dataclass(frozen=True, slots=True)
class Objective:
    """One promise: a statistic of a measure over a class of tasks stays below a limit."""

    statistic: str
    measure: str
    limit: float
    """Seconds; a plain number for slowdown."""
    selector: str = ALL
    """``all``, ``urgent``, ``ordinary``, ``tenant NAME`` or ``type TP``: the key of the class in a run's figures."""
    inclusive: bool = False
    text: str = ""
    """As it was written."""

    @property
    def name(self) -> str:
        """What is measured, without the limit."""
        return f"{self.statistic}_{self.measure}" + ("" if self.selector == ALL else f"[{_written(self.selector)}]")

    @property
    def unit(self) -> str:
        """The unit of `limit` and of every value."""
        return "x" if self.measure == "slowdown" else "s"

    @property
    def tail(self) -> float | None:
        """The share of tasks that may exceed the limit; None for a mean, which says nothing of shares."""
        return None if self.statistic == "mean" else 1 - int(self.statistic[1:]) / 100

    def value(self, classes: Mapping[str, Any]) -> float:
        """Return the measured value from a run's figures by class; raises `ObjectiveError` when nobody is in the class."""
        found = classes.get(self.selector)
        if found is None or not found["count"]:
            known = ", ".join(sorted(_written(name) for name in classes))
            raise ObjectiveError(
                f"--slo {self.text!r}: the workload has no task in [{_written(self.selector)}]; it has {known}"
            )
        return float(found[self.measure][self.statistic])

    def error(self, classes: Mapping[str, Any]) -> float | None:
        """Return the standard error of `value` over other days like the run's; None where there is none."""
        found = classes[self.selector][self.measure].get(f"{self.statistic} se")
        return None if found is None else float(found)

    def kept(self, value: float) -> bool:
        """Whether a value keeps the promise."""
        return value <= self.limit if self.inclusive else value < self.limit

    def ratio(self, value: float) -> float:
        """Return the value as a multiple of the limit."""
        return value / self.limit

    def __str__(self) -> str:
        return f"{self.name}{'<=' if self.inclusive else '<'}{shown(self.limit, self.unit)}"


def parse(text: str) -> Objective:
    """Read one objective; raises `ObjectiveError` naming the part that is wrong and what would be right."""
    stripped = text.strip()
    found = _SHAPE.fullmatch(stripped)
    if not stripped or found is None:
        raise ObjectiveError(f"--slo {text!r}: write a measure, < and a limit, {_EXAMPLE}")
    if "[" in stripped and "]" not in stripped:
        raise ObjectiveError(f"--slo {text!r}: the selector's closing ] is missing, as in p99_wait[urgent]<2s")
    sign = found["sign"]
    if sign is None:
        raise ObjectiveError(f"--slo {text!r}: no < or <= was found; write the limit after it, {_EXAMPLE}")
    if sign not in {"<", "<="}:
        raise ObjectiveError(f"--slo {text!r}: {sign!r} cannot be planned for; use < or <=, {_EXAMPLE}")
    selector, statistic, measure = _name(text, found["name"].strip())
    written = found["selector"]
    if written is not None:
        if selector != ALL:
            raise ObjectiveError(
                f"--slo {text!r}: the class is said twice, {selector}_ and [{written}]; keep one of the two"
            )
        selector = _selector(text, written.strip())
    limit = _limit(text, found["limit"].strip(), measure)
    return Objective(statistic, measure, limit, selector, sign == "<=", stripped)


def shown(value: float, unit: str = "s") -> str:
    """Write a value with its unit for people."""
    if math.isinf(value):
        return "never"
    if unit == "x":
        return f"{value:.3g}x"
    if value and abs(value) < 1:
        return f"{value * 1000:.3g} ms"
    if value < 600:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"


def _name(text: str, name: str) -> tuple[str, str, str]:
    parts = name.split("_")
    selector = ALL
    if parts[0] in _CLASSES:
        selector, *parts = parts
    if len(parts) != 2:
        raise ObjectiveError(
            f"--slo {text!r}: {name!r} is no measure; write STATISTIC_MEASURE, with one of {', '.join(STATISTICS)} and one of "
            f"{', '.join(MEASURES)}, {_EXAMPLE}"
        )
    statistic, measure = parts
    if statistic not in STATISTICS:
        raise ObjectiveError(f"--slo {text!r}: the statistic {statistic!r} is unknown; use {', '.join(STATISTICS)}")
    if measure not in MEASURES:
        raise ObjectiveError(f"--slo {text!r}: the measure {measure!r} is unknown; use {', '.join(MEASURES)}")
    return selector, statistic, measure


def _selector(text: str, written: str) -> str:
    if written == ALL or written in _CLASSES:
        return written
    key, equals, value = written.partition("=")
    key, value = key.strip(), value.strip()
    if equals and key == "tenant" and value:
        return f"tenant {value}"
    if equals and key == "type":
        if value not in _TYPES:
            raise ObjectiveError(f"--slo {text!r}: the task type {value!r} is unknown; use type=TP or type=GC")
        return f"type {value}"
    raise ObjectiveError(
        f"--slo {text!r}: the selector [{written}] is unknown; use [urgent], [ordinary], [tenant=NAME], [type=TP] or [type=GC]"
    )


def _written(selector: str) -> str:
    return selector.replace(" ", "=", 1)


def _limit(text: str, written: str, measure: str) -> float:
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)", written)
    if found is None:
        raise ObjectiveError(
            f"--slo {text!r}: the limit {written!r} is no positive number with a unit, such as 8s or 2.5min"
        )
    number, unit = float(found[1]), found[2]
    if measure == "slowdown":
        if unit not in {"", "x"}:
            raise ObjectiveError(
                f"--slo {text!r}: a slowdown has no unit, got {unit!r}; write a plain number such as 3"
            )
        factor = 1.0
    elif unit not in _UNITS:
        what = f"the unit {unit!r} is unknown" if unit else f"the limit {written!r} has no unit"
        raise ObjectiveError(f"--slo {text!r}: {what}; use {', '.join(_UNITS)}, such as {written.rstrip(unit) or 8}s")
    else:
        factor = _UNITS[unit]
    value = number * factor
    if not 0 < value < 1e9:
        raise ObjectiveError(f"--slo {text!r}: the limit must be above 0 and below 1e9 s, got {written!r}")
    if measure == "slowdown" and value <= 1:
        raise ObjectiveError(f"--slo {text!r}: a slowdown is never below 1; the limit must be above 1, got {written!r}")
    return value
