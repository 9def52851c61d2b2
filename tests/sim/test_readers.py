"""Readers of other people's traces: what each keeps, skips and refuses, and how formats are told apart."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path

import pytest

from engine.tasks import SECOND, Affinity, TaskType
from sim.configuration import ConfigError, SimulationConfig
from sim.readers import registry
from sim.readers.registry import ReaderOptions, detect, read
from sim.readers.rows import Intake, gang, moment
from sim.simulate import simulate
from sim.workload import WorkloadError

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"
SWF = """\
; Version: 2.2
; Computer: a small one
; MaxProcs: 240
; MaxNodes: 60
  1   100    5   60   4  -1 -1   4  120 -1 1  7  3 -1 1 -1 -1 -1
  2   110   -1   30  12  -1 -1  -1   -1 -1 0  8 -1 -1 1 -1 -1 -1
  3   105    0    0   8  -1 -1   8   90 -1 5  7  3 -1 1 -1 -1 -1
  4   120    0   -1   8  -1 -1   8   90 -1 0  7  3 -1 1 -1 -1 -1
  5   130    0  200  13  -1 -1  13   90 -1 1 -1 -1 -1 1 -1 -1 -1
  6   131    0   20   1  -1 -1   1   90 -1 2 -1 -1 -1 1 -1 -1 -1
"""
HELIOS = """\
job_id,user,vc,gpu_num,cpu_num,node_num,state,submit_time,start_time,end_time,duration,queue
11,uA,vcX,16,64,2,COMPLETED,2020-06-09 18:41:01,2020-06-09 18:41:11,2020-06-09 18:43:11,120,10
12,uB,vcY,1,4,1,FAILED,2020-06-09 18:41:27,2020-06-09 18:41:27,2020-06-09 18:45:36,249,0
13,uC,vcY,0,4,1,CANCELLED,2020-06-09 18:41:28,2020-06-09 18:41:28,2020-06-09 18:45:36,248,0
"""
PAI_TASKS = """\
jobA,worker,2.0,Terminated,1000.0,1600.0,400.0,29.296875,50.0,V100
jobA,ps,1.0,Terminated,1000.0,1600.0,600.0,10.0,,CPU
jobB,tensorflow,1.0,Running,1200.0,,600.0,29.296875,100.0,T4
jobC,pytorch,4.0,Failed,1100.0,1150.0,600.0,29.296875,800.0,V100M32
"""
PHILLY_JOB = {
    "status": "Pass",
    "vc": "ee9e8c",
    "jobid": "application_1",
    "user": "ce2f4c",
    "submitted_time": "2017-10-07 01:11:39",
    "attempts": [
        {
            "start_time": "2017-10-07 01:12:00",
            "end_time": "2017-10-07 01:13:00",
            "detail": [{"ip": "m1", "gpus": ["gpu0", "gpu1"]}, {"ip": "m2", "gpus": ["gpu0", "gpu1"]}],
        },
        {"start_time": "2017-10-07 01:14:00", "end_time": "2017-10-07 01:14:30", "detail": []},
    ],
}


def written(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def test_swf_jobs_become_gangs_and_those_that_never_ran_are_skipped(tmp_path):
    workload = read(written(tmp_path, "log.swf", SWF))
    first, second, third = workload.arrivals
    assert [each.task.req_no for each in workload.arrivals] == ["job-1", "job-2", "job-5"]
    assert [each.at for each in workload.arrivals] == [0, 10 * SECOND, 30 * SECOND]
    assert (first.task.members, first.task.demand.gpus) == (1, 4)
    assert first.task.declared_us == 120 * SECOND
    assert first.task.tenant == "group-3"
    assert second.task.tenant == "user-8"
    assert (second.task.members, second.task.demand.gpus) == (2, 6), "12 processors are two equal members"
    assert second.task.declared_us is None
    assert (third.task.members, third.task.demand.gpus) == (13, 1), "no number but itself divides 13"
    assert third.truth.work_us == 200 * SECOND
    notes = dict(workload.notes)
    assert notes["MaxProcs"] == "240"
    assert notes["skipped: cancelled before it ran"] == 1
    assert notes["skipped: run time is unknown"] == 1
    assert notes["skipped: partial run of a checkpointed job"] == 1
    assert notes["ran longer than asked for"] == 1


def test_packed_files_read_as_the_plain_ones(tmp_path):
    plain = read(written(tmp_path, "log.swf", SWF))
    packed = read(written(tmp_path, "log.swf.gz", SWF))
    assert packed.digest() == plain.digest()


def test_philly_slices_have_virtual_clusters_as_tenants(tmp_path):
    text = "vc,gpu_num,submit_time,duration_s\nb,9,2017-10-01 00:01:00,61\na,1,2017-10-01 00:00:30,30\nb,0,2017-10-01 00:00:31,3\n"
    workload = read(written(tmp_path, "slice.csv", text))
    first, second = workload.arrivals
    assert (first.task.tenant, second.task.tenant) == ("a", "b")
    assert second.at == 30 * SECOND
    assert (second.task.members, second.task.demand.gpus) == (3, 3)
    assert first.task.task_type is TaskType.TP
    assert first.task.affinity is Affinity.NONE
    assert dict(workload.notes)["skipped: asks for no GPU"] == 1
    kept = read(tmp_path / "slice.csv", ReaderOptions(cpu_tasks=True))
    assert len(kept.arrivals) == 3


def test_a_philly_job_runs_the_sum_of_its_attempts(tmp_path):
    never = {**PHILLY_JOB, "jobid": "application_2", "attempts": []}
    running = {**PHILLY_JOB, "jobid": "application_3"}
    running["attempts"] = [{"start_time": "2017-10-07 01:12:00", "end_time": None, "detail": []}]
    workload = read(written(tmp_path, "cluster_job_log", json.dumps([never, PHILLY_JOB, running])))
    (only,) = workload.arrivals
    assert only.truth.work_us == 90 * SECOND
    assert only.task.req_no == "application_1"
    assert only.task.demand.gpus * only.task.members == 4
    assert only.task.tenant == "ee9e8c"
    notes = dict(workload.notes)
    assert notes["skipped: never started"] == 1
    assert notes["skipped: end is unknown: still running, or lost by the log"] == 1


def test_helios_jobs_on_several_nodes_have_a_member_on_each(tmp_path):
    workload = read(written(tmp_path, "cluster_log.csv", HELIOS))
    first, second = workload.arrivals
    assert (first.task.members, first.task.demand.gpus, first.task.demand.cpu_milli) == (2, 8, 32_000)
    assert (first.task.tenant, first.truth.work_us) == ("vcX", 120 * SECOND)
    assert (second.at, second.truth.work_us) == (26 * SECOND, 249 * SECOND)
    assert second.truth.fails_with is None, "a job that failed held its GPUs for its time"
    assert dict(workload.notes)["state FAILED"] == 1


def test_a_pai_gang_counts_each_instance_once(tmp_path):
    workload = read(written(tmp_path, "pai_task_table.csv", PAI_TASKS))
    first, second = workload.arrivals
    assert (first.task.members, first.task.demand.gpus, first.task.demand.gpu_share) == (2, 1, 500)
    assert first.task.demand.gpu_models == ("v100",)
    assert first.task.demand.cpu_milli == 4_000
    assert (second.task.members, second.task.demand.gpus) == (4, 8)
    assert second.truth.work_us == 50 * SECOND
    notes = dict(workload.notes)
    assert notes["skipped: asks for no GPU"] == 1
    assert notes["skipped: was not over when the log was taken"] == 1


def test_a_pai_table_with_a_header_reads_the_same(tmp_path):
    header = "job_name,task_name,inst_num,status,start_time,end_time,plan_cpu,plan_mem,plan_gpu,gpu_type\n"
    bare = read(written(tmp_path, "bare.csv", PAI_TASKS))
    headed = read(written(tmp_path, "headed.csv", header + PAI_TASKS))
    assert [each.task for each in headed.arrivals] == [each.task for each in bare.arrivals]


def test_pai_job_lists_round_broken_numbers_of_several_gpus_up(tmp_path):
    text = "job_id,num_gpu,num_cpu,num_inst,submit_time,duration,user\n1,0.25,6,1,5,60,u\n2,1.5,6,2,9,60,u\n"
    workload = read(written(tmp_path, "jobs.csv", text))
    first, second = workload.arrivals
    assert (first.task.demand.gpus, first.task.demand.gpu_share) == (1, 250)
    assert (second.task.demand.gpus, second.task.demand.gpu_share, second.task.members) == (2, 1000, 2)
    assert dict(workload.notes)["GPUs rounded up to whole ones"] == 1


def test_openb_pods_run_from_scheduling_to_deletion(tmp_path):
    text = (
        "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time\n"
        "p1,1000,1024,1,460,T4|P100,LS,Running,10,100,20\n"
        "p2,1000,1024,0,0,,LS,Running,10,100,20\n"
        "p3,1000,1024,1,1000,,BE,Pending,10,100,\n"
    )
    workload = read(written(tmp_path, "openb.csv", text))
    (only,) = workload.arrivals
    assert only.truth.work_us == 80 * SECOND
    assert only.task.demand.gpu_models == ("p100", "t4")
    assert only.task.demand.memory_bytes == 1 << 30
    free = read(tmp_path / "openb.csv", ReaderOptions(gpu_types=False))
    assert free.arrivals[0].task.demand.gpu_models == ()
    with pytest.raises(WorkloadError, match="without times is for `aigc reproduce fgd`"):
        read(written(tmp_path, "untimed.csv", "name,cpu_milli,memory_mib,num_gpu,gpu_milli\np1,1,1,1,1000\n"))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.swf", SWF, "swf"),
        ("a.csv", HELIOS, "helios"),
        ("a.csv", PAI_TASKS, "pai"),
        ("a.csv", "job_id,num_gpu,submit_time,duration\n", "pai-jobs"),
        ("a.csv", "vc,gpu_num,submit_time,duration_s\n", "philly"),
        ("a", json.dumps([PHILLY_JOB], indent=2), "philly-json"),
        ("a.csv", "submitted_s,seconds\n", "own"),
        ("a.jsonl", '{"submitted_s": 1, "seconds": 2}\n', "own"),
        ("a.csv", "name,cpu_milli,memory_mib,num_gpu,gpu_milli\n", "openb"),
        ("a.csv", "gmt_create,predict_type\n", "gentd26"),
    ],
)
def test_formats_are_told_apart_by_their_beginning(tmp_path, name, text, expected):
    assert detect(written(tmp_path, name, text)).name == expected


def test_quoted_headers_and_byte_order_marks_are_no_hindrance(tmp_path):
    text = '\ufeff"vc","gpu_num","submit_time","duration_s"\r\n"a",1,2017-10-01 00:00:30,30\r\n'
    (only,) = read(written(tmp_path, "slice.csv", text)).arrivals
    assert only.task.tenant == "a"


def test_archives_are_told_from_packed_files(tmp_path):
    inside = written(tmp_path, "cluster_log.csv", HELIOS)
    archive = tmp_path / "trace.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(inside, "cluster_log.csv")
    with pytest.raises(WorkloadError, match="an archive or a binary file; unpack it"):
        read(archive)


def test_a_long_comment_before_the_first_job_is_no_hindrance(tmp_path):
    comment = "".join(f"; Note: line {number} of a long preamble about the machine\n" for number in range(300))
    assert detect(written(tmp_path, "noname", comment + SWF)).name == "swf"


def test_unknown_files_are_refused_with_the_formats_that_are_known(tmp_path):
    with pytest.raises(WorkloadError, match=r"no known format.*gentd26, philly"):
        detect(written(tmp_path, "a.csv", "a,b\n1,2\n"))
    with pytest.raises(WorkloadError, match="is empty"):
        detect(written(tmp_path, "b.csv", ""))
    with pytest.raises(WorkloadError, match="is a directory"):
        detect(tmp_path)
    with pytest.raises(WorkloadError, match="cannot read"):
        detect(tmp_path / "absent.csv")
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress(b"vc,gpu_num,submit_time,duration_s\n" * 500)[:40])
    with pytest.raises(WorkloadError, match="cannot be unpacked"):
        detect(cut)


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("a.swf", SWF + "  7 x 0 1 1 -1 -1 1 1 -1 1 1 1 1 1 1 -1 -1\n", "line 11, submit_time: 'x' is not a number"),
        ("b.swf", SWF + "  7 1 0 1\n", "line 11, fields: expected 18 numbers, got 4"),
        ("c.csv", HELIOS.replace("249,0", "-249,0"), "line 3, duration: -249 is out of range"),
        ("d.csv", HELIOS.replace(",FAILED,", ",LOST,"), "line 3, state: 'LOST' is unknown"),
        (
            "e.csv",
            HELIOS.replace("18:45:36,249", "18:41:26,249"),
            "line 3, end_time: '2020-06-09 18:41:26' lies before",
        ),
        ("f.csv", PAI_TASKS.replace("50.0,V100\n", "lots,V100\n"), "line 1, plan_gpu: 'lots' is not a number"),
        ("g.csv", PAI_TASKS.replace("2.0,Term", "2.5,Term"), "line 1, inst_num: 2.5 is not a whole number"),
        (
            "h.csv",
            "vc,gpu_num,submit_time,duration_s\na,1,later,30\n",
            "line 2, submit_time: 'later' is neither a time",
        ),
        ("i.csv", "vc,gpu_num,submit_time,duration_s\n,1,2017-10-01,30\n", "line 2, vc: is missing"),
        ("j", json.dumps([PHILLY_JOB, {"vc": "x", "attempts": []}]), "job 2, submitted_time: is missing"),
    ],
)
def test_bad_records_are_named_by_place_and_field(tmp_path, name, text, place):
    with pytest.raises(WorkloadError) as caught:
        read(written(tmp_path, name, text))
    assert place in str(caught.value)


def test_a_job_number_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(WorkloadError, match=r"line 11, identity: 'job-1' stands in line 5 already"):
        read(written(tmp_path, "a.swf", SWF + "  1 1 0 1 1 -1 -1 1 1 -1 1 1 1 1 1 1 -1 -1\n"))


def test_a_lenient_reading_counts_what_a_strict_one_refuses(tmp_path):
    path = written(tmp_path, "a.csv", HELIOS.replace("249,0", "-249,0").replace(",CANCELLED,", ",LOST,"))
    intake = Intake(path, strict=False)
    kept = list(registry.stream(path, intake, ReaderOptions(cpu_tasks=True)))
    assert [row.line for row in kept] == [2]
    assert {key: problem.count for key, problem in intake.bad.items()} == {"duration (negative)": 1, "state (value)": 1}
    assert intake.records == 3


@pytest.mark.parametrize(
    ("gpus", "per_node", "expected"),
    [
        (1, 8, (1, 1)),
        (8, 8, (1, 8)),
        (9, 8, (3, 3)),
        (16, 8, (2, 8)),
        (12, 8, (2, 6)),
        (13, 8, (13, 1)),
        (0, 8, (1, 0)),
    ],
)
def test_gangs_keep_the_total_and_fit_on_nodes(gpus, per_node, expected):
    assert gang(gpus, per_node) == expected


def test_moments_with_a_zone_are_moved_to_universal_time():
    assert moment("2017-10-01T02:00:00+02:00") == moment("2017-10-01 00:00:00")
    assert moment("1.5") == 1_500_000
    assert moment("nan") is None


def test_a_limit_keeps_the_first_by_time_whatever_the_order_of_the_file(tmp_path):
    text = "vc,gpu_num,submit_time,duration_s\nb,1,2017-10-01 00:01:00,61\na,1,2017-10-01 00:00:30,30\n"
    workload = read(written(tmp_path, "slice.csv", text), ReaderOptions(limit=1))
    assert [each.task.tenant for each in workload.arrivals] == ["a"]


def test_a_simulation_takes_any_format_and_a_gang_runs_to_its_end(tmp_path):
    path = written(tmp_path, "log.swf", SWF)
    result = simulate(SimulationConfig(trace=path, nodes=2, gpus_per_node=8, profile="fifo", forecaster="none"))
    assert result.summary.ends["finished"] == 3
    assert dict(result.workload_notes)["format"] == "swf"


def test_gpu_types_hold_where_the_cluster_has_them_and_are_dropped_where_it_has_none(tmp_path):
    path = tmp_path / "tasks.csv"
    path.write_text("submitted_s,seconds,gpu_models\n0,1,t4|v100\n1,1,p100\n2,1,\n")
    mixed = SimulationConfig(trace=path, pools=(("v100", 8), ("a100", 8))).workload()
    assert [each.task.demand.gpu_models for each in mixed.arrivals] == [("v100",), (), ()]
    assert dict(mixed.notes)["GPU types missing, so any will do"] == 1
    single = SimulationConfig(trace=path, gpu_model="t4").workload()
    assert [each.task.demand.gpu_models for each in single.arrivals] == [("t4",), (), ()]


def test_batch_jobs_run_as_long_as_they_did_whatever_the_cluster_has(tmp_path):
    path = written(tmp_path, "log.swf", SWF)
    config = SimulationConfig(trace=path, nodes=2, gpu_model="t4", profile="fifo", forecaster="none")
    assert simulate(config).summary.completion["all"].count == 3
    assert config.hardware().speed("t4") == 1.0
    assert SimulationConfig(trace=path, gpu_model="t4", reference_gpu="a100").hardware().speed("t4") < 0.5
    own = written(tmp_path, "own.csv", "submitted_s,seconds\n0,1\n")
    assert SimulationConfig(trace=own, gpu_model="t4").hardware().speed("t4") < 0.5
    with pytest.raises(ConfigError, match="reference_gpu: unknown 'k80'"):
        SimulationConfig(trace=path, reference_gpu="k80")


def test_a_named_format_wins_over_what_the_file_looks_like(tmp_path):
    path = written(tmp_path, "log.swf", SWF)
    with pytest.raises(WorkloadError, match="column 'job_id' is missing"):
        SimulationConfig(trace=path, trace_format="helios").workload()
    with pytest.raises(ConfigError, match=r"trace_format: unknown 'slurm'; known are gentd26"):
        SimulationConfig(trace=path, trace_format="slurm")


def test_the_philly_slice_reads_as_the_papers_count_it():
    path = TRACES / "philly" / "philly_2017-10_2017-11.csv.gz"
    if not path.exists():
        pytest.skip("the Philly slice is not at shared/traces/philly beside the repository")
    workload = read(path)
    assert len(workload.arrivals) == 68_503
    assert len({each.task.tenant for each in workload.arrivals}) == 11
    assert all(each.task.demand.gpus <= 8 for each in workload.arrivals)


def test_openb_pods_read_from_the_published_list():
    path = TRACES / "openb" / "openb_pod_list_default.csv.gz"
    if not path.exists():
        pytest.skip("the openb trace is not at shared/traces/openb beside the repository")
    workload = read(path)
    notes = dict(workload.notes)
    assert len(workload.arrivals) + notes["skipped: asks for no GPU"] + notes["skipped: was never scheduled"] == 8_152
