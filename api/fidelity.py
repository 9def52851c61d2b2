"""Runs a drawn workload on real executors on this machine: scheduler, gateway and agents, as `aigc up` would start them.

What it gives back is the scheduler's journal; `sim.fidelity` compares it with what the simulator says.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from api.cli.client import GatewayClient
from api.platform import AgentPlan, local_platform
from api.settings import load_settings
from api.sm.journal import read_journal
from api.supervisor import PartFailed
from engine import profiles
from engine.journal import Record
from engine.tasks import SECOND
from sim.fidelity import DrawnJob, FidelityReport, Run, draw_jobs, judge, observe

TERMINAL = frozenset({"finished", "cancelled", "rejected", "dead"})
_SENDERS = 4
_POLL_S = 0.2
_PATIENCE_S = 120.0
"""How long after the last submission a run may take beyond all its work done one after the other."""

_CALIBRATION_SEEDS = 1_000_000
"""Added to the seed for the calibrating runs, so that they never share a draw with the judged one."""

Progress = Callable[[float, str], None]


class RealRunFailed(RuntimeError):
    """The real run did not come to its end; the message says where it stands and where the logs are."""


def compare_here(
    workload: str,
    *,
    tasks: int,
    calibration_tasks: int,
    nodes: int,
    load: float,
    profile: str,
    seed: int,
    replications: int,
    on_progress: Progress | None = None,
) -> FidelityReport:
    """Run a workload for real on this machine and judge the simulator by it.

    Half of the calibrating tasks run before the judged run and half after it, each on a platform of its own: what changes on the
    machine meanwhile is then not taken for a fault of the simulator. They begin when every node has finished a task: those that
    wait for the first Pods would all run at once afterwards, each slower than at the load that was asked for.

    Raises `sim.fidelity.FidelityError`, `sim.calibration.CalibrationError`, `engine.profiles.InvalidProfile`, RealRunFailed.
    """
    path = Path(profile)
    named = path.suffix == ".toml" and path.is_file()
    known = profiles.load(path.read_text(encoding="utf-8") if named else profile)
    used = str(path.resolve()) if named else profile
    half = max(2, calibration_tasks // 2)
    ahead = draw_jobs(workload, half, nodes, load, seed + _CALIBRATION_SEEDS)
    before = run_real(ahead, nodes, used, _part(on_progress, 0.0, 0.15, "calibrating"), standing=True)
    seen = observe(before.records).tasks
    runs = [task.finished - task.started for task in seen[nodes:] or seen]
    # How long pictures take depends on the machine: only now can their arrivals be set for the load that was asked for.
    mean_s = sum(runs) / len(runs) / SECOND if runs and workload == "tiny" else None
    jobs = draw_jobs(workload, tasks, nodes, load, seed, mean_s)
    busy = os.getloadavg()[0]
    judged = run_real(jobs, nodes, used, _part(on_progress, 0.15, 0.8, "judged run"))
    busy = max(busy, os.getloadavg()[0])
    behind = draw_jobs(workload, half, nodes, load, seed + 2 * _CALIBRATION_SEEDS, mean_s)
    after = run_real(behind, nodes, used, _part(on_progress, 0.8, 0.95, "calibrating"), standing=True)
    about = Run(workload, known, seed, nodes, load, os.cpu_count() or 1, busy)
    calibrating = [*before.records, *after.records]
    return judge(about, calibrating, judged.records, replications, _part(on_progress, 0.95, 1.0, "simulating"))


def _part(on_progress: Progress | None, low: float, high: float, what: str) -> Progress | None:
    if on_progress is None:
        return None
    report = on_progress

    def part(share: float, note: str) -> None:
        report(low + (high - low) * share, f"{what}: {note}")

    return part


@dataclass(frozen=True, slots=True)
class RealRun:
    """What real executors made of a workload."""

    records: list[Record]
    states: dict[str, int]
    """Jobs by their state at the end."""


def run_real(
    jobs: Sequence[DrawnJob], nodes: int, profile: str, on_progress: Progress | None = None, *, standing: bool = False
) -> RealRun:
    """Run jobs at their moments on `nodes` agents with one CPU slot each; raises RealRunFailed.

    From a cold start, or, `standing`, when the first jobs have run, one on each node at the same time.
    """
    with tempfile.TemporaryDirectory(prefix="fidelity-") as home:
        state = Path(home) / "state"
        with _platform(state, nodes, profile) as client:
            states: dict[str, str] = {}
            if standing:
                states = _play(client, [replace(job, at_s=0.0) for job in jobs[:nodes]])
                jobs = [replace(job, at_s=job.at_s - jobs[nodes].at_s) for job in jobs[nodes:]]
            states |= _play(client, jobs, on_progress)
        _, records = read_journal(state / "journal.db", from_start=True)
    counted: dict[str, int] = {}
    for value in states.values():
        counted[value] = counted.get(value, 0) + 1
    return RealRun(records, counted)


@contextmanager
def _platform(state: Path, nodes: int, profile: str) -> Iterator[GatewayClient]:
    """Run a platform with so many single-slot nodes on free ports, without a limit on requests."""
    state.mkdir(parents=True)
    config = state.parent / "aigc.toml"
    text = profile.replace("\\", "\\\\").replace('"', '\\"')
    config.write_text(
        "[gateway]\nrate_per_second = 10000\nburst = 100000\nmax_concurrent = 1000\nhost = '127.0.0.1'\nport = 0\n"
        f'[scheduler]\nprofile = "{text}"\nbind = "tcp://127.0.0.1:0"\ninternal_port = 0\n'
    )
    settings = load_settings(config, state_dir=state)
    plans = [AgentPlan(f"node-{number}", "cpu:1") for number in range(nodes)]
    supervisor, settings = local_platform(settings, plans, lambda line: None, config)
    try:
        try:
            supervisor.start()
        except PartFailed as error:
            raise RealRunFailed(str(error)) from error
        yield GatewayClient(settings.gateway_url(), (state / "operator.key").read_text().strip(), state)
    finally:
        supervisor.stop()


def _play(client: GatewayClient, jobs: Sequence[DrawnJob], on_progress: Progress | None = None) -> dict[str, str]:
    began = time.monotonic()
    sent: list[Future[Any]] = []
    with ThreadPoolExecutor(_SENDERS) as senders:
        for job in jobs:
            delay = began + job.at_s - time.monotonic()
            if delay > 0:
                time.sleep(delay)
            sent.append(senders.submit(_send, client, job))
            if on_progress is not None:
                on_progress(0.9 * len(sent) / len(jobs), f"{len(sent)} of {len(jobs)} submitted")
        names = [future.result() for future in sent]
    states: dict[str, str] = {}
    deadline = time.monotonic() + _PATIENCE_S + sum(job.expected_s for job in jobs)
    while len(states) < len(names):
        for name in names:
            if name not in states:
                state = str(client.request("GET", f"/v1/jobs/{name}")["state"])
                if state not in TERMINAL:
                    break
                states[name] = state
        if len(states) < len(names):
            if time.monotonic() > deadline:
                raise RealRunFailed(
                    f"{len(names) - len(states)} of {len(names)} jobs are not over; the machine may be overloaded"
                )
            time.sleep(_POLL_S)
        if on_progress is not None:
            on_progress(0.9 + 0.1 * len(states) / len(names), f"{len(states)} of {len(names)} over")
    return states


def _send(client: GatewayClient, job: DrawnJob) -> str:
    body = {"method": job.method, "task_type": job.task_type, "parameters": dict(job.parameters), "model": job.model}
    return str(client.request("POST", "/v1/jobs", json=body)["req_no"])
