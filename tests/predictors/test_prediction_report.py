"""The report card: the reader of GenTD26, the baselines and the scores, on made-up rows and on the real trace."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.tasks import SECOND
from predictors import baselines
from predictors.figures import demand_fan, drift_curve, memory_curve
from predictors.gentd26 import FAILED, PENDING, SUCCEED, Row, read_rows
from predictors.report import ONLINE, report, report_with_figures, run
from predictors.scores import auc, pinball, point_scores, sjf_gain, spearman

TRACE = Path(__file__).resolve().parents[3] / "shared/traces/gentd26/lora_request_trace.csv"
needs_trace = pytest.mark.skipif(not TRACE.exists(), reason="the GenTD26 trace is not beside the repository")
HEADER = (
    "gmt_create,predict_type,predict_status,exec_time_seconds,groupId,prompt_length,negative_prompt_length,"
    "num_images_per_prompt,num_inference_steps,checkpoint_model_version_id,num_lora\n"
)


def made_up(count: int = 1200, seed: int = 1) -> list[Row]:
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        model, steps = rng.choice(["M0", "M1", "M2"]), rng.choice([20.0, 30.0, 40.0])
        run_s = (8 if model == "M0" else 20 if model == "M1" else 60) * rng.lognormvariate(0, 0.2)
        fails = model == "M2" and rng.random() < 0.3
        rows.append(
            Row(
                i * 30 * SECOND,
                round(run_s * SECOND),
                FAILED if fails else SUCCEED,
                f"G{i % 20}",
                model,
                "TXT_2_IMG",
                1.0,
                steps,
                0,
                50.0,
            )
        )
    return rows


def test_the_reader_keeps_every_row_in_order_whatever_became_of_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        HEADER
        + "2024-11-15 18:16:14,TXT_2_IMG,FAILED,43.0,G0001,93.0,,1.0,40.0,M0001,0\n"
        + "2024-11-15 16:57:50,IMG_2_IMG,SUCCEED,32.0,G0000,63.0,26.0,8.0,30.0,M0000,2\n"
        + "2024-11-15 19:00:00,,PENDING,0.0,G0002,,,,,M0002,0\n"
    )
    first, second, third = read_rows(path)
    assert (first.user, first.run_us, first.images, first.loras, first.kind) == (
        "G0000",
        32 * SECOND,
        8.0,
        2,
        "IMG_2_IMG",
    )
    assert second.submitted_us - first.submitted_us == (78 * 60 + 24) * SECOND
    assert (second.status, third.status, third.steps) == (FAILED, PENDING, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,user\n1,2\n", "column gmt_create is missing"),
        (HEADER + "2024-11-15 16:57:50,T,SUCCEED,soon,G0000,63.0,26.0,8.0,30.0,M0000,2\n", "line 2: exec_time_seconds"),
        (HEADER + "yesterday,T,SUCCEED,1,G0000,63.0,26.0,8.0,30.0,M0000,2\n", "line 2"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(path)


def test_the_card_scores_the_last_part_and_can_be_written_as_json() -> None:
    told: list[float] = []
    card = report(made_up(), lambda fraction, note: told.append(fraction))
    document = json.loads(json.dumps(card.to_json(), allow_nan=False))
    assert card.trained + card.scored == sum(row.status == SUCCEED for row in made_up())
    assert [point["predictor"] for point in document["points"]][-1] == ONLINE
    assert len(card.points) == 6
    assert card.calibration.crossings == 0
    assert card.failures.auc > 0.8
    assert told == sorted(told)
    assert told[-1] == 1.0
    for name, _ in card.points:
        assert name in card.table()


def test_no_label_is_used_before_its_request_had_finished() -> None:
    """All requests run far longer than the trace is: then nothing can be learned, however regular they are."""
    rows = [replace(row, run_us=10**7 * SECOND) for row in made_up()]
    online = dict(report(rows).points)[ONLINE]
    assert online.mape > 90
    train, test = rows[:800], rows[800:]
    assert set(baselines.median_of_last(train, test)) == {1.0}


def test_the_median_baseline_takes_the_nearest_history_there_is() -> None:
    base = made_up(1)[0]
    train = [
        replace(base, submitted_us=i, run_us=n * SECOND, model=m)
        for i, (m, n) in enumerate([("a", 5), ("a", 7), ("a", 9), ("b", 50)])
    ]
    later = 10**3 * SECOND
    test = [
        replace(base, submitted_us=later, model=m, steps=s) for m, s in (("a", base.steps), ("b", 999.0), ("c", 1.0))
    ]
    assert list(baselines.median_of_last(train, test)) == [7.0, 50.0, 8.0]


def test_too_short_a_trace_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 50"):
        report(made_up(20))
    with pytest.raises(ValueError, match="train_share"):
        report(made_up(100), train_share=1.0)


def test_a_perfect_prediction_scores_perfectly() -> None:
    truth = np.random.default_rng(0).lognormal(3, 1, 500)
    perfect = point_scores(truth, truth)
    assert (perfect.mape, perfect.mae_s, perfect.r2, perfect.spearman) == pytest.approx((0, 0, 1, 1))
    assert perfect.sjf_gain == pytest.approx(100)
    constant = point_scores(truth, np.full(500, truth.mean()))
    assert constant.r2 == pytest.approx(0)
    assert math.isnan(constant.spearman)
    assert constant.sjf_gain == pytest.approx(0)


def test_ordering_by_the_opposite_of_the_truth_is_worse_than_fifo() -> None:
    truth = np.random.default_rng(1).lognormal(3, 1, 500)
    assert sjf_gain(truth, -truth) < 0 < sjf_gain(truth, truth * np.random.default_rng(2).lognormal(0, 0.5, 500)) < 1


def test_scores_agree_with_hand_worked_cases() -> None:
    assert pinball(np.array([10.0]), np.array([[8.0, 14.0]]), (0.5, 0.9)) == pytest.approx((1.0 + 0.4) / 2)
    assert spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 30.0, 20.0, 40.0])) == pytest.approx(0.8)
    happened = np.array([True, False, True, False])
    assert auc(happened, np.array([0.9, 0.1, 0.8, 0.2])) == 1.0
    assert auc(happened, np.array([0.5, 0.5, 0.5, 0.5])) == 0.5
    assert math.isnan(auc(np.array([True]), np.array([0.1])))


@needs_trace
@pytest.mark.slow
def test_on_the_real_trace_the_online_predictor_is_ahead_of_every_baseline() -> None:
    card = run(TRACE)
    scores = dict(card.points)
    online = scores.pop(ONLINE)
    assert all(online.mape < other.mape and online.medape < other.medape for other in scores.values())
    assert all(online.r2 > other.r2 and online.sjf_gain > other.sjf_gain for other in scores.values())
    assert online.mape <= 25.5
    assert online.log_rmse <= 0.33
    assert card.calibration.within_80 == pytest.approx(80, abs=0.5)
    assert card.calibration.within_90 == pytest.approx(90, abs=0.5)
    assert card.calibration.within_99 >= 98.5
    assert card.calibration.crossings == 0
    assert card.cold_start[0].within_90 >= 85
    assert all(88 <= still.below_p90 <= 92 for still in card.still_running)


def test_the_pictures_figures_agree_with_the_card(tmp_path: Path) -> None:
    rows = made_up(1600)
    told: list[float] = []
    card, figures = report_with_figures(rows, lambda fraction, note: told.append(fraction))
    assert told == sorted(told)
    assert (
        sum(group.requests for group in figures.days) == sum(group.requests for group in figures.models) == card.scored
    )
    overall = sum(group.requests * group.within_90 for group in figures.days) / card.scored
    assert overall == pytest.approx(card.calibration.within_90)
    assert list(figures.below) == sorted(figures.below)
    widths = np.diff([0.0, *figures.levels, 1.0])
    assert float(np.dot(figures.pit, widths)) == pytest.approx(1.0)
    assert dict(figures.sjf)[ONLINE] == dict(card.points)[ONLINE].sjf_gain
    assert dict(figures.sjf)["the truth"] == 100.0


def test_measured_peaks_make_memory_limits_tighter() -> None:
    curve = memory_curve(made_up(1200))
    assert list(curve.exceed) == sorted(curve.exceed, reverse=True)
    assert curve.exceed[8] < curve.exceed_unlearned[8]
    assert curve.chosen_exceed < 3
    assert 0 < curve.chosen_slack < 15


def test_too_little_demand_has_no_fan() -> None:
    assert demand_fan(made_up(60)) is None
    fan = demand_fan(made_up(3600), last_hours=12)
    assert fan is not None
    assert all(low <= middle <= high for low, middle, high in zip(fan.low, fan.middle, fan.high, strict=True))
    assert sum(fan.came) / len(fan.came) == pytest.approx(120, rel=0.05)


def test_a_run_that_slows_down_is_followed_in_the_drift_curve() -> None:
    curve = drift_curve([row for row in made_up(2400) if row.status == SUCCEED])
    assert curve[0][1] > 0.15
    assert abs(curve[-1][1]) < 0.1
