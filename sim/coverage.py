"""How well predicted run times held, counted as the runs end."""

from __future__ import annotations

from engine.tasks import SECOND, Quantiles
from sim.sketches import Sketch


class Coverage:
    """Compares predictions with what happened, one by one."""

    __slots__ = ("_absolute", "_relative", "_within_p50", "_within_p90", "_within_p99", "count")

    def __init__(self) -> None:
        self.count = 0
        self._within_p50 = self._within_p90 = self._within_p99 = 0
        self._relative = Sketch()
        self._absolute = 0

    def add(self, predicted: Quantiles, run_us: int) -> None:
        """Compare one prediction with what happened."""
        self.count += 1
        median: int = predicted.p50
        if run_us <= median:
            self._within_p50 += 1
        if run_us <= predicted.p90:
            self._within_p90 += 1
        if run_us <= predicted.p99:
            self._within_p99 += 1
        error = abs(median - run_us)
        self._absolute += error
        self._relative.add(error * 1_000_000 // max(1, run_us))

    def report(self) -> dict[str, float]:
        """Return the shares of run times within the predicted quantiles, and the median's errors."""
        if not self.count:
            return {"count": 0}
        relative = self._relative.spread()
        return {
            "count": self.count,
            "within_p50": self._within_p50 / self.count,
            "within_p90": self._within_p90 / self.count,
            "within_p99": self._within_p99 / self.count,
            "mean_error_s": self._absolute / self.count / SECOND,
            "mean_relative_error": relative.mean,
            "median_relative_error": relative.p50,
        }
