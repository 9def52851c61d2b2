"""How much faster one GPU model is than another: what they are known to sustain, corrected by what runs on them.

A log ratio to the first GPU model seen. A GPU model nobody ran on yet starts from the table in `physics`; its own correction is
learned across methods, and each method's own on top of that.
"""

from __future__ import annotations

from predictors import physics
from predictors.decay import DecayedMeans
from predictors.drift import OwnShifts

_MEMORY_S = 30 * 86400.0
_STRENGTH = 1.0
_SETTLED = 20.0
"""Before so many tasks a ratio is still being learned, and nothing can have shifted."""
_UNMOVED = frozenset({"", "sleep"})
"""Methods that no GPU makes faster."""


class SpeedRatios:
    """Log run-time ratios by (method, GPU model) to a reference, which is the first GPU model that finished a task."""

    __slots__ = ("ratios", "reference", "shifts")

    def __init__(self, cells: int = 2_000) -> None:
        self.reference = ""
        self.ratios = DecayedMeans(_MEMORY_S, cells)
        self.shifts = OwnShifts()

    def log_ratio(self, method: str, gpu_model: str, now_s: float) -> float:
        """Return the log of run time on a GPU model over that on the reference; 0 for ``"*"`` and for what nothing is known of."""
        if gpu_model in ("*", "", self.reference):
            return 0.0
        across = self.ratios.shrunk(gpu_model, now_s, 0.0, 0.25)
        return self.counted(method, gpu_model) + self.ratios.shrunk((method, gpu_model), now_s, across, _STRENGTH)

    def counted(self, method: str, gpu_model: str) -> float:
        """Return the log ratio by arithmetic alone; before there is a reference, to a typical GPU."""
        return 0.0 if method in _UNMOVED else physics.relative_time(gpu_model, self.reference)

    def frame(self, method: str) -> float:
        """Return the log of run time on the reference over that on a typical GPU, by arithmetic."""
        return 0.0 if method in _UNMOVED or not self.reference else physics.relative_time(self.reference, "")

    def trust(self, method: str, gpu_model: str, now_s: float) -> float:
        """Return how far run times on this GPU model may teach the reference's histories, within (0, 1]."""
        if gpu_model in ("*", "", self.reference):
            return 1.0
        weight = self.ratios.weight((method, gpu_model), now_s) + 0.25 * self.ratios.weight(gpu_model, now_s)
        return max(0.2, weight / (weight + 3.0))

    def learn(
        self,
        method: str,
        gpu_model: str,
        now_s: float,
        log_ratio: float,
        weight: float,
        user: str = "",
        sigma: float = 1.0,
    ) -> None:
        """Learn from one finished task; ``weight`` tells how well its run time on the reference was known, ``sigma`` its error.

        Where a GPU model's tasks are off for long, whoever sent them, its ratios move by that much at once.
        """
        if gpu_model in ("*", ""):
            return
        if not self.reference:
            self.reference = gpu_model
        if gpu_model != self.reference and weight > 0.0:
            if self.ratios.weight(gpu_model, now_s) > _SETTLED:
                off = log_ratio - self.log_ratio(method, gpu_model, now_s)
                shift = self.shifts.hear(gpu_model, user, off, sigma)
                if shift:
                    self._move(gpu_model, shift)
            log_ratio -= self.counted(method, gpu_model)
            self.ratios.add(gpu_model, now_s, log_ratio, weight)
            self.ratios.add((method, gpu_model), now_s, log_ratio, weight)

    def _move(self, gpu_model: str, shift: float) -> None:
        for key, cell in self.ratios.cells.items():
            if key == gpu_model or (isinstance(key, tuple) and key[1] == gpu_model):
                cell[1] += shift * cell[0]
