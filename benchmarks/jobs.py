"""Batch jobs a second: the fast job core beside AccaSim, in one run on the same workload, and what it costs at scale.

    python -m benchmarks.jobs --setup DIR          # makes AccaSim's own environment
    python -m benchmarks.jobs --environments DIR   # measures; without it AccaSim is left out

AccaSim is measured from its log to its written schedule; ours from the log to every metric. Start times are compared job by job.
The Philly slice is read from `--philly`, or from shared/traces beside the repository.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# A benchmark of this folder is called as the package `engine` is: the repository's root must come before the folder.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.machine import machine_line  # noqa: E402
from sim.jobs import Jobs, JobsResult, make_jobs, simulate_jobs  # noqa: E402
from sim.jobs.helios import read_clusters  # noqa: E402
from sim.jobs.philly import read_philly  # noqa: E402
from sim.jobs.swf import read_swf  # noqa: E402

PHILLY = ROOT.parent / "shared" / "traces" / "philly" / "philly_2017-10_2017-11.csv.gz"
NODES, CORES = 60, 4
CASES = {
    "FIFO first fit": ("fifo", {"policy": "fifo", "backfill": "none", "placement": "first-fit"}),
    "EASY": ("easy", {"policy": "fifo", "backfill": "accasim", "placement": "first-fit"}),
    "EASY, textbook": ("", {"policy": "fifo", "backfill": "easy", "placement": "first-fit"}),
    "SJF best fit": ("sjf", {"policy": "shortest-estimate", "backfill": "none", "placement": "best-fit"}),
}
"""Our arguments for each case, and AccaSim's name for it."""
_WALL_LIMIT_S = 540

# AccaSim 1.1.3 was written for a Python whose `collections` still had the abstract classes; so they are put back first.
_ACCASIM = """
import collections, collections.abc, json, os, sys, time
for name in ("Mapping", "MutableMapping", "Sequence", "Iterable"):
    setattr(collections, name, getattr(collections.abc, name))
from accasim.base.allocator_class import BestFit, FirstFit
from accasim.base.scheduler_class import EASYBackfilling, FirstInFirstOut, ShortestJobFirst
from accasim.base.simulator_class import Simulator
log, system, kind, folder = sys.argv[1:5]
dispatcher = {"fifo": lambda: FirstInFirstOut(FirstFit()), "easy": lambda: EASYBackfilling(FirstFit()),
              "sjf": lambda: ShortestJobFirst(BestFit())}[kind]()
cpu, wall = time.process_time(), time.perf_counter()
simulator = Simulator(log, system, dispatcher, RESULTS_FOLDER_PATH=folder, statistics_output=False, show_statistics=False)
written = simulator.start_simulation()
print("RESULT " + json.dumps({"jobs": simulator.loaded_jobs, "cpu_s": time.process_time() - cpu,
                              "wall_s": time.perf_counter() - wall, "schedule": list(written.values())[0]}))
"""


def write_swf(path: Path, jobs: int, load: float, seed: int) -> None:
    """Write a log of batch jobs for 240 processors: mostly powers of two, run times over five decades, generous limits."""
    draw = np.random.default_rng(seed)
    processors = NODES * CORES
    size = np.where(draw.random(jobs) < 0.3, draw.integers(1, 33, jobs), 2 ** draw.integers(0, 8, jobs))
    run = np.clip(np.rint(np.exp(draw.normal(6.0, 1.6, jobs))), 1, 86_400).astype(int)
    limit = np.maximum(run, np.rint(run * (1 + draw.exponential(1.5, jobs)) / 60).astype(int) * 60)
    gap = float((size * run).mean()) / processors / load
    submit = 100 + np.cumsum(draw.exponential(gap, jobs)).astype(int)
    submit[1::11] = submit[0:-1:11]  # Some come together.
    with path.open("w", encoding="utf-8") as file:
        file.write(
            f"; {jobs} jobs for {processors} processors, offered load {load}, seed {seed}; made by benchmarks/jobs.py\n"
        )
        for row in range(jobs):
            asked, who = f"{size[row]} {limit[row]} -1 1", row % 9 + 1
            file.write(f"{row + 1} {submit[row]} -1 {run[row]} {size[row]} -1 -1 {asked} {who} 1 -1 -1 -1 -1 -1\n")


# --- AccaSim ------------------------------------------------------------------------------------------------------------


def set_up(root: Path) -> None:
    """Make AccaSim's environment."""
    print(f"making {root / 'accasim'}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", root / "accasim"], check=True)
    subprocess.run(
        [root / "accasim" / "bin" / "python", "-m", "pip", "install", "--quiet", "accasim==1.1.3"], check=True
    )


def run_accasim(environments: Path | None, log: Path, kind: str) -> dict[str, Any]:
    """Run one case; return its CPU seconds and the start of every job, or what is missing."""
    python = environments / "accasim" / "bin" / "python" if environments is not None else None
    if python is None or not python.exists():
        return {"missing": "not installed: run with --setup DIR, then --environments DIR"}
    with tempfile.TemporaryDirectory(prefix="accasim-") as folder:
        system = Path(folder) / "system.json"
        system.write_text(
            json.dumps(
                {
                    "groups": {"g": {"core": CORES}},
                    "resources": {"g": NODES},
                    "equivalence": {"processor": {"core": 1}},
                }
            )
        )
        try:
            done = subprocess.run(
                [python, "-c", _ACCASIM, log, system, kind, folder],
                capture_output=True, text=True, timeout=_WALL_LIMIT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"missing": f"not done after {_WALL_LIMIT_S} s; take fewer jobs or a lower load"}
        for line in done.stdout.splitlines():
            if line.startswith("RESULT "):
                found: dict[str, Any] = json.loads(line[7:])
                found["starts"] = _starts(Path(found.pop("schedule")))
                return found
        return {"missing": f"failed: {done.stderr.strip()[-300:]}"}


def _starts(schedule: Path) -> dict[str, int]:
    """Return the start of each job, in whole seconds of the log's clock."""
    found = {}
    for line in schedule.read_text().splitlines():
        job, _, times = line.split("__")
        at = datetime.datetime.fromisoformat(times.split(";")[0]).replace(tzinfo=datetime.UTC)
        found[job.split(";")[0]] = int(at.timestamp())
    return found


def record(folder: Path, environments: Path | None) -> None:
    """Write a small log and AccaSim's start times for it: the tests' data."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "workload.swf"
    write_swf(log, 600, 0.85, seed=3)
    columns = {kind: run_accasim(environments, log, kind) for kind in ("fifo", "easy", "sjf")}
    for kind, found in columns.items():
        if "missing" in found:
            raise SystemExit(f"AccaSim, {kind}: {found['missing']}")
    lines = ["job,fifo,easy,sjf"]
    lines += [
        ",".join([job, *(str(columns[kind]["starts"][job]) for kind in columns)]) for job in map(str, range(1, 601))
    ]
    (folder / "starts.csv").write_text("\n".join(lines) + "\n")


# --- ours ---------------------------------------------------------------------------------------------------------------


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    return work(), time.process_time() - began


def beside_accasim(jobs: int, load: float, environments: Path | None) -> dict[str, Any]:
    """Run the same log through both."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="jobs-") as folder:
        log = Path(folder) / "workload.swf"
        write_swf(log, jobs, load, seed=1)
        first = int(log.read_text().splitlines()[1].split()[1])
        for case, (kind, arguments) in CASES.items():

            def whole(arguments: dict[str, Any] = arguments) -> JobsResult:
                result = simulate_jobs(read_swf(log), NODES, CORES, spread=True, **arguments)
                result.figures()
                return result

            result, cpu_s = _timed(whole)
            row: dict[str, Any] = {"ours": jobs / cpu_s, "longest_line": result.longest_line}
            if kind:
                theirs = run_accasim(environments, log, kind)
                if "missing" in theirs:
                    row["missing"] = theirs["missing"]
                else:
                    row["accasim"] = jobs / theirs["cpu_s"]
                    row["ratio"] = row["ours"] / row["accasim"]
                    starts = dict(zip(result.jobs.names, (result.start_us // 1_000_000 + first).tolist(), strict=True))
                    row["equal_starts"] = sum(starts[f"job-{job}"] == at for job, at in theirs["starts"].items())
            rows[case] = row
    return rows


def on_philly(trace: Path, clusters: Path) -> dict[str, Any]:
    """Run every virtual cluster of the Philly slice, all metrics on; what reading it once takes is told apart."""
    jobs, read_s = _timed(lambda: read_philly(trace))
    nodes = read_clusters(clusters)
    parts = [(jobs.of_tenant(name), nodes[name]) for name in jobs.tenants]
    urgent = [(_with_priorities(part), count) for part, count in parts]
    found = {}
    for name, work, arguments in (
        ("FIFO", parts, {}),
        ("SJF", parts, {"policy": "sjf"}),
        ("EASY", parts, {"backfill": "easy"}),
        ("priorities, EASY", urgent, {"policy": "priority", "backfill": "easy"}),
    ):

        def whole(work: list[tuple[Jobs, int]] = work, arguments: dict[str, Any] = arguments) -> None:
            for part, count in work:
                simulate_jobs(part, count, 8, **arguments).figures()

        _, cpu_s = _timed(whole)
        found[name] = {"jobs": len(jobs), "ours": len(jobs) / cpu_s, "with_reading": len(jobs) / (cpu_s + read_s)}
    return found


def _with_priorities(jobs: Jobs) -> Jobs:
    """Give every job one of three priorities."""
    priority = np.random.default_rng(0).integers(0, 3, len(jobs))
    return Jobs(
        jobs.submit_us, jobs.run_us, jobs.gpus, jobs.estimate_us, priority, jobs.tenant, jobs.tenants, jobs.names
    )


def _crowded(nodes: int, waiting: int, jobs: int, seed: int = 0) -> Jobs:
    """Return jobs that keep a cluster of nodes with 8 GPUs full, with so many waiting from the beginning to the last arrival."""
    draw = np.random.default_rng(seed)
    ahead = nodes * 8 // 3 + waiting
    count = ahead + jobs
    size = draw.choice([1, 2, 4, 8], count, p=[0.5, 0.2, 0.15, 0.15])
    run = np.maximum(1, np.rint(draw.exponential(600.0, count)))
    gap = 600.0 * float(size.mean()) / (nodes * 8) / 0.9
    submit = np.concatenate((np.zeros(ahead), np.cumsum(draw.exponential(gap, jobs))))
    return make_jobs(submit, run, size, estimate_s=run * draw.uniform(1, 2, count), priority=draw.integers(0, 3, count))


def by_waiting(lengths: tuple[int, ...] = (0, 150, 1_500, 15_000), jobs: int = 10_000) -> list[dict[str, Any]]:
    """Measure the cost of a decision with so many waiting, on 64 nodes of 8 GPUs."""
    rows = []
    for waiting in lengths:
        work = _crowded(64, waiting, jobs)
        row: dict[str, Any] = {"waiting": waiting}
        for name, arguments in (
            ("FIFO", {}),
            ("EASY", {"backfill": "easy"}),
            ("priorities, EASY", {"policy": "priority", "backfill": "easy"}),
        ):
            result, cpu_s = _timed(lambda work=work, arguments=arguments: simulate_jobs(work, 64, 8, **arguments))
            row[name] = cpu_s / result.decisions * 1e6
            row["longest_line"] = max(row.get("longest_line", 0), result.longest_line)
        rows.append(row)
    return rows


def curve(
    sizes: tuple[int, ...] = (10, 100, 1_000, 10_000), lengths: tuple[int, ...] = (0, 1_500, 15_000)
) -> list[dict[str, Any]]:
    """Measure events a CPU second against nodes and waiting jobs."""
    rows = []
    for nodes in sizes:
        for waiting in lengths:
            work = _crowded(nodes, waiting, 5_000)
            row: dict[str, Any] = {"nodes": nodes, "waiting": waiting, "jobs": len(work)}
            for name, arguments in (("FIFO", {}), ("EASY", {"backfill": "easy"})):
                result, cpu_s = _timed(lambda w=work, n=nodes, a=arguments: simulate_jobs(w, n, 8, **a))
                row[name] = result.events / cpu_s
            rows.append(row)
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that was asked for."""
    found: dict[str, Any] = {
        "machine": machine_line(),
        "beside_accasim": beside_accasim(options.jobs, options.load, options.environments),
    }
    clusters = options.philly.parent / "philly_vc.csv"
    if options.philly.is_file() and clusters.is_file():
        found["philly"] = on_philly(options.philly, clusters)
    else:
        found["philly_missing"] = f"{options.philly} and philly_vc.csv beside it are not there"
    if not options.short:
        found["by_waiting"] = by_waiting()
        found["curve"] = curve()
    return found


def render(found: dict[str, Any], jobs: int, load: float) -> str:
    """Return the tables."""
    lines = [f"{jobs} jobs, {NODES * CORES} processors, offered load {load}; {found['machine']}", ""]
    lines.append(f"{'jobs a CPU second':18} {'ours':>9} {'AccaSim':>9} {'ratio':>7}   equal starts   longest line")
    for case, row in found["beside_accasim"].items():
        theirs = f"{row['accasim']:9.0f} {row['ratio']:6.1f}x" if "accasim" in row else f"{'-':>9} {'-':>7}"
        equal = f"{row['equal_starts']:8d}" if "equal_starts" in row else f"{'-':>8}"
        lines.append(
            f"{case:18} {row['ours']:9.0f} {theirs}   {equal}   {row['longest_line']:10d}   {row.get('missing', '')}"
        )
    if "philly" in found:
        lines += ["", f"{'Philly slice':18} {'jobs':>9} {'jobs a CPU second':>18} {'with reading':>13}"]
        lines += [
            f"{name:18} {row['jobs']:9d} {row['ours']:18.0f} {row['with_reading']:13.0f}"
            for name, row in found["philly"].items()
        ]
    else:
        lines += ["", f"Philly slice: {found['philly_missing']}"]
    if "by_waiting" in found:
        names = ("FIFO", "EASY", "priorities, EASY")
        lines += [
            "",
            "CPU microseconds a decision, 64 nodes of 8 GPUs",
            f"{'waiting':>9} " + " ".join(f"{name:>16}" for name in names),
        ]
        lines += [
            f"{row['waiting']:9d} " + " ".join(f"{row[name]:16.1f}" for name in names) for row in found["by_waiting"]
        ]
        lines += ["", "Events a CPU second", f"{'nodes':>9} {'waiting':>9} {'FIFO':>9} {'EASY':>9}"]
        lines += [
            f"{row['nodes']:9d} {row['waiting']:9d} {row['FIFO']:9.0f} {row['EASY']:9.0f}" for row in found["curve"]
        ]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--load", type=float, default=0.6, help="offered load of the log for AccaSim, of its capacity")
    parser.add_argument("--philly", type=Path, default=PHILLY, help="the slice; philly_vc.csv lies beside it")
    parser.add_argument("--environments", type=Path, default=None, help="made by --setup")
    parser.add_argument("--setup", type=Path, default=None, metavar="DIR")
    parser.add_argument("--record", type=Path, default=None, metavar="DIR", help="write the tests' data")
    parser.add_argument("--short", action="store_true", help="leave out the curves")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.setup is not None:
        set_up(options.setup)
    elif options.record is not None:
        record(options.record, options.environments)
    else:
        found = measure(options)
        print(json.dumps(found, indent=1) if options.json else render(found, options.jobs, options.load))


if __name__ == "__main__":
    main()
