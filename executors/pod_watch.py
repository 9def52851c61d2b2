"""Tells a hung Pod from a slow one: from how long steps have taken on this node, not from a clock alone.

A method that is `paced` promises a sign of life after each step. While attempts run in such a Pod and none of them gives one for
many times what a step takes, nothing in it computes any more: a kernel that never returns, a deadlock, a stopped process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

_GAPS = 64
_ENOUGH = 4
"""Gaps that must have been seen before steps count as known."""
KINDS = 1_000
"""Kinds of Pods whose steps are remembered."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a paced Pod may give no sign of life."""

    first_s: float = 900.0
    """While it is not known how long steps take: fetching, compiling and the first step of a large model are slow."""
    floor_s: float = 300.0
    """However fast the steps are: storing results and decoding large pictures come between."""
    factor: float = 20.0
    """So many times the longest step seen lately."""

    def __post_init__(self) -> None:
        """Refuse spans that would kill everything."""
        for name in ("first_s", "floor_s", "factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Patience.{name}: {getattr(self, name)!r} must be above 0")


@dataclass(slots=True)
class _Pace:
    kind: Hashable
    running: int
    moved_at: float


@dataclass(slots=True)
class StepWatch:
    """The paced Pods of a host; times are seconds of any clock that is handed in."""

    patience: Patience = field(default_factory=Patience)
    _gaps: dict[Hashable, deque[float]] = field(default_factory=dict)
    _pods: dict[int, _Pace] = field(default_factory=dict)

    def follow(self, pod: int, kind: Hashable) -> None:
        """Watch a Pod from now on; Pods of one kind are expected to step alike."""
        self._pods[pod] = _Pace(kind, 0, 0.0)

    def forget(self, pod: int) -> None:
        """Watch a Pod no more."""
        self._pods.pop(pod, None)

    def began(self, pod: int, now: float) -> None:
        """Note that an attempt began to run in a Pod."""
        pace = self._pods.get(pod)
        if pace is not None:
            pace.running += 1
            pace.moved_at = now

    def stepped(self, pod: int, now: float) -> None:
        """Note a step of some attempt in a Pod."""
        pace = self._pods.get(pod)
        if pace is None or not pace.running:
            return
        gaps = self._gaps.pop(pace.kind, None) or deque(maxlen=_GAPS)
        self._gaps[pace.kind] = gaps
        if len(self._gaps) > KINDS:
            del self._gaps[next(iter(self._gaps))]
        gaps.append(max(0.0, now - pace.moved_at))
        pace.moved_at = now

    def ended(self, pod: int, now: float) -> None:
        """Note that an attempt that had begun is over."""
        pace = self._pods.get(pod)
        if pace is not None:
            pace.running = max(0, pace.running - 1)
            pace.moved_at = now

    def limit_s(self, kind: Hashable) -> float:
        """Return how long a Pod of a kind may give no sign of life."""
        gaps = self._gaps.get(kind, ())
        if len(gaps) < _ENOUGH:
            return self.patience.first_s
        return max(self.patience.floor_s, self.patience.factor * max(gaps))

    def hangs_at(self, pod: int) -> float | None:
        """Return when a Pod counts as hung if nothing is heard of it until then; None while nothing runs in it."""
        pace = self._pods.get(pod)
        if pace is None or not pace.running:
            return None
        return pace.moved_at + self.limit_s(pace.kind)

    def verdict(self, pod: int, now: float) -> str:
        """Say what was seen of a hung Pod."""
        pace = self._pods[pod]
        gaps = self._gaps.get(pace.kind, ())
        known = f"the longest of the last {len(gaps)} took {max(gaps):.3g} s" if gaps else "none has been seen before"
        return f"no step for {now - pace.moved_at:.3g} s, {known}"
