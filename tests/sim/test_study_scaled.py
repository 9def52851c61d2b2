"""A busy service made out of a small one's trace: its load, its users, and its bursts."""

from __future__ import annotations

from collections import Counter
from datetime import date
from pathlib import Path

import pytest

from engine.tasks import SECOND
from sim import likeness
from sim.study import scaled
from sim.study.scaled import DAY_US, window
from sim.workload import Workload, WorkloadError

TRACE = Path(__file__).resolve().parents[3] / "shared" / "traces" / "gentd26" / "lora_request_trace.csv"
HEADER = (
    "gmt_create,predict_type,predict_status,exec_time_seconds,groupId,prompt_length,negative_prompt_length,"
    "num_images_per_prompt,num_inference_steps,checkpoint_model_version_id,num_lora\n"
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Three days: every hour user A asks once, on the second day user B asks ten times at noon, with an adapter."""
    rows = [
        f"2024-11-{15 + hour // 24} {hour % 24:02d}:30:00,TXT_2_IMG,SUCCEED,20,GA,10,,1,30,M0,0" for hour in range(72)
    ]
    rows += [f"2024-11-16 12:00:{second:02d},TXT_2_IMG,SUCCEED,30,GB,10,,1,30,M1,1" for second in range(10)]
    path = tmp_path / "lora_request_trace.csv"
    path.write_text(HEADER + "\n".join(rows) + "\n")
    return path


def make(source: scaled.Window, **changed) -> Workload:
    values = {
        "busy_gpus": 0.05,
        "hours": 24,
        "method": "superpose",
        "tenants": 4,
        "urgent_share": 0.1,
        "seed": 0,
    } | changed
    return scaled.scaled(source, **values)


def test_a_window_holds_the_days_that_were_named(trace):
    whole, second = window(trace, None, None), window(trace, "2024-11-16", "2024-11-16")
    assert (whole.first_day, whole.last_day, whole.span_us) == (date(2024, 11, 15), date(2024, 11, 17), 3 * DAY_US)
    assert len(whole.arrivals) == 82
    assert len(second.arrivals) == 34
    assert second.arrivals[0].at == 30 * 60 * SECOND
    assert second.work_us == (24 * 20 + 10 * 30) * SECOND


@pytest.mark.parametrize(
    ("first", "last", "named"),
    [
        ("2024-11-17", "2024-11-15", "to: 2024-11-15 comes before"),
        ("2024-12-24", None, "comes before"),
        ("2024-12-24", "2024-12-24", "has no request between"),
        ("yesterday", None, "from: 'yesterday' is not a day"),
    ],
)
def test_wrong_days_are_named(trace, first, last, named):
    with pytest.raises(WorkloadError, match=named):
        window(trace, first, last)


@pytest.mark.parametrize("method", scaled.METHODS)
def test_the_work_is_what_was_asked_for(trace, method):
    made = make(window(trace, None, None), busy_gpus=0.1, method=method)
    work = sum(arrival.truth.work_us or 0 for arrival in made.arrivals) / SECOND
    adapters = 4.4 * sum(len(arrival.truth.loras) for arrival in made.arrivals)
    assert 0.1 * 86_400 * 0.9 < work + adapters < 0.1 * 86_400 * 1.1
    assert made.arrivals[-1].at < DAY_US
    assert dict(made.notes)["busy_gpus"] == pytest.approx(0.1, rel=0.1)


def test_every_copy_has_users_of_its_own(trace):
    made = make(window(trace, None, None))
    groups = {arrival.task.group for arrival in made.arrivals}
    copies = int(dict(made.notes)["copies"])
    assert copies > 5
    assert len([group for group in groups if group.startswith("GA~")]) in (copies, copies - 1)
    assert all(dict(arrival.task.features)["user"] == arrival.task.group for arrival in made.arrivals)


def test_whole_days_keep_the_time_of_day(trace):
    made = make(window(trace, None, None), method="days")
    past_the_hour = {arrival.at // SECOND % 3600 for arrival in made.arrivals if arrival.task.group.startswith("GA~")}
    assert past_the_hour == {1800}
    anywhen = make(window(trace, None, None))
    assert len({arrival.at // SECOND % 3600 for arrival in anywhen.arrivals}) > 5


def test_more_hours_than_the_window_has_go_round(trace):
    made = make(window(trace, "2024-11-15", "2024-11-15"), hours=60, busy_gpus=0.004, method="days")
    assert [arrival.at // (3600 * SECOND) for arrival in made.arrivals] == list(range(60))


def test_seeds_differ_and_one_seed_repeats_itself(trace):
    source = window(trace, None, None)
    assert make(source).digest() == make(source).digest()
    assert make(source).digest() != make(source, seed=1).digest()


def test_a_user_keeps_to_his_adapter_and_its_load_leaves_the_recorded_time(trace):
    made = make(window(trace, None, None), busy_gpus=0.2, method="days")
    names: dict[str, Counter[str]] = {}
    for arrival in made.arrivals:
        for lora in arrival.truth.loras:
            names.setdefault(arrival.task.group, Counter())[lora] += 1
            assert arrival.truth.work_us == 30 * SECOND - 4_400_000
    assert len(names) > 3
    assert all(len(each) == 1 for each in names.values())
    assert len({next(iter(each)) for each in names.values()}) > 1


def test_an_unknown_method_is_refused(trace):
    with pytest.raises(WorkloadError, match="rate_method: unknown 'compress'"):
        make(window(trace, None, None), method="compress")


@pytest.mark.skipif(not TRACE.is_file(), reason="the GenTD26 trace is not here")
def test_dispersion_stays_what_it_was_at_sixteen_times_the_rate():
    source = window(TRACE, None, None)
    own = likeness.measure(Workload("own", source.arrivals))
    made = [likeness.measure(make(source, busy_gpus=6.4, hours=24, seed=seed)) for seed in range(3)]
    for name, within in (("dispersion_1min", 0.25), ("dispersion_10min", 0.3), ("dispersion_1h", 0.35)):
        mean = sum(each[name] for each in made) / len(made)
        assert mean == pytest.approx(own[name], rel=within), name
    assert all(each["seconds_p50"] == pytest.approx(own["seconds_p50"], rel=0.1) for each in made)
    assert all(each["gap_cv"] < 0.3 * own["gap_cv"] for each in made), "the variation of gaps cannot be kept as well"
