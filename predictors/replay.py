"""A trace of requests replayed as a predictor would have seen it: by time of submission, labels known when tasks had ended."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.tasks import SECOND
from predictors.features import Feature
from predictors.gentd26 import FAILED, SUCCEED, Row
from predictors.predictor import Outcome, Prediction, Predictor

ELAPSED_S = (15, 30, 60)
PINBALL_LEVELS = tuple((i + 0.5) / 20 for i in range(20))


@dataclass(frozen=True, slots=True)
class Seen:
    """One request and what was predicted when it was submitted, in seconds."""

    row: Row
    mean_s: float
    quantiles_s: tuple[float, ...]
    pinball_s: tuple[float, ...]
    """Quantiles at the levels of the pinball loss; empty outside the scored part."""
    p90_after_s: tuple[float, ...]
    failure_chance: float
    finished_before: int


class Replay:
    """Feeds a predictor the trace as it would have seen it."""

    def __init__(self, score_from_us: int, predictor: Predictor | None = None) -> None:
        self.predictor = predictor or Predictor()
        self.seen: list[Seen] = []
        self.predict_s: list[float] = []
        self.observe_s: list[float] = []
        self.score_from_us = score_from_us
        self.standing: list[tuple[int, float, bool]] = []
        """Request, the challenger's advantage by then, and whether it served, at every 250th."""
        self._running: list[tuple[int, int, Row, Prediction]] = []
        self._in_flight: dict[str, int] = {}
        self._finished: dict[str, int] = {}

    def run(self, rows: Sequence[Row], tell: Callable[[float], None] = lambda _fraction: None) -> None:
        """Replay rows in order of submission; ``tell`` hears what part of them is behind."""
        every = max(1, len(rows) // 100)
        for index, row in enumerate(rows):
            if index % every == 0:
                tell(index / len(rows))
            self._learn_until(row.submitted_us)
            if index % 250 == 0:
                self._note_standing(index)
            self._submit(index, row)

    def _note_standing(self, index: int) -> None:
        model = self.predictor.methods.get("text_to_image")
        if model is not None and model.challenger.trees is not None:
            self.standing.append((index, model.challenger.advantage, model.challenger.serving))

    def _submit(self, index: int, row: Row) -> None:
        in_flight = {"in_flight": len(self._running), "in_flight_model": self._in_flight.get(row.model, 0)}
        features: dict[str, Feature] = {**row.features(), **in_flight}
        begun = time.perf_counter()
        prediction = self.predictor.predict(features, row.submitted_us)
        self.predict_s.append(time.perf_counter() - begun)
        scored = row.submitted_us >= self.score_from_us
        self.seen.append(
            Seen(
                row=row,
                mean_s=prediction.mean_us / SECOND,
                quantiles_s=tuple(us / SECOND for us in prediction.quantiles_us),
                pinball_s=tuple(us / SECOND for us in self.predictor.at(prediction, PINBALL_LEVELS)) if scored else (),
                p90_after_s=self._p90_after_s(row, prediction) if scored else (),
                failure_chance=prediction.failure_chance,
                finished_before=self._finished.get(row.model, 0),
            )
        )
        if row.status in (SUCCEED, FAILED):
            self._in_flight[row.model] = self._in_flight.get(row.model, 0) + 1
            heapq.heappush(self._running, (row.submitted_us + row.run_us, index, row, prediction))

    def _p90_after_s(self, row: Row, prediction: Prediction) -> tuple[float, ...]:
        return tuple(
            self.predictor.remaining(prediction, elapsed * SECOND).p90_us / SECOND
            if row.run_us > elapsed * SECOND
            else 0.0
            for elapsed in ELAPSED_S
        )

    def _learn_until(self, now_us: int) -> None:
        while self._running and self._running[0][0] <= now_us:
            ended_us, _, row, prediction = heapq.heappop(self._running)
            outcome = Outcome.FINISHED if row.status == SUCCEED else Outcome.FAILED
            begun = time.perf_counter()
            self.predictor.observe(prediction.request, ended_us, row.run_us, outcome, prediction=prediction)
            self.observe_s.append(time.perf_counter() - begun)
            self._in_flight[row.model] -= 1
            if outcome is Outcome.FINISHED:
                self._finished[row.model] = self._finished.get(row.model, 0) + 1
