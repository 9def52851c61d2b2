"""The demand forecast keeps what it promises: quantiles that never cross, no look ahead, and the same after a restart."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.capacity import CapacityChecked, DemandForecast
from engine.events import TaskFinished, TaskSubmitted
from engine.ports import NoForecast
from engine.resources import Demand as PodDemand
from engine.tasks import SECOND, TaskSpec, TaskType
from predictors import demand_stored
from predictors.demand import ALL, BIN_US, HORIZONS_US, LEVELS, Demand, DemandModel
from predictors.demand_forecaster import DemandForecaster
from predictors.demand_report import report
from predictors.demand_series import BIN_S, EXPERTS, History
from predictors.demand_stack import Stack
from predictors.gentd26 import SUCCEED, Row

COUNTS = st.lists(st.integers(0, 60), min_size=1, max_size=40)
QUICK = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def _fed(counts: list[int], model: DemandModel | None = None, begin: int = 0) -> DemandModel:
    made = DemandModel(4) if model is None else model
    made.advance(begin * BIN_US)
    for number, count in enumerate(counts, begin):
        for nth in range(count):
            place = made.arrived(("model:a",) if nth % 2 else ("model:b",), number * BIN_US + nth)
            made.finished(("model:a",) if nth % 2 else ("model:b",), place, 30 * SECOND, None)
        made.advance((number + 1) * BIN_US)
    return made


def _all(model: DemandModel) -> list[tuple[Demand, ...] | None]:
    return [model.forecast(key) for key in (ALL, "model:a", "model:b")]


@QUICK
@given(COUNTS)
def test_quantiles_are_never_negative_never_cross_and_are_numbers(counts: list[int]) -> None:
    for series in _all(_fed(counts)):
        for each in series or ():
            for row in (each.arrival_quantiles, each.run_us_quantiles):
                assert list(row) == sorted(row)
                assert row[0] >= 0
                assert all(map(math.isfinite, row))
            assert each.arrivals >= 0
            assert math.isfinite(each.run_us)


@QUICK
@given(COUNTS, st.integers(1, 40))
def test_a_restored_model_goes_on_to_the_bit(counts: list[int], more: int) -> None:
    first = _fed(counts)
    second = demand_stored.loads(demand_stored.dumps(first))
    assert _all(second) == _all(first)
    later = [more, 0, 2 * more, 1]
    assert _all(_fed(later, second, len(counts))) == _all(_fed(later, first, len(counts)))


@QUICK
@given(COUNTS, COUNTS)
def test_what_comes_later_changes_no_forecast_made_before(counts: list[int], other: list[int]) -> None:
    model = _fed(counts)
    before = _all(model)
    again = _fed(counts)
    _fed(other, again, len(counts))
    assert _all(_fed(counts)) == before


@QUICK
@given(st.lists(st.text(max_size=8), min_size=1, max_size=40))
def test_unknown_series_never_raise_and_are_never_more_than_allowed(keys: list[str]) -> None:
    model = DemandModel(5)
    for number, key in enumerate(keys):
        model.arrived((key,), number * BIN_US)
        assert len(model.rows) <= 5
        assert ALL in model.rows
        assert len(set(model.rows.values())) == len(model.rows)
    assert model.forecast("nobody ever heard of it") is None


def test_a_steady_demand_is_forecast_as_it_is() -> None:
    model = _fed([6] * 400)
    found = model.forecast()
    assert found is not None
    for each, bins in zip(found, (1, 3, 12), strict=True):
        assert each.arrivals == pytest.approx(6 * bins, rel=0.05)
        assert each.run_us == pytest.approx(6 * bins * 30 * SECOND, rel=0.1)
        assert each.arrival_quantiles[-1] == pytest.approx(6 * bins, rel=0.15)


def test_a_daily_rhythm_is_foreseen() -> None:
    day = 86_400 // BIN_S
    rhythm = [20 if (number % day) < day // 4 else 1 for number in range(5 * day)]
    model = _fed(rhythm)
    found = model.forecast()
    assert found is not None
    assert found[2].arrivals > 100, "the next hour is a busy one, though the last one was not"


def test_every_expert_keeps_a_share_the_seasonal_naives_too() -> None:
    rng = np.random.default_rng(3)
    model = _fed(rng.poisson(5, 700).tolist())
    for stack in model.stacks:
        shares = stack.shares()[0]
        assert shares.sum() == pytest.approx(1.0)
        assert shares[EXPERTS.index("24 h ago")] > 0
        assert shares[EXPERTS.index("7 d ago")] > 0


@pytest.mark.slow
def test_promises_hold_as_often_as_they_say() -> None:
    rng = np.random.default_rng(7)
    level = 8 * np.exp(np.cumsum(rng.normal(0, 0.05, 2600)) - 0.5)
    counts = rng.poisson(np.clip(level, 0.5, 60))
    model = DemandModel(2)
    model.advance(0)
    held, judged = np.zeros(len(LEVELS)), 0
    for number, count in enumerate(counts):
        said = model.forecast()
        for _ in range(count):
            model.arrived((), number * BIN_US)
        model.advance((number + 1) * BIN_US)
        if said is not None and number > 600:
            held += [count <= each for each in said[0].arrival_quantiles]
            judged += 1
    p90, p95 = (held / judged)[2:]
    assert p90 == pytest.approx(0.90, abs=0.02)
    assert p95 == pytest.approx(0.95, abs=0.01)


def test_a_long_silence_is_no_long_work() -> None:
    model = _fed([5] * 20)
    model.advance(400 * 86_400 * SECOND)
    assert model.history is not None
    assert model.history.bin == 400 * 86_400 // BIN_S
    assert model.forecast() is not None


def test_a_window_beyond_the_memory_counts_as_empty() -> None:
    history = History(2, 10)
    history.close(np.array([3.0, 0.0]))
    assert history.mean(-5000, -4000).tolist() == [0.0, 0.0]
    assert history.mean(10, 11).tolist() == [3.0, 0.0]


def test_a_new_series_in_an_old_place_knows_nothing_of_it() -> None:
    model = _fed([8] * 30, DemandModel(3))
    model.arrived(("model:new",), 30 * BIN_US)
    assert model.forecast("model:new") is None
    fresh = Stack(1)
    row = model.rows["model:new"]
    assert np.array_equal(model.stacks[0].weights[row], fresh.weights[0])


@pytest.mark.parametrize("place", [0, 100, -200])
def test_a_damaged_file_is_refused(tmp_path: Path, place: int) -> None:
    path = tmp_path / "demand.npz"
    demand_stored.save(_fed([3, 4]), path)
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(demand_stored.DemandUnusable, match="remove it to start anew"):
        demand_stored.load(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "demand.npz"
    for data in (b"", b"PK", b"{}", b"\x80\x04."):
        path.write_bytes(data)
        with pytest.raises(demand_stored.DemandUnusable):
            demand_stored.load(path)


def _task(req_no: str, model: str = "m", slots: int = 1) -> TaskSpec:
    return TaskSpec(
        req_no, "t", "", TaskType.GC, "text_to_image", model, demand=PodDemand(gpus=1, gpu_share=500), slots=slots
    )


def test_the_forecast_enters_the_stream_once_per_bin_and_names_the_pod_that_serves_a_model() -> None:
    forecaster = DemandForecaster(NoForecast(), DemandModel(8), check_us=0)
    found: list[DemandForecast] = []
    for number in range(10):
        now = number * BIN_US
        events = [TaskSubmitted(_task(f"r{number}", slots=2)), TaskFinished(f"r{number - 1}", 1, run_us=60 * SECOND)]
        found += [each for each in forecaster.stamp(now + 1, events) if isinstance(each, DemandForecast)]
        assert not [each for each in forecaster.stamp(now + 2, ()) if isinstance(each, DemandForecast)]
    assert len(found) == 9
    last = found[-1]
    assert last.horizons_us == HORIZONS_US
    (model,) = last.models
    assert (model.method, model.model, model.slots) == ("text_to_image", "m", 2)
    assert model.run_us[0][-1] > 0
    assert last.gpu_us[2][1] == pytest.approx(model.run_us[2][1] * 0.25, rel=0.2), "half a GPU, shared by two slots"


def test_the_engine_is_told_to_look_as_often_as_wanted() -> None:
    forecaster = DemandForecaster(NoForecast(), DemandModel(4), check_us=10 * SECOND)
    checks = [
        now
        for now in range(0, 60, 2)
        if any(isinstance(e, CapacityChecked) for e in forecaster.stamp(now * SECOND, ()))
    ]
    assert checks == [0, 10, 20, 30, 40, 50]


def test_submitting_twice_counts_once() -> None:
    forecaster = DemandForecaster(NoForecast(), DemandModel(4))
    for _ in range(3):
        forecaster.stamp(1, [TaskSubmitted(_task("same"))])
    assert forecaster.model.counts[0] == 1


def test_the_report_card_beats_the_naives_on_a_trace_with_a_rhythm() -> None:
    rng = np.random.default_rng(1)
    rows = []
    for number in range(3 * 86_400 // BIN_S):
        rate = 3 + 3 * math.sin(2 * math.pi * number * BIN_S / 86_400)
        for _ in range(rng.poisson(rate * math.exp(rng.normal(0, 0.4)))):
            at = number * BIN_US + int(rng.integers(BIN_US))
            rows.append(Row(at, 30 * SECOND, SUCCEED, "u", "M1", "TXT_2_IMG", 1, 30, 0, 10))
    rows.sort(key=lambda row: row.submitted_us)
    card = report(rows, "made up", models=1)
    everything = card.series[0]
    assert [each.minutes for each in everything.horizons] == [5, 15, 60]
    assert all(each.mase < 1 for each in everything.horizons)
    assert all(each.mase < each.mase_of["last"] for each in everything.horizons)
    assert "work MASE" in card.table()
    with pytest.raises(ValueError, match="two days"):
        report(rows[:20], "short")
    with pytest.raises(ValueError, match="no request"):
        report([], "empty")


@pytest.mark.slow
def test_the_trace_is_forecast_as_well_as_promised() -> None:
    trace = Path(__file__).parents[3] / "shared" / "traces" / "gentd26" / "lora_request_trace.csv"
    if not trace.is_file():
        pytest.skip("GenTD26's lora_request_trace.csv is not there")
    from predictors.demand_report import run

    card = run(trace, totals=False, models=0)
    found = card.series[0].horizons
    for each, most in zip(found, (0.58, 0.67, 0.77), strict=True):
        assert each.mase <= most
        assert 0.94 <= each.coverage["0.95"] <= 0.96
        assert abs(each.bias) < 0.08
