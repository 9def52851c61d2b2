"""Sweeps: the same runs on one process or several, resumed after an interruption, and never run twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sim import sweep, sweep_store
from sim.configuration import ConfigError, SimulationConfig
from sim.sweep import SweepError, grid, run_sweep
from sim.sweep_workers import work_through

CONFIG = SimulationConfig(synthetic_tasks=60, nodes=1, gpus_per_node=2, rate_scale=40, forecaster="declared")
AXES = {"seed": [0, 1], "profile": ["fifo", "aigc"]}


def _die_at_first(config, workloads):
    """Kill this process in the first try of seed 1; the profile is the folder of the mark that it was tried."""
    mark = Path(config.profile) / f"tried-{config.seed}"
    if config.seed == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"seed": config.seed}


def _die(config, workloads):
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(config, workloads):
    """Say which process this is, then never come to an end."""
    Path(config.profile).write_text(str(os.getpid()))
    signal.pause()


def _refuse(config, workloads):
    raise ValueError(f"seed {config.seed} is refused")


def test_a_grid_holds_every_combination():
    configs = grid(CONFIG, {"nodes": [1, 2], "profile": ["fifo", "aigc"]})
    assert [(each.nodes, each.profile) for each in configs] == [(1, "fifo"), (1, "aigc"), (2, "fifo"), (2, "aigc")]


@pytest.mark.parametrize(("axes", "named"), [({"node": [1]}, "'node' is no field"), ({"nodes": []}, "'nodes' has no")])
def test_a_wrong_axis_is_named(axes, named):
    with pytest.raises(ConfigError, match=named):
        grid(CONFIG, axes)


def test_one_process_and_two_give_the_same_records():
    configs = grid(CONFIG, AXES)
    alone, together = run_sweep(configs, jobs=1), run_sweep(configs, jobs=2)
    assert [each.decisions_digest for each in alone] == [each.decisions_digest for each in together]
    assert [each.summary for each in alone] == [each.summary for each in together]
    assert [each.config for each in together] == configs
    assert alone[0].decisions_digest != alone[1].decisions_digest


def test_what_is_in_the_store_is_not_run_again(tmp_path, monkeypatch):
    configs = grid(CONFIG, AXES)
    store = tmp_path / "runs.jsonl"
    first = run_sweep(configs[:3], store, jobs=1)
    ran = []
    real = sweep.run_one
    monkeypatch.setattr(sweep, "run_one", lambda config, *rest: ran.append(config) or real(config, *rest))
    second = run_sweep(configs, store, jobs=1)
    assert ran == configs[3:]
    assert [each.reused for each in second] == [True, True, True, False]
    assert [each.summary for each in second[:3]] == json.loads(json.dumps([each.summary for each in first]))


def test_an_interrupted_sweep_keeps_what_had_finished(tmp_path, monkeypatch):
    configs = grid(CONFIG, AXES)
    store = tmp_path / "runs.jsonl"
    real = sweep.run_one

    def interrupted(config, *rest):
        if config == configs[2]:
            raise KeyboardInterrupt
        return real(config, *rest)

    monkeypatch.setattr(sweep, "run_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(configs, store, jobs=1)
    kept = len(store.read_text().splitlines())
    monkeypatch.setattr(sweep, "run_one", real)
    assert 0 < kept < len(configs)
    assert sum(each.reused for each in run_sweep(configs, store, jobs=1)) == kept


def test_a_line_that_was_cut_off_is_run_again_and_the_rest_is_kept(tmp_path):
    configs = grid(CONFIG, AXES)
    store = tmp_path / "runs.jsonl"
    run_sweep(configs[:2], store, jobs=1)
    store.write_bytes(store.read_bytes()[:-40])
    assert [each.reused for each in run_sweep(configs[:2], store, jobs=1)] == [True, False]
    assert [each.reused for each in run_sweep(configs[:2], store, jobs=1)] == [True, True]


def test_results_of_other_code_are_not_used(tmp_path, monkeypatch):
    store = tmp_path / "runs.jsonl"
    run_sweep([CONFIG], store, jobs=1)
    monkeypatch.setattr(sweep, "code_fingerprint", lambda: "other")
    assert not run_sweep([CONFIG], store, jobs=1)[0].reused
    assert sweep_store.Store(store, "third").passed_over == 2


def test_a_file_of_something_else_is_refused_as_a_store(tmp_path):
    store = tmp_path / "notes.txt"
    store.write_text("dear diary\nsecond line\n")
    with pytest.raises(ConfigError, match=r"line 1 of .*notes.txt is no finished run"):
        run_sweep([CONFIG], store, jobs=1)
    assert store.read_text() == "dear diary\nsecond line\n"


def test_the_key_follows_what_the_files_hold(tmp_path):
    profile = tmp_path / "mine.toml"
    profile.write_text('name = "mine"\n[ordering]\npolicy = "fifo"\n')
    config = replace(CONFIG, profile=str(profile))
    before = sweep_store.run_key(config)
    assert before == sweep_store.run_key(config)
    profile.write_text('name = "mine"\n[ordering]\npolicy = "priority"\n')
    assert sweep_store.run_key(config) != before
    with pytest.raises(ConfigError, match="profile: cannot read"):
        sweep_store.run_key(replace(CONFIG, profile=str(tmp_path / "nowhere.toml")))


def test_equal_configurations_are_run_once(monkeypatch):
    ran = []
    real = sweep.run_one
    monkeypatch.setattr(sweep, "run_one", lambda config, *rest: ran.append(config) or real(config, *rest))
    records = run_sweep([CONFIG, CONFIG], jobs=1)
    assert len(ran) == 1
    assert records[0] == records[1]


def test_runs_with_the_same_workload_make_it_once(monkeypatch):
    made = []
    real = SimulationConfig.workload
    monkeypatch.setattr(SimulationConfig, "workload", lambda self: made.append(self.seed) or real(self))
    run_sweep(grid(CONFIG, {"profile": ["fifo", "aigc"], "nodes": [1, 2], "seed": [3, 4]}), jobs=1)
    assert sorted(made) == [3, 4]


def test_a_killed_process_is_replaced_and_its_run_tried_again(tmp_path):
    order = [(str(seed), replace(CONFIG, seed=seed, profile=str(tmp_path))) for seed in range(4)]
    found = {}
    work_through(order, _die_at_first, 2, found.__setitem__)
    assert found == {str(seed): {"seed": seed} for seed in range(4)}
    assert (tmp_path / "tried-1").exists()


def test_a_run_that_kills_its_process_twice_is_named():
    with pytest.raises(SweepError, match=r"seed 7, 1 nodes: its process ended by signal 9, twice"):
        work_through([("k", replace(CONFIG, seed=7))], _die, 2, lambda key, line: None)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_is_named_and_the_others_are_kept(jobs, tmp_path):
    store = tmp_path / "runs.jsonl"
    with pytest.raises(SweepError, match=r"profile 'nonsense', seed 0"):
        run_sweep(grid(CONFIG, {"profile": ["fifo", "nonsense"]}), store, jobs=jobs)
    assert len(store.read_text().splitlines()) == 1


def test_what_a_process_refuses_comes_back_as_its_words():
    with pytest.raises(SweepError, match="seed 0 is refused"):
        work_through([("k", CONFIG)], _refuse, 1, lambda key, line: None)


def test_progress_counts_runs_and_never_falls():
    seen = []
    run_sweep(grid(CONFIG, AXES), jobs=2, on_progress=lambda share, note: seen.append((share, note)))
    assert [share for share, _ in seen] == sorted(share for share, _ in seen)
    assert seen[0] == (0.0, "0 of 4 runs")
    assert seen[-1] == (1.0, "4 of 4 runs")
    assert any("left" in note for _, note in seen)


def test_no_job_at_all_is_refused():
    with pytest.raises(ConfigError, match="jobs"):
        run_sweep([CONFIG], jobs=0)


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    mark = tmp_path / "pid"
    order = [("k", replace(CONFIG, profile=str(mark)))]
    parent = multiprocessing.get_context("spawn").Process(target=work_through, args=(order, _hang, 1, {}.__setitem__))
    parent.start()
    _until(lambda: mark.exists() and mark.read_text())
    worker = int(mark.read_text())
    parent.kill()
    parent.join()
    _until(lambda: not _alive(worker))


def _until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_keeps_what_had_finished_and_leaves_no_process_behind(tmp_path):
    store = tmp_path / "runs.jsonl"
    command = [sys.executable, "-m", "api.cli", "sweep", "--seeds", "500", "--jobs", "2", "--store", str(store)]
    command += ["--set", "synthetic_tasks=40", "--set", "forecaster=none"]
    root = Path(__file__).resolve().parents[2]
    running = subprocess.Popen(
        command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        _until(lambda: store.exists() and store.read_bytes().count(b"\n") >= 3)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(60) == 130
    finally:
        running.kill()
        running.wait()
    assert len(children) >= 2
    _until(lambda: not any(_alive(int(child)) for child in children))
    lines = store.read_bytes().splitlines()
    assert 3 <= len(lines) < 500
    assert all(json.loads(line)["summary"] for line in lines)
