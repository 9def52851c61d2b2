"""Readers and the generator: what they keep, refuse and resemble."""

from __future__ import annotations

import json

import pytest

from engine.tasks import SECOND, FailureCause, TaskType, is_urgent
from sim import gentd26, likeness, own_tasks, synthetic
from sim.synthetic import SyntheticConfig
from sim.workload import Arrival, Workload, WorkloadError, declared, demanding

HEADER = (
    "gmt_create,predict_type,predict_status,exec_time_seconds,groupId,prompt_length,negative_prompt_length,"
    "num_images_per_prompt,num_inference_steps,checkpoint_model_version_id,num_lora"
)
ROWS = (
    "2024-11-15 16:57:50,TXT_2_IMG,SUCCEED,32.0,G0000,63.0,26.0,1.0,30.0,M0000,0",
    "2024-11-15 16:58:00,TXT_2_IMG,PENDING,0.0,G0000,,,,,,0",
    "2024-11-15 16:58:10,IMG_2_IMG,FAILED,3.0,G0001,93.0,,8.0,40.0,M0001,2",
    "2024-11-15 16:58:05,TXT_2_IMG,PROCESSING,3.0,G0001,93.0,,8.0,40.0,M0001,2",
)


def gentd26_file(tmp_path, *rows, header=HEADER):
    path = tmp_path / "lora_request_trace.csv"
    path.write_text("\n".join((header, *rows)) + "\n")
    return path


def test_gentd26_rows_become_tasks_and_unfinished_ones_are_skipped(tmp_path):
    workload = gentd26.read(gentd26_file(tmp_path, *ROWS))
    first, second = workload.arrivals
    assert (first.at, second.at) == (0, 20 * SECOND)
    assert first.truth.work_us == 32 * SECOND
    assert first.truth.fails_with is None
    assert second.truth.fails_with is FailureCause.BAD_INPUT
    assert dict(second.task.features)["loras"] == 2
    assert first.task.model == "M0000"
    assert dict(workload.notes)["skipped PENDING"] == 1
    assert dict(workload.notes)["skipped PROCESSING"] == 1


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ("2024-11-15,TXT_2_IMG,SUCCEED,abc,G,1,1,1,30,M,0", "line 2, exec_time_seconds"),
        ("yesterday,TXT_2_IMG,SUCCEED,3,G,1,1,1,30,M,0", "line 2, gmt_create"),
        ("2024-11-15,TXT_2_IMG,DONE,3,G,1,1,1,30,M,0", "line 2, predict_status"),
        ("2024-11-15,TXT_2_IMG,SUCCEED,-3,G,1,1,1,30,M,0", "line 2, exec_time_seconds"),
        ("2024-11-15,TXT_2_IMG,SUCCEED,nan,G,1,1,1,30,M,0", "line 2, exec_time_seconds"),
        ("2024-11-15,TXT_2_IMG,SUCCEED", "line 2, exec_time_seconds"),
    ],
)
def test_a_bad_gentd26_row_is_named_by_line_and_column(tmp_path, row, names):
    with pytest.raises(WorkloadError, match=names):
        gentd26.read(gentd26_file(tmp_path, row))


def test_a_foreign_csv_is_refused_with_the_missing_column(tmp_path):
    with pytest.raises(WorkloadError, match="gmt_create"):
        gentd26.read(gentd26_file(tmp_path, "1,2", header="a,b"))


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(WorkloadError, match=r"nowhere\.csv"):
        gentd26.read(tmp_path / "nowhere.csv")


def test_the_published_trace_is_read_whole(gentd26_path):
    workload = gentd26.read(gentd26_path)
    assert len(workload.arrivals) == 20_471
    assert dict(workload.notes)["kept FAILED"] == 323
    assert len({arrival.task.req_no for arrival in workload.arrivals}) == 20_471
    measured = likeness.measure(workload)
    assert measured["gap_cv"] == pytest.approx(12.26, abs=0.1)


def test_tenants_and_urgency_are_drawn_by_identity(tmp_path):
    path = gentd26_file(tmp_path, *(ROWS[0].replace("G0000", f"G{n:04d}") for n in range(200)))
    workload = gentd26.read(path, tenants=3, urgent_share=0.25)
    again = gentd26.read(path, tenants=3, urgent_share=0.25, limit=50)
    assert workload.arrivals[:50] == again.arrivals
    assert {arrival.task.tenant for arrival in workload.arrivals} == {"tenant-0", "tenant-1", "tenant-2"}
    assert 25 <= sum(is_urgent(arrival.task) for arrival in workload.arrivals) <= 75


def test_scaling_the_rate_compresses_time_and_leaves_run_times():
    workload = synthetic.make(SyntheticConfig(tasks=200))
    fast = workload.scaled(10)
    assert fast.span_us == pytest.approx(workload.span_us / 10, rel=1e-6)
    assert [a.truth for a in fast.arrivals] == [a.truth for a in workload.arrivals]
    with pytest.raises(WorkloadError, match="rate_scale"):
        workload.scaled(0)


def test_the_synthetic_workload_is_the_same_for_the_same_seed():
    config = SyntheticConfig(tasks=300, seed=4)
    assert synthetic.make(config).digest() == synthetic.make(config).digest()
    assert synthetic.make(SyntheticConfig(tasks=300, seed=5)).digest() != synthetic.make(config).digest()


TOLERANCES = {
    "gap_cv": 0.20,
    "dispersion_1min": 0.30,
    "dispersion_10min": 0.35,
    "dispersion_1h": 0.40,
    "seconds_p10": 0.10,
    "seconds_p50": 0.10,
    "seconds_p90": 0.12,
    "seconds_p99": 0.25,
    "lora_0_median_s": 0.10,
    "lora_1_median_s": 0.12,
    "images_8_to_1": 0.15,
    "model_top_1": 0.10,
    "model_top_10": 0.05,
    "group_top_1_percent": 0.20,
    "lru_1": 0.25,
    "lru_4": 0.10,
    "lru_16": 0.05,
}
"""How near the median of five seeds must be to the published figures."""


@pytest.fixture(scope="module")
def synthetic_figures():
    runs = [likeness.measure(synthetic.make(SyntheticConfig(seed=seed))) for seed in range(5)]
    return {name: sorted(run[name] for run in runs)[2] for name in likeness.GENTD26}


@pytest.mark.parametrize("name", sorted(TOLERANCES))
def test_the_synthetic_workload_resembles_the_published_one(synthetic_figures, name):
    assert synthetic_figures[name] == pytest.approx(likeness.GENTD26[name], rel=TOLERANCES[name])


def test_trainings_can_be_mixed_in():
    workload = synthetic.make(SyntheticConfig(tasks=500, training_share=0.2))
    kinds = [arrival.task.task_type for arrival in workload.arrivals]
    assert 60 <= kinds.count(TaskType.TP) <= 140


@pytest.mark.parametrize(
    ("field", "value"),
    [("tasks", 0), ("per_day", 0.0), ("urgent_share", 1.5), ("busy_share", 0.0), ("loyalty", -1)],
)
def test_an_impossible_synthetic_workload_is_refused_by_field(field, value):
    with pytest.raises(WorkloadError, match=f"synthetic.{field}"):
        SyntheticConfig(**{field: value})


def test_own_tasks_are_read_from_csv_and_json_lines_alike(tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text("submitted_s,seconds,model,tenant,priority,style\n5,2.5,m1,a,100,oil\n1,3,m2,,,\n")
    lines = tmp_path / "mine.jsonl"
    rows = [
        {
            "submitted_s": 5,
            "seconds": 2.5,
            "model": "m1",
            "tenant": "a",
            "priority": 100,
            "style": "oil",
            "req_no": "row-0000002",
        },
        {"submitted_s": 1, "seconds": 3, "model": "m2", "req_no": "row-0000003"},
    ]
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    one, two = own_tasks.read(table), own_tasks.read(lines)
    assert one.arrivals == two.arrivals
    assert one.arrivals[0].task.model == "m2"
    assert one.arrivals[1].task.features == (("style", "oil"),)
    assert one.arrivals[1].truth.work_us == 2_500_000


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("submitted_s,seconds\n1,\n", "line 2, seconds"),
        ("submitted_s,seconds\nx,1\n", "line 2, submitted_s"),
        ("submitted_s,seconds,type\n1,1,XX\n", "line 2, type"),
        ("submitted_s,seconds,req_no\n1,1,a\n2,1,a\n", "line 3, req_no"),
        ("submitted_s,seconds\n", "no task"),
        ("submitted_s,seconds\n1,inf\n", "line 2, seconds"),
    ],
)
def test_a_bad_row_of_ones_own_is_named(tmp_path, text, names):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=names):
        own_tasks.read(path)


def test_a_line_that_is_no_json_object_is_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"submitted_s": 1, "seconds": 1}\n[1]\n')
    with pytest.raises(WorkloadError, match="line 2"):
        own_tasks.read(path)


def test_made_up_declarations_are_off_by_a_lognormal_error_and_round():
    workload = declared(synthetic.make(SyntheticConfig(tasks=200)), 0.5, 1)
    assert all(arrival.task.declared_us % (5 * SECOND) == 0 for arrival in workload.arrivals)
    exact = declared(synthetic.make(SyntheticConfig(tasks=200)), 0.0, 1)
    assert all(0 <= a.task.declared_us - a.truth.work_us < 5 * SECOND for a in exact.arrivals)


def test_arrivals_out_of_order_are_refused():
    workload = synthetic.make(SyntheticConfig(tasks=3))
    first, second, third = workload.arrivals
    with pytest.raises(WorkloadError, match="sort"):
        Workload("x", (first, Arrival(third.at + 1, second.task), third))


def test_a_made_workload_is_the_same_task_by_task_and_as_a_whole() -> None:
    rows = declared(synthetic.make(SyntheticConfig(tasks=300, training_share=0.1)), 0.5, 1).scaled(2.0).arrivals
    every = tuple(rows)
    assert len(every) == len(rows) == 300
    assert [rows[0], rows[-1], rows[170]] == [every[0], every[-1], every[170]]
    assert rows[5:8] == every[5:8]
    assert [each.at for each in every] == sorted(each.at for each in every)
    with pytest.raises(IndexError):
        rows[300]


def test_the_digest_of_a_made_workload_tells_every_change() -> None:
    made = synthetic.make(SyntheticConfig(tasks=100))
    changed = (made.scaled(2.0), declared(made, 0.5, 1), demanding(made, gpu_share=500, gpu_memory_gib=8, slots=2))
    assert len({made.digest(), made.limited(99).digest(), *(each.digest() for each in changed)}) == 5
