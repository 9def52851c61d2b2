"""Fleets of the simulated world: nodes take time, fail, drain and are paid for, and other autoscalers do what theirs do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from api.cli.main import app
from engine import profiles
from engine.capacity import FleetConfigured
from engine.events import NodeDrainRequested, NodeJoined, NodeLost, TaskFinished
from engine.journal import MemoryJournal
from engine.protocol.fleet import BACKOFF_US, FleetKeeper, NodeOffer
from engine.replay import recover, replay
from engine.resources import Demand
from engine.scheduler import Engine
from engine.tasks import SECOND, TaskSpec, TaskType
from predictors.demand import DemandModel
from predictors.demand_forecaster import DemandForecaster
from predictors.forecaster import OracleForecaster
from sim.configuration import ConfigError
from sim.fleet import SimFleet, View
from sim.hardware import Hardware, cluster
from sim.study import elasticity
from sim.study.elasticity import OURS, ElasticityPlan, Run, hours_at, make_scaler, run_elasticity
from sim.study.elasticity_report import answer, json_values, render, write_html
from sim.workload import Arrival, Truth, Workload
from sim.world import SimWorld, run

OFFER = NodeOffer(6, 1, 1, 60 * SECOND, 120 * SECOND, 2.0)
HEADER = (
    "gmt_create,predict_type,predict_status,exec_time_seconds,groupId,prompt_length,negative_prompt_length,"
    "num_images_per_prompt,num_inference_steps,checkpoint_model_version_id,num_lora\n"
)


def _workload(spans: list[tuple[int, int]]) -> Workload:
    """Return tasks of 30 s, (at second, how many)."""
    arrivals = [
        Arrival(
            at * SECOND,
            TaskSpec(f"r{at}-{nth}", "t", "", TaskType.GC, "text_to_image", "m", demand=Demand(gpus=1)),
            Truth(work_us=30 * SECOND),
        )
        for at, count in spans
        for nth in range(count)
    ]
    return Workload("made up", tuple(arrivals))


class Drill:
    """One run of a fleet, and everything that was journaled."""

    def __init__(self, spans: list[tuple[int, int]], scaler=None, fail_ppm: int = 0, seed: int = 0) -> None:
        hardware = Hardware(cluster(1, 1))
        spec = hardware.nodes[0]
        workload = _workload(spans)
        self.world = SimWorld(simpy.Environment(), hardware, workload, seed, known_nodes=frozenset({spec.name}))
        self.world.nodes.clear()
        self.fleet = SimFleet(self.world, OFFER, spec, scaler=scaler, fail_ppm=fail_ppm)
        self.profile = replace(profiles.load("aigc"), warm_ahead=True)
        self.journal = MemoryJournal()
        self.engine = Engine(self.profile)
        inner = OracleForecaster({each.task.req_no: 30 * SECOND for each in workload.arrivals}, {})
        run(self.engine, self.world, self.journal, DemandForecaster(inner, DemandModel(4)))
        self.events = [event for record in self.journal.records for event in record.events]

    def count(self, kind: type) -> int:
        return sum(isinstance(event, kind) for event in self.events)


BURST = [(0, 1), (300, 12), (330, 12), (1800, 1), (2400, 1)]


def test_nodes_come_for_a_burst_and_go_after_it_and_every_task_finishes() -> None:
    made = Drill(BURST)
    finished = {event.req_no for event in made.events if isinstance(event, TaskFinished)}
    assert len(finished) == 27
    assert made.count(NodeJoined) > 2
    assert made.count(NodeLost) >= 2
    drains = [event for event in made.events if isinstance(event, NodeDrainRequested)]
    assert drains, "nodes go by draining"
    assert all(event.leaving for event in drains)
    assert made.fleet.keeper.wanted < max(nodes for _, nodes in made.fleet.sizes)
    assert not any(event.cause == "node_lost" for event in made.events if hasattr(event, "cause"))


def test_a_run_with_a_fleet_replays_and_recovers_exactly() -> None:
    made = Drill(BURST)
    assert made.count(FleetConfigured) == 1
    assert replay(made.journal.records, made.profile).difference is None
    assert recover(None, made.journal.records, made.profile).state.digest() == made.engine.state.digest()


def test_two_runs_are_the_same() -> None:
    assert Drill(BURST).journal.records == Drill(BURST).journal.records


def test_nodes_that_fail_to_start_are_asked_for_again() -> None:
    made = Drill(BURST, fail_ppm=400_000, seed=3)
    assert made.world.counts["nodes_failed_to_start"] > 0
    assert len({event.req_no for event in made.events if isinstance(event, TaskFinished)}) == 27


def test_what_is_paid_is_the_time_from_asking_until_gone() -> None:
    fixed = Drill([(0, 1), (3570, 1)], scaler=lambda view: 1)
    hours = fixed.world.now() / SECOND / 3600
    assert fixed.fleet.node_hours(fixed.world.now()) == pytest.approx(hours)
    burst = Drill(BURST)
    span = burst.world.now() / SECOND / 3600
    assert span < burst.fleet.node_hours(burst.world.now()) < OFFER.nodes_max * span


def test_the_fleet_obeys_another_autoscaler_and_then_not_the_engine() -> None:
    made = Drill(BURST, scaler=lambda view: 3)
    assert made.fleet.sizes[-1][1] == 3
    assert made.count(FleetConfigured) == 0


# --- the keeper -------------------------------------------------------------------------------------------------------


class Provider:
    """A provider that does nothing but note it."""

    def __init__(self, most: int = 4, least: int = 0) -> None:
        self.offer = NodeOffer(most, least, prefix="n")
        self.running: set[str] = set()
        self.told: set[str] = set()
        self.fell: list[str] = []

    def start(self, name: str) -> None:
        assert name not in self.running, "a name is given to one node at a time"
        self.running.add(name)
        assert len(self.running) <= self.offer.nodes_max

    def stop(self, name: str) -> None:
        assert name in self.running, "only what was started is stopped"
        self.told.add(name)

    def gone(self) -> list[str]:
        fell, self.fell = self.fell, []
        return fell

    def end(self, name: str) -> None:
        self.running.discard(name)
        self.told.discard(name)
        self.fell.append(name)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["want", "fall", "drained", "wait"]), st.integers(0, 6)), max_size=40))
def test_a_fleet_comes_to_what_is_wanted_whatever_falls_on_the_way(steps: list[tuple[str, int]]) -> None:
    provider = Provider()
    keeper = FleetKeeper(provider)
    now = 0
    for what, number in steps:
        now += SECOND
        match what:
            case "want":
                keeper.want(number, sorted(keeper.here)[:number])
            case "fall" if provider.running:
                provider.end(sorted(provider.running)[number % len(provider.running)])
            case "drained" if provider.told:
                provider.end(sorted(provider.told)[number % len(provider.told)])
            case _:
                now += number * 60 * SECOND
        keeper.turn(now)
        assert not set(keeper.here) & set(keeper.leaving)
        assert set(keeper.here) | set(keeper.leaving) == provider.running
    for name in sorted(provider.told):
        provider.end(name)
    keeper.turn(now + 400 * SECOND)
    assert len(keeper.here) == keeper.wanted
    assert not keeper.leaving


def test_a_node_that_falls_again_and_again_is_started_later_and_later() -> None:
    provider = Provider(least=1)
    keeper = FleetKeeper(provider)
    now, waits = 0, []
    keeper.turn(now)
    for _ in range(4):
        provider.end("n0")
        keeper.turn(now)
        assert not provider.running
        due = keeper.due_at()
        assert due is not None
        waits.append(due - now)
        now = due
        keeper.turn(now)
        assert provider.running == {"n0"}
    assert waits == [BACKOFF_US, 2 * BACKOFF_US, 4 * BACKOFF_US, 8 * BACKOFF_US]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"nodes_min": 5}, "nodes_min"),
        ({"nodes_max": 0}, "nodes_max"),
        ({"gpus": 0}, "gpus"),
        ({"start_us": -1}, "start_us"),
        ({"prefix": ""}, "prefix"),
    ],
)
def test_terms_that_make_no_sense_are_refused(changes: dict, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        NodeOffer(**{"nodes_max": 4, **changes})


# --- the study --------------------------------------------------------------------------------------------------------


def _view(now_s: int, nodes: int, busy: float, open_tasks: int) -> View:
    return View(now_s * SECOND, nodes, nodes, 2, busy, int(busy), open_tasks)


def test_a_utilisation_target_grows_at_once_and_shrinks_after_the_cool_down() -> None:
    scaler = make_scaler("utilisation", 0.5, OFFER, 2)
    assert scaler(_view(0, 2, 4.0, 9)) == 4
    assert scaler(_view(10, 4, 8.0, 9)) == 8
    wanted = [scaler(_view(at, 8, 2.0, 1)) for at in range(20, 400, 10)]
    assert min(wanted[:10]) >= 8
    assert wanted[-1] == 2


def test_a_queue_target_counts_open_tasks_per_gpu() -> None:
    scaler = make_scaler("queue", 1.0, OFFER, 2)
    assert scaler(_view(0, 1, 2.0, 10)) == 5
    assert scaler(_view(10, 5, 2.0, 40)) == 5, "it polls every half minute"
    assert scaler(_view(30, 5, 2.0, 40)) == 20


def test_hours_at_a_p99_lie_on_the_lower_edge_of_a_way() -> None:
    def at(hours: float, p99: float) -> Run:
        return Run("queue", 1.0, 0, hours, 0.0, p99, 0.0, 0.0, 1, 0, 0.0, 0.0, ())

    frontier = [at(20, 10), at(10, 20), at(15, 25), at(8, 30)]
    assert hours_at(frontier, 15) == (15.0, True)
    assert hours_at(frontier, 25) == (9.0, True)
    assert hours_at(frontier, 99) == (8.0, True)
    assert hours_at(frontier, 5) == (20.0, False)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        f"2024-11-{15 + number // 288} {number // 12 % 24:02d}:{number % 12 * 5:02d}:{number % 7:02d},TXT_2_IMG,SUCCEED,"
        f"{20 + number % 5 * 10},G{number % 11},10,,1,30,M{number % 3},{number % 2}"
        for number in range(864)
    ]
    path = tmp_path_factory.mktemp("trace") / "lora_request_trace.csv"
    path.write_text(HEADER + "\n".join(rows) + "\n")
    return path


def _plan(trace: Path, **changes) -> ElasticityPlan:
    values = {
        "trace": trace,
        "busy_gpus": 1.0,
        "hours": 0.4,
        "warm_days": 1,
        "seeds": 2,
        "gpus_per_node": 1,
        "nodes_max": 6,
        "start_s": 30.0,
        "cool_down_s": 60.0,
        "dials": {"fixed": (2.0,), "utilisation": (0.5,), "queue": (0.8,), OURS: (0.8,)},
    }
    return ElasticityPlan(**{**values, **changes})


def test_the_study_runs_every_way_under_the_same_requests(trace: Path, tmp_path: Path) -> None:
    shares: list[float] = []
    study = run_elasticity(_plan(trace), on_progress=lambda share, _: shares.append(share))
    assert shares[-1] == 1
    assert len(study.runs) == 8
    assert len({(run.seed, run.tasks) for run in study.runs}) == 2
    assert all(run.unfinished == 0 and run.gpu_hours > 0 for run in study.runs)
    fixed = [run for run in study.runs if run.way == "fixed"]
    assert all(run.changes_per_hour == 0 for run in fixed)
    assert {each.against for each in study.savings} == {"fixed", "utilisation", "queue"}
    assert "GPU-hours by forecast" in answer(study)
    values = json_values(study)
    assert len(values["points"]) == 4
    assert len(render(study)) == 2
    write_html(study, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2
    assert "utilisation" in page
    assert "Fleet size against demand" in page
    assert all(0 < max(run.used) <= 6 for run in study.runs)


def test_one_run_is_the_same_twice(trace: Path) -> None:
    plan = _plan(trace)
    assert elasticity.run_one(plan, OURS, 0.8, 1) == elasticity.run_one(plan, OURS, 0.8, 1)


def test_a_study_goes_on_from_the_runs_that_it_kept(trace: Path, tmp_path: Path) -> None:
    store = tmp_path / "runs.jsonl"
    plan = _plan(trace, seeds=1, dials={"queue": (0.8,), OURS: (0.8,)})
    whole = run_elasticity(plan, store=store)
    lines = store.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    store.write_bytes(lines[0] + lines[1][:40])
    ran: list[str] = []
    again = run_elasticity(plan, on_progress=lambda _, what: ran.append(what), store=store)
    assert again.runs == whole.runs
    assert len(ran) == 1, "only the run whose line was cut off is run again"
    run_elasticity(plan, on_progress=lambda _, what: ran.append(what), store=store)
    assert len(ran) == 1
    other = _plan(trace, seeds=1, start_s=40.0, dials={OURS: (0.8,)})
    run_elasticity(other, on_progress=lambda _, what: ran.append(what), store=store)
    assert len(ran) == 2, "runs of another plan are not this plan's"


def test_a_store_that_is_something_else_is_refused(trace: Path, tmp_path: Path) -> None:
    store = tmp_path / "notes.txt"
    store.write_text("hello\nworld\n")
    with pytest.raises(ConfigError, match="store: line 1"):
        run_elasticity(_plan(trace), store=store)
    with pytest.raises(ConfigError, match="store: cannot"):
        run_elasticity(_plan(trace), store=tmp_path)
    with pytest.raises(ConfigError, match="store: cannot write"):
        run_elasticity(_plan(trace), store=tmp_path / "nowhere" / "runs.jsonl")


def test_what_comes_while_the_beginning_settles_is_not_judged(trace: Path) -> None:
    whole = elasticity.run_one(_plan(trace, settle_s=0.0), "queue", 0.8, 0)
    later = elasticity.run_one(_plan(trace, settle_s=900.0), "queue", 0.8, 0)
    assert 0 < later.tasks < whole.tasks
    assert 0 < later.gpu_hours < whole.gpu_hours
    assert later.sizes == whole.sizes
    with pytest.raises(ConfigError, match="settle_s: no task"):
        elasticity.run_one(_plan(trace, settle_s=1439.9), "queue", 0.8, 0)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"settle_s": -1.0}, "settle_s"),
        ({"settle_s": 1440.0}, "settle_s"),
        ({"seeds": 0}, "seeds"),
        ({"hours": 0.0}, "hours"),
        ({"dials": {"oracle": (1.0,)}}, "ways"),
        ({"dials": {"queue": ()}}, "ways"),
        ({"fail_ppm": 1_000_000}, "fail_ppm"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(trace: Path, changes: dict, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        _plan(trace, **changes)


def test_the_command_prints_what_it_found_and_names_what_is_wrong(trace: Path) -> None:
    arguments = ["study", "elasticity", "--trace", str(trace), "--hours", "0.5", "--warm-days", "1", "--seeds", "1"]
    arguments += ["--busy-gpus", "1", "--gpus-per-node", "1", "--nodes-max", "4"]
    found = CliRunner().invoke(app, [*arguments, "--ways", "forecast=0.8;queue=0.8"])
    assert found.exit_code == 0, found.stderr
    assert "GPU-hours by forecast against the best reactive way" in found.stdout
    for more, message in (("queue", "--ways"), ("guess=1", "ways: unknown"), ("queue=x", "--ways")):
        wrong = CliRunner().invoke(app, [*arguments, "--ways", more])
        assert wrong.exit_code == 2
        assert message in wrong.stderr
