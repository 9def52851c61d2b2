"""Champion and challenger: boosted trees on the online stack's residual, which serve only while they are proven better.

The challenger is refitted off the path every thousand labels, from what the champion's own predictions had missed. Each task
is judged by the trees that were there when it was submitted, so nothing is scored on what it was fitted to. Where its quantile
loss over the last two thousand tasks is a hundredth below the champion's it serves; where it is a hundredth above, it steps down.
"""

from __future__ import annotations

import base64
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictors.errors import Errors
from predictors.recursive import Vector
from predictors.trees import Trees, fit

Fit = Callable[[], Trees]
Refit = Callable[[Fit], Callable[[], Trees | None]]
"""Takes a fit to be done and returns what to ask for its trees: None as long as they are not there."""

_JUDGE_EVERY = 100
_CUT = 1.5
"""Residuals are cut here before trees are fitted to them; so is what trees may add, at two thirds of it."""


def at_once(fit: Fit) -> Callable[[], Trees | None]:
    """Fit where the label is learned: deterministic, for replays and simulations."""
    trees = fit()
    return lambda: trees


class InBackground:
    """Fits in one thread beside the caller's, one after the other; scikit-learn leaves the interpreter free meanwhile."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def __call__(self, fit: Fit) -> Callable[[], Trees | None]:
        """Queue a fit."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="refit")
        return partial(_result, self._pool.submit(fit))

    def close(self) -> None:
        """Drop the fits that have not begun and wait for the one that has."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


@dataclass(frozen=True, slots=True)
class ChallengerSettings:
    """When trees are fitted, how many tasks they are fitted to and judged by, and how much better they must be."""

    refit_every: int = 1000
    """0: no challenger."""
    window: int = 12_000
    judged: int = 2000
    margin: float = 0.01
    trees: int = 40


class Challenger:
    """The boosted stack beside one `DurationModel`: its window of labels, its trees, its errors and its standing."""

    __slots__ = (
        "_ask",
        "_rising",
        "_since_fit",
        "_since_judged",
        "errors",
        "losses",
        "refit",
        "refits",
        "rows",
        "serving",
        "settings",
        "targets",
        "trees",
    )

    def __init__(self, settings: ChallengerSettings, errors: Errors, rising: Sequence[int], refit: Refit) -> None:
        self.settings = settings
        self.errors = errors
        self.refit = refit
        self.trees: Trees | None = None
        self.serving = False
        self.rows: deque[NDArray[np.float32]] = deque(maxlen=settings.window)
        self.targets: deque[float] = deque(maxlen=settings.window)
        self.losses: tuple[deque[float], deque[float]] = (deque(maxlen=settings.judged), deque(maxlen=settings.judged))
        """Quantile losses in seconds of the champion and of the challenger, task by task."""
        self.refits = 0
        self._rising = tuple(rising)
        self._since_fit = 0
        self._since_judged = 0
        self._ask: Callable[[], Trees | None] | None = None

    @property
    def advantage(self) -> float:
        """Return by what share the challenger's loss over the judged tasks lies below the champion's; 0 before any."""
        champion, challenger = (sum(losses) for losses in self.losses)
        return 1.0 - challenger / champion if champion > 0.0 else 0.0

    def learn(self, row: Vector, residual: float) -> None:
        """Learn what the champion missed in one task, in log seconds."""
        if not self.settings.refit_every:
            return
        self._take()
        self.rows.append(row.astype(np.float32))
        self.targets.append(max(-_CUT, min(_CUT, residual)))
        self._since_fit += 1
        if self._since_fit >= self.settings.refit_every and self._ask is None:
            self._since_fit = 0
            self._begin(partial(fit, np.stack(self.rows), np.array(self.targets), self._rising, self.settings.trees))

    def judge(self, champion: float, challenger: float) -> None:
        """Take both losses of one task, and decide now and then who serves."""
        self.losses[0].append(champion)
        self.losses[1].append(challenger)
        self._since_judged += 1
        if self._since_judged < _JUDGE_EVERY or len(self.losses[0]) < self.settings.judged:
            return
        self._since_judged = 0
        advantage = self.advantage
        if not self.serving and advantage >= self.settings.margin:
            self.serving = True
        elif self.serving and advantage <= -self.settings.margin:
            self.serving = False

    def _begin(self, job: Fit) -> None:
        # Without a refit the trees that are there go on, or the champion alone: a prediction must not fail for it.
        with suppress(ImportError, ValueError, MemoryError):
            self._ask = self.refit(job)
        self._take()

    def _take(self) -> None:
        if self._ask is None:
            return
        try:
            trees = self._ask()
        except (ImportError, ValueError, MemoryError):
            self._ask = None
            return
        if trees is not None:
            self.trees, self._ask = trees, None
            self.refits += 1

    def state(self) -> dict[str, Any]:
        """Return everything as plain values; a fit under way is done anew after the restart."""
        return {
            "trees": None if self.trees is None else self.trees.state(),
            "serving": self.serving,
            "rows": base64.b64encode(np.stack(self.rows).tobytes()).decode() if self.rows else "",
            "targets": list(self.targets),
            "losses": [list(losses) for losses in self.losses],
            "refits": self.refits,
            "since_fit": self._since_fit if self._ask is None else self.settings.refit_every,
            "since_judged": self._since_judged,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.trees = None if state["trees"] is None else Trees.restored(state["trees"])
        self.serving = state["serving"]
        self.targets.extend(state["targets"])
        if self.targets:
            flat = np.frombuffer(base64.b64decode(state["rows"]), dtype=np.float32)
            self.rows.extend(flat.reshape(len(self.targets), -1))
        for losses, saved in zip(self.losses, state["losses"], strict=True):
            losses.extend(saved)
        self.refits = state["refits"]
        self._since_fit = state["since_fit"]
        self._since_judged = state["since_judged"]


def bounded_rows(corrections: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `bounded` of each."""
    limit = _CUT / 1.5
    return np.where(np.isfinite(corrections), np.clip(corrections, -limit, limit), 0.0)


def bounded(correction: float) -> float:
    """Return what trees may move a prediction by, in log seconds."""
    limit = _CUT / 1.5
    return max(-limit, min(limit, correction)) if math.isfinite(correction) else 0.0


def _result(future: Future[Trees]) -> Trees | None:
    return future.result() if future.done() else None
