"""What the forecaster learns from a task that was lost and went on from a checkpoint: its whole run time, not the rest."""

from __future__ import annotations

from typing import Any

import pytest

from engine.events import PodStopped, TaskFinished, TaskProgressed, TaskStarted, TaskStopped, TaskSubmitted
from engine.tasks import SECOND, FailureCause, TaskSpec, TaskType
from predictors.forecaster import OnlineForecaster


class Listening:
    """A predictor that also notes the seconds it is told to learn from."""

    def __init__(self, predictor: Any, learnt: list[float]) -> None:
        self._predictor, self._learnt = predictor, learnt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._predictor, name)

    def observe(self, request: Any, now: int, run_us: int, *rest: Any) -> None:
        self._learnt.append(run_us / SECOND)
        self._predictor.observe(request, now, run_us, *rest)


@pytest.fixture
def heard() -> tuple[OnlineForecaster, list[float]]:
    """A forecaster whose task has run from 0 s, and the seconds that it learns for it."""
    forecaster, learnt = OnlineForecaster(), []
    forecaster.predictor = Listening(forecaster.predictor, learnt)  # type: ignore[assignment]
    forecaster.stamp(0, [TaskSubmitted(TaskSpec("train", "a", "", TaskType.TP, "dreambooth"))])
    forecaster.stamp(0, [TaskStarted("train", 1)])
    return forecaster, learnt


def _at(forecaster: OnlineForecaster, seconds: int, *events: Any) -> None:
    forecaster.stamp(seconds * SECOND, list(events))


def test_a_lost_pod_loses_only_the_time_since_the_last_checkpoint(
    heard: tuple[OnlineForecaster, list[float]],
) -> None:
    forecaster, learnt = heard
    _at(forecaster, 40, TaskProgressed("train", 1, 40, 100, 0, "a"))
    _at(forecaster, 60, TaskProgressed("train", 1, 60, 100, 0, "b"))
    _at(forecaster, 75, PodStopped(1, FailureCause.CRASHED))
    _at(forecaster, 100, TaskStarted("train", 2))
    _at(forecaster, 140, TaskFinished("train", 2, run_us=40 * SECOND))
    assert learnt == [100.0]


def test_a_lost_pod_without_a_checkpoint_loses_all(heard: tuple[OnlineForecaster, list[float]]) -> None:
    forecaster, learnt = heard
    _at(forecaster, 60, TaskProgressed("train", 1, 60, 100))
    _at(forecaster, 75, PodStopped(1, FailureCause.CRASHED))
    _at(forecaster, 100, TaskStarted("train", 2))
    _at(forecaster, 200, TaskFinished("train", 2, run_us=100 * SECOND))
    assert learnt == [100.0]


def test_a_stop_that_keeps_a_checkpoint_counts_its_time_once(heard: tuple[OnlineForecaster, list[float]]) -> None:
    forecaster, learnt = heard
    _at(forecaster, 40, TaskProgressed("train", 1, 40, 100, 0, "a"))
    _at(forecaster, 50, TaskStopped("train", 1, 0, "b"))
    _at(forecaster, 60, TaskStarted("train", 2))
    _at(forecaster, 110, TaskFinished("train", 2, run_us=50 * SECOND))
    assert learnt == [100.0]
