"""What company costs: how long a job's steps would have taken had it been alone in the batch, judged by measured steps.

A step costs something for each size in it (a call of the network) and something for each row of that size. Both are learned from
the steps themselves, the old ones forgotten in time; before there is anything to learn from, the usual share of another row holds.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

PRIOR_ROW = 0.69
"""Share of a step of one row that each further row adds, where nothing was measured: 36.8 of 53.2 ms on a 16 GB card."""
_MEMORY = 0.98
"""What a step counts of what the next one counts: about the last 50 decide."""
_PRIOR_STEPS = 0.2
"""What the prior counts of a measured step: it decides where steps of one kind only were measured."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one job had in a step."""

    job: Hashable
    sizes: Mapping[Hashable, float]
    """Work by what goes through the network in one call: pixels of pictures, twice where they are guided."""


@dataclass(slots=True)
class StepShare:
    """What the steps were that a job was present for; written by the serving thread."""

    steps_us: float = 0.0
    company_us: float = 0.0
    """Time that its steps took because others were there."""
    others_us: float = 0.0
    """Time x other jobs present."""
    working_bytes: int = 0
    """Memory that its pictures took in their largest calls, weights left out."""

    @property
    def company_permille(self) -> int:
        """How many other jobs were present, on average, in thousandths."""
        return round(1000 * self.others_us / self.steps_us) if self.steps_us else 0


class Company:
    """Learns what steps cost and says what each job's company cost it."""

    def __init__(self) -> None:
        self._calls_calls = self._calls_rows = self._rows_rows = 0.0
        self._calls_us = self._rows_us = 0.0
        self._seen = 0.0
        self._mean_rows_us = 0.0

    def step(self, took_us: float, parts: Sequence[Part], present: Mapping[Hashable, StepShare]) -> None:
        """Take in a step: who had what in it, and whoever was present, maybe waiting for room."""
        together: dict[Hashable, float] = {}
        for part in parts:
            for size, rows in part.sizes.items():
                together[size] = together.get(size, 0.0) + rows
        if together and took_us > 0:
            self._learn(took_us, len(together), sum(together.values()))
        whole = self._cost(len(together), sum(together.values()))
        own = {part.job: self._cost(len(part.sizes), sum(part.sizes.values())) for part in parts}
        for job, share in present.items():
            alone = min(1.0, own.get(job, 0.0) / whole) if whole > 0 else 0.0
            share.steps_us += took_us
            share.company_us += took_us * (1.0 - alone)
            share.others_us += took_us * (len(present) - 1)

    def _learn(self, took_us: float, calls: float, rows: float) -> None:
        for name in ("_calls_calls", "_calls_rows", "_rows_rows", "_calls_us", "_rows_us", "_seen", "_mean_rows_us"):
            setattr(self, name, getattr(self, name) * _MEMORY)
        # Relative errors count: a long step does not weigh more than a short one.
        weight = 1.0 / took_us**2
        self._calls_calls += weight * calls * calls
        self._calls_rows += weight * calls * rows
        self._rows_rows += weight * rows * rows
        self._calls_us += weight * calls * took_us
        self._rows_us += weight * rows * took_us
        self._seen += 1.0
        self._mean_rows_us += took_us / (calls * (1.0 - PRIOR_ROW) + rows * PRIOR_ROW)

    def _cost(self, calls: float, rows: float) -> float:
        """Return the microseconds of a step, least squares drawn towards the prior; never less than nothing."""
        if not self._seen:
            return calls * (1.0 - PRIOR_ROW) + rows * PRIOR_ROW
        unit = self._mean_rows_us / self._seen
        call_us, row_us = unit * (1.0 - PRIOR_ROW), unit * PRIOR_ROW
        pull = _PRIOR_STEPS / unit**2
        a, b, d = self._calls_calls + pull, self._calls_rows, self._rows_rows + pull
        x, y = self._calls_us + pull * call_us, self._rows_us + pull * row_us
        det = a * d - b * b
        if det <= 0.0:
            return calls * call_us + rows * row_us
        per_call, per_row = max(0.0, (x * d - y * b) / det), max(0.0, (y * a - x * b) / det)
        return calls * per_call + rows * per_row
