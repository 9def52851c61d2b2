"""Whole runs: the same seed gives the same decisions, profiles meet the same luck, and failures lose no task."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from engine.commands import Notify, StartTask
from engine.events import TaskFinished, TaskStarted, TaskSubmitted
from engine.tasks import SECOND, TERMINAL_STATES, FailureCause
from sim.configuration import ConfigError
from sim.faults import Fault, FaultKind
from sim.simulate import SimulationConfig, compare, render_table, simulate, write_html, write_json
from sim.synthetic import SyntheticConfig
from sim.workload import WorkloadError

PROFILES = ("fifo", "kube-default", "aigc")
SMALL = SimulationConfig(synthetic_tasks=300, nodes=2, gpus_per_node=2, rate_scale=30, forecaster="none", seed=7)


def changed(**fields) -> SimulationConfig:
    from dataclasses import replace

    return replace(SMALL, **fields)


class Keeper:
    """A journal in memory."""

    def __init__(self) -> None:
        self.records = []

    def __call__(self, now, events, commands) -> None:
        self.records.append((now, tuple(events), tuple(commands)))

    def events(self, kind):
        return [(now, event) for now, events, _ in self.records for event in events if isinstance(event, kind)]

    def commands(self, kind):
        return [(now, order) for now, _, orders in self.records for order in orders if isinstance(order, kind)]


@pytest.mark.parametrize("forecaster", ["online", "declared", "oracle", "none"])
def test_equal_configurations_give_equal_results(forecaster):
    config = changed(forecaster=forecaster, profile="aigc")
    one, two = simulate(config).to_json(), simulate(config).to_json()
    for result in (one, two):
        del result["wall_s"], result["tasks_per_s"]
    assert json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True)


def test_another_seed_gives_other_decisions():
    assert simulate(SMALL).decisions_digest != simulate(changed(seed=8)).decisions_digest


def test_decisions_do_not_depend_on_the_hash_seed():
    script = (
        "from sim.simulate import SimulationConfig, simulate;"
        "print(simulate(SimulationConfig(synthetic_tasks=120, nodes=2, gpus_per_node=2, rate_scale=30)).decisions_digest)"
    )
    root = Path(__file__).resolve().parents[2]
    digests = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, cwd=root
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1


def test_profiles_meet_the_same_arrivals_failures_and_run_times():
    runs = {}
    for profile in PROFILES:
        keeper = Keeper()
        simulate(changed(profile=profile, attempt_crash_ppm=20_000), journal=keeper)
        arrivals = [(now, event.task.req_no) for now, event in keeper.events(TaskSubmitted)]
        run_times = {(event.req_no, event.attempt): event.run_us for _, event in keeper.events(TaskFinished)}
        runs[profile] = (arrivals, run_times)
    fifo, kube, aigc = (runs[profile] for profile in PROFILES)
    assert fifo[0] == kube[0] == aigc[0]
    for other in (kube[1], aigc[1]):
        assert other.keys() == fifo[1].keys()
        assert all(run_us == fifo[1][key] for key, run_us in other.items())


@pytest.mark.parametrize("profile", PROFILES)
def test_no_accepted_task_is_lost_when_nodes_gpus_and_pods_fail(profile):
    keeper = Keeper()
    config = changed(
        profile=profile,
        mtbf_hours=0.5,
        mttr_minutes=5,
        gpu_mtbf_hours=2,
        gpu_mttr_minutes=10,
        attempt_crash_ppm=30_000,
        faults=(
            Fault(400 * SECOND, FaultKind.PODS_CRASHED, "node-0"),
            Fault(500 * SECOND, FaultKind.NODE_LOST, "node-0", repair_after_us=60 * SECOND),
            Fault(505 * SECOND, FaultKind.NODE_LOST, "node-1", repair_after_us=5 * SECOND),
            Fault(700 * SECOND, FaultKind.GPU_ILL, "node-1", "node-1-gpu-0", repair_after_us=300 * SECOND),
        ),
    )
    result = simulate(config, journal=keeper)
    assert result.world["node_failures"] >= 2
    assert result.world["gpu_failures"] >= 1
    assert result.summary.ends["open"] == 0
    ends = [order.req_no for _, order in keeper.commands(Notify) if order.state in TERMINAL_STATES]
    assert sorted(ends) == sorted({event.task.req_no for _, event in keeper.events(TaskSubmitted)})
    assert result.summary.counts["restarts"] > 0


def test_an_attempt_starts_once_and_only_after_it_was_ordered():
    keeper = Keeper()
    simulate(changed(mtbf_hours=1.0, mttr_minutes=5), journal=keeper)
    ordered = {(order.req_no, order.attempt) for _, order in keeper.commands(StartTask)}
    started = [(event.req_no, event.attempt) for _, event in keeper.events(TaskStarted)]
    assert len(started) == len(set(started))
    assert set(started) <= ordered


def test_a_run_can_be_cut_at_a_simulated_time():
    result = simulate(changed(until_hours=0.2))
    assert result.simulated_s == pytest.approx(720)
    assert result.summary.counts["submitted"] < 300


def test_tasks_that_want_more_memory_than_they_may_have_fail_and_are_given_more(tmp_path):
    path = tmp_path / "mine.jsonl"
    row = {
        "submitted_s": 1,
        "seconds": 10,
        "model": "m",
        "gpu_memory_gib": 14,
        "gpu_share": 500,
        "images": 4,
        "width": 1024,
        "height": 1024,
    }
    path.write_text(json.dumps(row) + "\n")
    result = simulate(changed(trace=path, profile="aigc"))
    assert result.summary.failures.get(FailureCause.OUT_OF_MEMORY.value, 0) >= 1
    assert result.summary.ends["finished"] == 1


def test_customers_that_cancel_get_no_result(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("submitted_s,seconds,cancel_after_s\n1,100,20\n1,100,\n")
    result = simulate(changed(trace=path, nodes=1, gpus_per_node=1))
    assert result.summary.ends["cancelled"] == 1
    assert result.summary.ends["finished"] == 1


def test_adapters_are_loaded_once_while_their_pod_lives():
    separate = changed(
        synthetic=SyntheticConfig(tasks=150, lora_share=1.0, loras=3, models=1, separate_lora_loads=True), nodes=1
    )
    world = simulate(separate).world
    assert 0 < world["lora_loads"] < 100


def test_tasks_that_no_gpu_can_hold_are_rejected_and_not_left_waiting():
    result = simulate(changed(gpu_model="v100", synthetic_tasks=50))
    assert result.summary.ends["rejected"] == 50


def test_tasks_that_share_gpus_leave_more_of_them_free():
    whole, half = (simulate(changed(gpu_share=share, synthetic_tasks=100)).summary for share in (1000, 500))
    assert half.gpu["busy_hours"] == pytest.approx(whole.gpu["busy_hours"] / 2, rel=0.01)
    assert half.waiting["all"].mean < whole.waiting["all"].mean


def test_a_faster_gpu_shortens_the_work():
    slow = simulate(changed(gpu_model="a100")).summary.gpu["busy_hours"]
    fast = simulate(changed(gpu_model="h100")).summary.gpu["busy_hours"]
    assert fast < 0.6 * slow


@pytest.mark.parametrize("gpu_model", ["a100", "h100", "v100"])
def test_an_oracle_is_right_on_every_gpu_model(gpu_model):
    config = changed(forecaster="oracle", gpu_model=gpu_model, gpu_memory_gib=8, family="sd15", synthetic_tasks=100)
    coverage = simulate(config).summary.coverage
    assert coverage["count"] > 90
    assert coverage["median_relative_error"] < 0.01


def test_online_predictions_hold_about_as_often_as_they_promise():
    result = simulate(changed(synthetic_tasks=2_000, forecaster="online", nodes=8))
    coverage = result.summary.coverage
    assert 0.85 <= coverage["within_p90"] <= 0.95
    assert coverage["within_p50"] < coverage["within_p90"] < coverage["within_p99"]


def test_reports_show_every_profile_and_need_no_network(tmp_path):
    results = compare(changed(synthetic_tasks=120), PROFILES)
    assert [result.profile for result in results] == list(PROFILES)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render_table(results))
    text = console.export_text()
    assert all(profile in text for profile in PROFILES)
    assert "priority urgent" in text
    write_html(results, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 5
    assert not re.search(r'(src|href)="https?:', page)
    write_html(results, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page
    write_json(results, tmp_path / "results.json")
    data = json.loads((tmp_path / "results.json").read_text())
    assert [run["profile"] for run in data] == list(PROFILES)
    assert data[0]["seed"] == 7
    assert data[0]["workload"]["digest"] == data[2]["workload"]["digest"]
    assert data[0]["config_hash"] != data[2]["config_hash"]


def test_progress_ends_at_one_and_never_goes_back():
    seen = []
    compare(SMALL, ["fifo", "aigc"], lambda share, text: seen.append((share, text)))
    shares = [share for share, _ in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert seen[-1][1].startswith("aigc: ")


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"nodes": 0}, "nodes"),
        ({"gpu_model": "abacus"}, "gpu_model"),
        ({"forecaster": "psychic"}, "forecaster"),
        ({"rate_scale": 0.0}, "rate_scale"),
        ({"mtbf_hours": -1.0}, "mtbf_hours"),
        ({"limit": 0}, "limit"),
        ({"urgent_share": 2.0}, "urgent_share"),
        ({"family": "monet"}, "family"),
        ({"gpu_share": 0}, "gpu_share"),
        ({"gpu_memory_gib": -1.0}, "gpu_memory_gib"),
        ({"slots": 0}, "slots"),
        ({"trace": Path("a.csv"), "synthetic": SyntheticConfig()}, "trace, synthetic"),
    ],
)
def test_an_impossible_configuration_is_refused_by_field(fields, names):
    with pytest.raises(ConfigError, match=f"^{names}:"):
        changed(**fields)


def test_unknown_profiles_nodes_and_files_are_named():
    with pytest.raises(ValueError, match="nonsense"):
        simulate(changed(profile="nonsense"))
    with pytest.raises(ConfigError, match="compare"):
        compare(SMALL, [])
    with pytest.raises(ValueError, match="node 'mars'"):
        simulate(changed(faults=(Fault(1, FaultKind.NODE_LOST, "mars"),)))
    with pytest.raises(WorkloadError, match=r"gone\.csv"):
        simulate(changed(trace=Path("gone.csv")))


def test_with_steps_the_scheduler_decides_only_at_multiples_of_them() -> None:
    seen: list[tuple[int, int]] = []
    config = SimulationConfig(synthetic_tasks=200, nodes=1, rate_scale=500, step_ms=20, forecaster="none")
    in_steps = simulate(config, journal=lambda now, events, commands: seen.append((now, len(events))))
    assert all(now % 20_000 == 0 for now, events in seen if events)
    assert in_steps.summary.ends["finished"] == simulate(replace(config, step_ms=0)).summary.ends["finished"]
    assert max(events for _, events in seen) > 1


def test_a_step_of_no_sensible_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="step_ms"):
        SimulationConfig(step_ms=-1)
