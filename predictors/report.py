"""The predictor's report card: a trace replayed in time order, with the delay of labels, beside the baselines.

A random split would flatter: tasks of one user resemble each other. So the first part of the time trains, the rest is scored, and
a request's run time is learned only when the request had finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.tasks import SECOND
from predictors import baselines
from predictors.figures import Figures, figures
from predictors.gentd26 import FAILED, SUCCEED, Row, read_rows
from predictors.predictor import LEVELS
from predictors.replay import ELAPSED_S, PINBALL_LEVELS, Replay, Seen
from predictors.scores import PointScores, auc, pinball, point_scores

Progress = Callable[[float, str], None]
Series = NDArray[np.float64]

ONLINE = "online hierarchy + residuals + RLS"
TRAIN_SHARE = 0.7
_LEAST_ROWS = 50


@dataclass(frozen=True, slots=True)
class Calibration:
    """Shares in per cent of scored tasks within the central intervals and below the upper quantiles."""

    within_80: float
    within_90: float
    within_99: float
    below_p50: float
    below_p90: float
    below_p99: float
    pinball_s: float
    """Mean quantile loss over levels .025, .075 ... .975."""
    crossings: int


@dataclass(frozen=True, slots=True)
class ColdStart:
    """Predictions for a model of which so many requests had finished, over the whole replay."""

    finished_before: str
    requests: int
    medape: float
    within_90: float


@dataclass(frozen=True, slots=True)
class StillRunning:
    """Among scored tasks that ran longer than ``elapsed_s``: the share below their P90, re-conditioned and not."""

    elapsed_s: int
    tasks: int
    below_p90: float
    below_p90_unconditioned: float


@dataclass(frozen=True, slots=True)
class Failures:
    """How well the chance of failure tells failed requests from the others, over the scored part."""

    requests: int
    failed: int
    auc: float
    brier: float
    brier_base_rate: float


@dataclass(frozen=True, slots=True)
class ReportCard:
    """Everything the replay measured."""

    rows: int
    trained: int
    scored: int
    cut: str
    """Time of the first scored request, on the trace's clock."""
    points: tuple[tuple[str, PointScores], ...]
    calibration: Calibration
    cold_start: tuple[ColdStart, ...]
    still_running: tuple[StillRunning, ...]
    failures: Failures
    predict_us: float
    """Median over all calls, reading the features and all quantiles included; so is the next."""
    observe_us: float

    def to_json(self) -> dict[str, Any]:
        """Return the card as plain values; what could not be measured is None."""
        document = asdict(self)
        document["points"] = [{"predictor": name, **asdict(scores)} for name, scores in self.points]
        plain: dict[str, Any] = _without_nan(document)
        return plain

    def table(self) -> str:
        """Return the card as text."""
        lines = [
            f"{self.rows} rows; succeeded: first {self.trained} train, last {self.scored} are scored, cut at {self.cut}",
            "",
            f"{'predictor':41}{'MAPE%':>7}{'MedAPE%':>9}{'MAE s':>7}{'logRMSE':>9}{'R2':>7}{'Spearman':>10}{'SJF gain%':>11}",
        ]
        for name, s in self.points:
            lines.append(
                f"{name:41}{s.mape:7.1f}{s.medape:9.1f}{s.mae_s:7.2f}{s.log_rmse:9.3f}{s.r2:7.3f}{s.spearman:10.3f}{s.sjf_gain:11.1f}"
            )
        c = self.calibration
        lines += [
            "",
            f"intervals 80/90/99: {c.within_80:.1f} / {c.within_90:.1f} / {c.within_99:.1f} % covered; below P50/P90/P99: "
            f"{c.below_p50:.1f} / {c.below_p90:.1f} / {c.below_p99:.1f} %",
            f"pinball {c.pinball_s:.2f} s; quantiles that cross: {c.crossings}",
        ]
        for cold in self.cold_start:
            lines.append(
                f"model with {cold.finished_before} finished requests: MedAPE {cold.medape:.1f} %, 90 % interval covers "
                f"{cold.within_90:.1f} % of {cold.requests}"
            )
        for still in self.still_running:
            lines.append(
                f"still running after {still.elapsed_s} s: P90 holds for {still.below_p90:.1f} % of {still.tasks} "
                f"(unconditioned {still.below_p90_unconditioned:.1f} %)"
            )
        f = self.failures
        lines += [
            f"failure: {f.failed} of {f.requests}, AUC {f.auc:.2f}, Brier {f.brier:.4f} (base rate {f.brier_base_rate:.4f})",
            f"one predict {self.predict_us:.0f} us ({len(LEVELS)} quantiles), one observe {self.observe_us:.0f} us (medians)",
        ]
        return "\n".join(lines)


def run(path: Path, progress: Progress | None = None) -> ReportCard:
    """Read a GenTD26 request trace and report on it; raises FileNotFoundError, or ValueError naming what is wrong with it."""
    return report(read_rows(path), progress)


def run_with_figures(path: Path, progress: Progress | None = None) -> tuple[ReportCard, Figures]:
    """Return what `run` does and the figures for its pictures."""
    return report_with_figures(read_rows(path), progress)


def report(rows: Sequence[Row], progress: Progress | None = None, train_share: float = TRAIN_SHARE) -> ReportCard:
    """Replay rows in order of submission and score the last part of those that succeeded."""
    return _measure(rows, progress or _silent, train_share)[0]


def report_with_figures(
    rows: Sequence[Row], progress: Progress | None = None, train_share: float = TRAIN_SHARE
) -> tuple[ReportCard, Figures]:
    """Return what `report` does and the figures for its pictures."""
    tell = progress or _silent
    card, played, scored = _measure(rows, lambda fraction, note: tell(0.6 * fraction, note), train_share)
    gains = [(name, scores.sjf_gain) for name, scores in card.points]
    return card, figures(rows, played, scored, gains, lambda fraction: tell(0.6 + 0.4 * fraction, "figures"))


def _measure(rows: Sequence[Row], tell: Progress, train_share: float) -> tuple[ReportCard, Replay, list[Seen]]:
    if not 0.0 < train_share < 1.0:
        raise ValueError(f"train_share: must lie between 0 and 1, got {train_share}")
    succeeded = [row for row in rows if row.status == SUCCEED and row.run_us > 0]
    if len(succeeded) < _LEAST_ROWS:
        raise ValueError(f"the trace has {len(succeeded)} succeeded requests; a report needs at least {_LEAST_ROWS}")
    trained = int(len(succeeded) * train_share)
    train, test = succeeded[:trained], succeeded[trained:]
    replay = Replay(test[0].submitted_us)
    replay.run(rows, lambda fraction: tell(0.75 * fraction, "replaying"))
    truth_s = np.array([row.run_us / SECOND for row in test])
    points: list[tuple[str, PointScores]] = []
    for name, predict in _BASELINES:
        tell(0.75 + 0.04 * len(points), name)
        points.append((name, point_scores(truth_s, predict(train, test))))
    scored = [seen for seen in replay.seen if seen.row.status == SUCCEED and seen.row.run_us > 0][-len(test) :]
    median_s = np.array([seen.quantiles_s[6] for seen in scored])
    points.append((ONLINE, point_scores(truth_s, median_s, np.array([seen.mean_s for seen in scored]))))
    tell(1.0, "done")
    card = ReportCard(
        rows=len(rows),
        trained=len(train),
        scored=len(test),
        cut=datetime.fromtimestamp(test[0].submitted_us / SECOND, UTC).strftime("%Y-%m-%d %H:%M:%S"),
        points=tuple(points),
        calibration=_calibration(truth_s, scored),
        cold_start=_cold_start(replay.seen),
        still_running=_still_running(truth_s, scored),
        failures=_failures(replay),
        predict_us=_median_us(replay.predict_s),
        observe_us=_median_us(replay.observe_s),
    )
    return card, replay, scored


_BASELINES: tuple[tuple[str, Callable[[Sequence[Row], Sequence[Row]], Series]], ...] = (
    ("global mean", baselines.global_mean),
    ("mean per model", baselines.mean_per_model),
    ("median of last 400 (model,steps,images)", baselines.median_of_last),
    ("ridge, model one-hot", baselines.ridge),
    ("gradient boosting, no history", baselines.boosting),
)


def _calibration(truth_s: Series, scored: Sequence[Seen]) -> Calibration:
    quantiles = np.array([seen.quantiles_s for seen in scored])

    def within(low: float, high: float) -> float:
        inside = (truth_s >= quantiles[:, LEVELS.index(low)]) & (truth_s <= quantiles[:, LEVELS.index(high)])
        return 100 * float(inside.mean())

    def below(level: float) -> float:
        return 100 * float((truth_s <= quantiles[:, LEVELS.index(level)]).mean())

    return Calibration(
        within_80=within(0.1, 0.9),
        within_90=within(0.05, 0.95),
        within_99=within(0.005, 0.995),
        below_p50=below(0.5),
        below_p90=below(0.9),
        below_p99=below(0.99),
        pinball_s=pinball(truth_s, np.array([seen.pinball_s for seen in scored]), PINBALL_LEVELS),
        crossings=int((np.diff(quantiles, axis=1) < 0).sum()),
    )


def _cold_start(seen: Sequence[Seen]) -> tuple[ColdStart, ...]:
    # The very first requests of all know nothing of any model, so they say nothing about a new model.
    later = [one for one in seen[200:] if one.row.status == SUCCEED and one.row.run_us > 0]
    low, high = LEVELS.index(0.05), LEVELS.index(0.95)
    cards = []
    for label, counts in (("no", (0,)), ("1 or 2", (1, 2)), ("3 to 10", tuple(range(3, 11)))):
        group = [one for one in later if one.finished_before in counts]
        truth = [one.row.run_us / SECOND for one in group]
        off = [abs(one.quantiles_s[6] - true) / true for one, true in zip(group, truth, strict=True)]
        inside = [one.quantiles_s[low] <= true <= one.quantiles_s[high] for one, true in zip(group, truth, strict=True)]
        cards.append(
            ColdStart(
                finished_before=label,
                requests=len(group),
                medape=100 * float(np.median(off)) if group else math.nan,
                within_90=100 * float(np.mean(inside)) if group else math.nan,
            )
        )
    return tuple(cards)


def _still_running(truth_s: Series, scored: Sequence[Seen]) -> tuple[StillRunning, ...]:
    plain = np.array([seen.quantiles_s[LEVELS.index(0.9)] for seen in scored])
    cards = []
    for place, elapsed in enumerate(ELAPSED_S):
        alive = truth_s > elapsed
        p90 = np.array([seen.p90_after_s[place] for seen in scored])
        cards.append(
            StillRunning(
                elapsed_s=elapsed,
                tasks=int(alive.sum()),
                below_p90=100 * float((truth_s <= p90)[alive].mean()) if alive.any() else math.nan,
                below_p90_unconditioned=100 * float((truth_s <= plain)[alive].mean()) if alive.any() else math.nan,
            )
        )
    return tuple(cards)


def _failures(replay: Replay) -> Failures:
    ended = [s for s in replay.seen if s.row.status in (SUCCEED, FAILED) and s.row.submitted_us >= replay.score_from_us]
    failed = np.array([seen.row.status == FAILED for seen in ended])
    chance = np.array([seen.failure_chance for seen in ended])
    rate = float(failed.mean())
    return Failures(
        requests=len(ended),
        failed=int(failed.sum()),
        auc=auc(failed, chance),
        brier=float(np.square(failed - chance).mean()),
        brier_base_rate=rate * (1.0 - rate),
    )


def _median_us(seconds: Sequence[float]) -> float:
    return float(np.median(seconds)) * 1e6 if seconds else math.nan


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _silent(_fraction: float, _note: str) -> None:
    pass
