"""Helios (Hu et al., SC 2021, and its artifact): virtual clusters of the Philly trace, and the semantics second by second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.jobs import Jobs, from_workload, make_jobs, simulate_jobs
from sim.jobs.helios import HELIOS_POLICIES, read_clusters, reproduce
from sim.jobs.philly import read_philly
from sim.readers import registry
from sim.workload import WorkloadError

PHILLY = Path(__file__).resolve().parents[3] / "shared" / "traces" / "philly"
KNOWN = {"11cb48": (3110.7, 241.0), "2869ce": (97749.2, 11343.4), "103959": (24783.5, 246.2)}
"""Mean completion and mean waiting under FIFO, in seconds, of three virtual clusters as the artifact's simulator gave them."""


@pytest.fixture(scope="module")
def philly() -> Jobs:
    path = PHILLY / "philly_2017-10_2017-11.csv.gz"
    if not path.exists():
        pytest.skip("the Philly slice is not at shared/traces/philly beside the repository")
    return read_philly(path)


def test_fifo_on_three_virtual_clusters_is_the_artifacts_to_a_tenth_of_a_second(philly) -> None:
    clusters = read_clusters(PHILLY / "philly_vc.csv")
    found = {row.vc: row for row in reproduce(philly, clusters, "fifo")}
    for vc, (completion, waiting) in KNOWN.items():
        assert found[vc].mean_completion_s == pytest.approx(completion, abs=0.05001)
        assert found[vc].mean_waiting_s == pytest.approx(waiting, abs=0.05001)
    assert found["all"].jobs == 68_503
    assert sum(row.refused for row in found.values()) == 0


def test_shortest_first_shortens_waiting_and_leaves_run_times_alone(philly) -> None:
    clusters = read_clusters(PHILLY / "philly_vc.csv")
    fifo, sjf = ({row.vc: row for row in reproduce(philly, clusters, policy)} for policy in HELIOS_POLICIES)
    for vc in clusters:
        assert sjf[vc].mean_waiting_s <= fifo[vc].mean_waiting_s + 0.01
        running = fifo[vc].mean_completion_s - fifo[vc].mean_waiting_s
        assert sjf[vc].mean_completion_s - sjf[vc].mean_waiting_s == pytest.approx(running, abs=1e-6)


def _second_by_second(jobs: Jobs, nodes: int, policy: str) -> list[int]:
    """Tick through every second as the artifact does: ends, then arrivals, then the line up to the first that does not fit."""
    seconds = [(int(a) // 1_000_000, int(b) // 1_000_000) for a, b in zip(jobs.submit_us, jobs.run_us, strict=True)]
    free, start = [8] * nodes, [-1] * len(jobs)
    line: list[int] = []
    held: dict[int, list[tuple[int, int]]] = {}
    now = 0
    while min(start) < 0:
        for job in [job for job in held if start[job] + seconds[job][1] == now]:
            for node, gpus in held.pop(job):
                free[node] += gpus
        line += [job for job in range(len(jobs)) if seconds[job][0] == now]
        line.sort(key=lambda job: seconds[job][1] if policy == "sjf" else seconds[job][0])
        while line:
            pieces = _consolidated(int(jobs.gpus[line[0]]), free)
            if pieces is None:
                break
            job = line.pop(0)
            start[job], held[job] = now, pieces
            for node, gpus in pieces:
                free[node] -= gpus
        now += 1
    return start


def _consolidated(gpus: int, free: list[int]) -> list[tuple[int, int]] | None:
    if gpus <= 8:
        fitting = sorted((amount, node) for node, amount in enumerate(free) if amount >= gpus)
        return [(fitting[0][1], gpus)] if fitting else None
    by_room = sorted(range(len(free)), key=lambda node: (-free[node], node))
    wanted = [8] * (gpus // 8) + ([gpus % 8] if gpus % 8 else [])
    if len(by_room) < len(wanted) or any(free[node] < amount for node, amount in zip(by_room, wanted, strict=False)):
        return None
    return list(zip(by_room, wanted, strict=False))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 25), st.sampled_from([1, 1, 2, 3, 4, 8, 11, 12, 16, 20, 24])),
        min_size=1, max_size=40,
    ),
    nodes=st.integers(3, 4),
    policy=st.sampled_from(HELIOS_POLICIES),
)  # fmt: skip
def test_jumping_from_event_to_event_is_ticking_through_every_second(rows, nodes, policy) -> None:
    rows.sort(key=lambda row: row[0])
    jobs = make_jobs(*zip(*rows, strict=True))
    result = simulate_jobs(jobs, nodes, 8, policy)
    assert (result.start_us // 1_000_000).tolist() == _second_by_second(jobs, nodes, policy)


def test_a_job_larger_than_its_virtual_cluster_is_counted_and_left_out() -> None:
    jobs = make_jobs([0, 1, 2], [10, 10, 10], [8, 9, 8], tenant=["v", "v", "v"])
    (row, everyone) = reproduce(jobs, {"v": 1, "unused": 4}, "fifo")
    assert (row.jobs, row.refused, row.waited) == (3, 1, 1)
    assert row.mean_waiting_s == (0 + 8) / 2
    assert (everyone.vc, everyone.nodes, everyone.mean_waiting_s) == ("all", 1, 4.0)


def test_what_cannot_be_reproduced_names_the_field_and_the_remedy(tmp_path) -> None:
    jobs = make_jobs([0], [10], [1], tenant=["v"])
    with pytest.raises(WorkloadError, match="policy: unknown 'srtf'; known are fifo, sjf"):
        reproduce(jobs, {"v": 1}, "srtf")
    with pytest.raises(WorkloadError, match="clusters: virtual cluster 'v' of the trace is not listed"):
        reproduce(jobs, {"w": 1})
    with pytest.raises(WorkloadError, match="trace: holds fractions of seconds"):
        reproduce(make_jobs([0.5], [10], [1], tenant=["v"]), {"v": 1})
    for text, message in (
        ("vc,node num\n,3\n", "line 2, vc: is missing"),
        ("vc,node num\na,x\n", "line 2, node num: 'x' is no whole number"),
        ("vc,node num\na,1\na,2\n", "line 3, vc: 'a' occurs twice"),
        ("vc,node num\n", "names no virtual cluster"),
    ):
        path = tmp_path / "clusters.csv"
        path.write_text(text)
        with pytest.raises(WorkloadError, match=message):
            read_clusters(path)
    with pytest.raises(WorkloadError, match="clusters: cannot read"):
        read_clusters(tmp_path / "absent.csv")


def test_columns_that_other_tables_use_are_understood(tmp_path) -> None:
    path = tmp_path / "clusters.csv"
    path.write_text("vc,nodes\nb,2\na,10\n")
    assert read_clusters(path) == {"b": 2, "a": 10}
    assert np.array(list(read_clusters(path).values())).sum() == 12


HEADER = "vc,gpu_num,submit_time,duration_s\n"


@pytest.mark.parametrize(
    "rows",
    [
        "a,1,2017-10-01 00:00:45,30\nb,2,2017-10-01 00:00:40,61.5\na,0,2017-10-01 00:01:00,5\na,8,2017-10-01 00:00:45,0\n",
        "a,1,2017-10-01 00:00:45,30\n\nb,2,2017-10-01 00:00:50,61\n",
        " a,1,2017-10-01T00:00:45,30\nb,2,2017-10-01 00:00:50,61\n",
    ],
)
def test_the_column_reader_reads_what_the_trace_reader_reads(rows, tmp_path) -> None:
    path = tmp_path / "slice.csv"
    path.write_text(HEADER + rows)
    fast, slow = read_philly(path), from_workload(registry.read(path))
    for column in ("submit_us", "run_us", "gpus", "estimate_us", "tenant"):
        assert getattr(fast, column).tolist() == getattr(slow, column).tolist(), column
    assert (fast.names, fast.tenants) == (slow.names, slow.tenants)


def test_a_broken_row_of_a_slice_is_named(tmp_path) -> None:
    path = tmp_path / "slice.csv"
    path.write_text(HEADER + "a,1,2017-10-01 00:00:45,30\na,one,2017-10-01 00:00:45,30\n")
    with pytest.raises(WorkloadError, match="line 3, gpu_num"):
        read_philly(path)
