"""Forks of a journal: the world goes on where the scheduler's state stands, and changes do what they say."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import simpy

from engine import invariants, profiles, snapshot
from engine.commands import Command, Notify, StartTask
from engine.events import Event, NodeDrainRequested, NodeJoined, TaskFinished, TaskSubmitted
from engine.journal import MemoryJournal, Record
from engine.resources import Demand, GpuSpec, NodeSpec
from engine.scheduler import Engine
from engine.tasks import SECOND, TERMINAL_STATES, TaskSpec, TaskState, TaskType
from predictors.forecaster import OnlineForecaster
from sim.draws import choice, exponential, lognormal, unit
from sim.fork import Change, Fork, ForkError, Pool, changed_nodes, future_arrivals, run_forward
from sim.hardware import GPU_MODELS, Hardware
from sim.simulate import SimulationConfig, simulate
from sim.whatif import ALL, compare_futures, describe, render
from sim.workload import Arrival, Truth, Workload
from sim.world import SimWorld, run

HOUR_US = 3600 * SECOND
AIGC = profiles.load("aigc")
NODES = tuple(
    NodeSpec(
        f"n{number}", tuple(GpuSpec(f"n{number}-{gpu}", "a100", 80 << 30) for gpu in range(2)), 32_000, 1 << 40, 1 << 42
    )
    for number in range(3)
)


def production(
    load: float = 1.1, tasks: int = 400, stop_at: int = 250, seed: int = 1, and_then_s: int = 0, sigma: float = 0.4
) -> list[Record]:
    """Let a stand-in for production run 400 tasks of 20 s, and cut its journal in the middle: a queue, and six GPUs at work."""
    at, arrivals = 0.0, []
    for number in range(tasks):
        at += exponential(20 / (6 * load), seed, "gap", number)
        work_us = round(20 * SECOND * lognormal(sigma, seed, "work", number))
        task = TaskSpec(
            f"r{number}",
            ("art", "ads", "lab")[choice(3, seed, "tenant", number)],
            "",
            TaskType.GC,
            "text_to_image",
            "sd",
            priority=100 if unit(seed, "urgent", number) < 0.1 else 0,
            demand=Demand(),
            features=(("steps", 20 + 10 * choice(3, seed, "steps", number)),),
        )
        arrivals.append(Arrival(round(at * SECOND), task, Truth(work_us, peak_gpu_memory_bytes=1 << 30)))
    world = SimWorld(simpy.Environment(), Hardware(NODES), Workload("stand-in", tuple(arrivals)), seed)
    journal, forecaster = MemoryJournal(), OnlineForecaster()
    run(Engine(AIGC), world, forecaster.watching(journal), forecaster, arrivals[stop_at].at + 1 + and_then_s * SECOND)
    return journal.records


@pytest.fixture(scope="module")
def fork() -> Fork:
    return Fork.of(None, production())


class Watched:
    """A journal that checks the scheduler's state after every step, and remembers how tasks ended."""

    def __init__(self, fork: Fork) -> None:
        self.events: list[Event] = []
        self.ends: dict[str, TaskState] = {}
        self.times: list[int] = [fork.now]
        self.used: set[str] = set()
        """Nodes on which something was started."""

    def __call__(self, now: int, events: Sequence[Event], commands: Sequence[Command]) -> None:
        self.times.append(now)
        self.events += events
        self.used |= {command.node for command in commands if isinstance(command, StartTask)}
        for command in commands:
            if isinstance(command, Notify) and command.state in TERMINAL_STATES:
                assert command.req_no not in self.ends, "a task ends once"
                self.ends[command.req_no] = command.state


def live(fork: Fork) -> dict[str, TaskState]:
    return {task.req_no: task.state for task in snapshot.restore(fork.state).live_tasks()}


def test_everything_that_was_under_way_ends_in_the_fork(fork: Fork) -> None:
    there = live(fork)
    assert sum(state is TaskState.RUNNING for state in there.values()) >= 5
    assert sum(state is TaskState.PENDING for state in there.values()) >= 5
    seen = Watched(fork)
    world = run_forward(fork, Change(AIGC), seen, seed=1, window_us=0, horizon_us=0)
    assert seen.ends == dict.fromkeys(there, TaskState.FINISHED)
    assert world.open_tasks == {}
    assert seen.times == sorted(seen.times), "time never goes back before the fork"
    assert not any(isinstance(event, NodeJoined) for event in seen.events), "nodes that are there do not join again"


def test_what_runs_at_the_fork_is_not_run_again(fork: Fork) -> None:
    state = snapshot.restore(fork.state)
    running = [task for task in state.live_tasks() if task.state is TaskState.RUNNING]
    ran = {(task.req_no, task.attempt): state.now - task.started_at for task in running}
    left: dict[tuple[str, int], int] = {}

    def keep(now: int, events: Sequence[Event], commands: Sequence[Command]) -> None:
        for event in events:
            if isinstance(event, TaskFinished):
                left[event.req_no, event.attempt] = now - fork.now
                if (event.req_no, event.attempt) in ran:
                    assert event.run_us == ran[event.req_no, event.attempt] + now - fork.now

    run_forward(fork, Change(profiles.load("fifo")), keep, seed=1, window_us=0, horizon_us=0)
    assert ran.keys() <= left.keys(), "the very attempts that ran came to their end"
    assert all(5 * SECOND < ran[key] + left[key] < 90 * SECOND for key in ran), "what ran before counts"


def test_the_scheduler_s_state_stays_sound_after_the_fork(fork: Fork, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []

    class Checking(Engine):
        def step(self, now: int, events: Sequence[Event]) -> Sequence[Command]:
            commands = super().step(now, events)
            invariants.check(self.state)
            checked.append(now)
            return commands

    monkeypatch.setattr("sim.fork.Engine", Checking)
    change = Change(AIGC, add=(Pool(1, "a100"),), remove=(Pool(1, "a100"),), load=2.0)
    run_forward(fork, change, Watched(fork), seed=3, window_us=HOUR_US, horizon_us=120 * SECOND)
    assert len(checked) > 100


def test_the_same_seed_gives_the_same_future_and_another_seed_another_one(fork: Fork) -> None:
    def future(seed: int) -> list[int]:
        seen = Watched(fork)
        run_forward(fork, Change(AIGC), seen, seed=seed, window_us=HOUR_US, horizon_us=300 * SECOND)
        return seen.times

    assert future(1) == future(1)
    assert future(1) != future(2)


def test_arrivals_go_round_the_window_as_fast_as_the_load_says(fork: Fork) -> None:
    window = 600 * SECOND
    once = future_arrivals(fork, window, window, 1.0, seed=4)
    twice = future_arrivals(fork, window, window, 2.0, seed=4)
    recorded = sum(
        isinstance(event, TaskSubmitted)
        for record in fork.history
        if record.now > fork.now - window
        for event in record.events
    )
    assert abs(len(once) - recorded) <= 1
    assert abs(len(twice) - 2 * recorded) <= 2
    assert [one.task.features for one in twice[: len(once)]] == [one.task.features for one in once], (
        "the same tasks, sooner"
    )
    assert all(fork.now <= one.at <= fork.now + window for one in twice)
    assert len({one.task.req_no for one in twice}) == len(twice)
    assert future_arrivals(fork, window, window, 1.0, seed=5)[0].task.req_no != once[0].task.req_no
    assert future_arrivals(fork, 0, window, 1.0, seed=4) == []


def test_nodes_that_are_added_take_work_and_nodes_that_are_removed_take_none(fork: Fork) -> None:
    more = Change(AIGC, add=(Pool.parse("2xa100", "add_nodes"),))
    joining, leaving = changed_nodes(snapshot.restore(fork.state), more)
    assert [(node.name, len(node.gpus), node.gpus[0].model) for node in joining] == [
        ("whatif-0", 2, "a100"),
        ("whatif-1", 2, "a100"),
    ]
    assert leaving == ()
    seen = Watched(fork)
    run_forward(fork, more, seen, seed=1, window_us=HOUR_US, horizon_us=300 * SECOND)
    assert seen.used == {"n0", "n1", "n2", "whatif-0", "whatif-1"}
    assert sum(isinstance(event, NodeJoined) for event in seen.events) == 2
    less = Watched(fork)
    run_forward(fork, Change(AIGC, remove=(Pool(1, "a100"),)), less, seed=1, window_us=HOUR_US, horizon_us=300 * SECOND)
    drained = [event.node for event in less.events if isinstance(event, NodeDrainRequested)]
    assert len(drained) == 1
    assert less.used == {"n0", "n1", "n2"} - set(drained)


def test_more_nodes_shorten_the_wait_and_the_interval_says_that_it_was_no_luck(fork: Fork) -> None:
    unchanged, changed = Change(AIGC), Change(AIGC, add=(Pool(2, "a100"),))
    answer = compare_futures(fork, unchanged, changed, hours=0.1, seeds=3)
    lines = {(line.tenant, line.measure): line for line in answer.lines}
    wait = lines[ALL, "mean waiting, s"]
    assert wait.changed < wait.unchanged / 2
    assert wait.clear
    assert {tenant for tenant, _ in lines} == {ALL, "art", "ads", "lab"}
    assert lines[ALL, "finished"].unchanged == sum(lines[name, "finished"].unchanged for name in ("art", "ads", "lab"))
    hours = [lines[name, "GPU hours"].unchanged for name in ("art", "ads", "lab")]
    assert lines[ALL, "GPU hours"].unchanged == pytest.approx(sum(hours))
    assert answer.unfinished == (0, 0)
    assert answer.to_json()["change"] == {"add_nodes": ["2xa100"]}
    assert "2xa100" in describe(answer)
    assert render(answer).row_count == len(answer.lines)


def test_no_change_makes_no_difference(fork: Fork) -> None:
    answer = compare_futures(fork, Change(AIGC), Change(AIGC), hours=0.05, seeds=2)
    assert answer.lines
    assert all(line.changed == pytest.approx(line.unchanged) and not line.clear for line in answer.lines)


def test_more_load_and_another_policy_lengthen_the_wait(fork: Fork) -> None:
    heavier = compare_futures(fork, Change(AIGC), Change(AIGC, load=1.5), hours=0.1, seeds=2)
    lines = {(line.tenant, line.measure): line for line in heavier.lines}
    assert lines[ALL, "mean waiting, s"].changed > lines[ALL, "mean waiting, s"].unchanged
    assert heavier.arrivals[1] == pytest.approx(1.5 * heavier.arrivals[0], rel=0.15)
    fifo = compare_futures(fork, Change(AIGC), Change(profiles.load("fifo")), hours=0.1, seeds=2)
    assert fifo.change == {"profile": "fifo"}


def test_a_fork_may_begin_before_the_journal_s_end() -> None:
    records = production()
    middle = records[len(records) // 2].now
    fork = Fork.of(None, records, middle)
    assert fork.now == middle
    assert fork.history[-1].now <= middle
    seen = Watched(fork)
    run_forward(fork, Change(AIGC), seen, seed=1, window_us=0, horizon_us=0)
    assert set(seen.ends) == set(live(fork))


@pytest.mark.parametrize("text", ["a100", "0xa100", "2x", "2xa100:0", "-1xa100"])
def test_node_counts_that_cannot_be_read_name_the_field(text: str) -> None:
    with pytest.raises(ForkError, match="add_nodes"):
        Pool.parse(text, "add_nodes")


def test_impossible_changes_name_the_field_and_the_remedy(fork: Fork) -> None:
    state = snapshot.restore(fork.state)
    with pytest.raises(ForkError, match="remove_nodes: there are 3"):
        changed_nodes(state, Change(AIGC, remove=(Pool(4, "a100"),)))
    with pytest.raises(ForkError, match="no node takes work"):
        changed_nodes(state, Change(AIGC, remove=(Pool(3, "a100"),)))
    with pytest.raises(ForkError, match="add_nodes: unknown GPU model 'b900'"):
        changed_nodes(state, Change(AIGC, add=(Pool(1, "b900"),)))
    with pytest.raises(ForkError, match="remove_nodes: unknown GPU model 'h100'"):
        changed_nodes(state, Change(AIGC, remove=(Pool(1, "h100"),)))
    with pytest.raises(ForkError, match="add_nodes: 400000 GPUs"):
        changed_nodes(state, Change(AIGC, add=(Pool(200_000, "a100"),)))
    joining, _ = changed_nodes(state, Change(AIGC, add=(Pool(1, "h100", 4),)))
    assert [gpu.model for gpu in joining[0].gpus] == ["h100"] * 4
    assert joining[0].gpus[0].memory_bytes == GPU_MODELS["h100"].memory_bytes
    with pytest.raises(ForkError, match="load"):
        Change(AIGC, load=0)
    with pytest.raises(ForkError, match="knows no node"):
        Fork.of(None, [])
    with pytest.raises(ForkError, match="seeds"):
        compare_futures(fork, Change(AIGC), Change(AIGC), seeds=1)
    with pytest.raises(ForkError, match="hours"):
        compare_futures(fork, Change(AIGC), Change(AIGC), hours=-1)


def test_a_fork_foretells_how_the_queue_was_really_worked_off() -> None:
    records = production(load=1.2, tasks=300, stop_at=299, sigma=0.1)
    fork = Fork.of(None, records)
    waiting = live(fork)
    assert len(waiting) > 30
    truth = {
        event.req_no: record.now - fork.now
        for record in production(load=1.2, tasks=300, stop_at=299, sigma=0.1, and_then_s=3600)
        for event in record.events
        if isinstance(event, TaskFinished) and event.req_no in waiting
    }
    assert truth.keys() == waiting.keys(), "nothing else arrived, so the queue was worked off"
    answer = compare_futures(fork, Change(AIGC), Change(AIGC), hours=0, seeds=3)
    foretold = next(line for line in answer.lines if (line.tenant, line.measure) == (ALL, "mean completion, s"))
    assert foretold.unchanged == pytest.approx(sum(truth.values()) / len(truth) / SECOND, rel=0.05)


@pytest.mark.parametrize("eighth", [1, 3, 6])
def test_a_fork_in_the_midst_of_failures_ends_everything_and_keeps_the_state_sound(
    eighth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Checking(Engine):
        def step(self, now: int, events: Sequence[Event]) -> Sequence[Command]:
            commands = super().step(now, events)
            invariants.check(self.state)
            return commands

    kept = MemoryJournal()
    config = SimulationConfig(
        synthetic_tasks=120,
        nodes=3,
        gpus_per_node=2,
        rate_scale=250,
        slots=2,
        attempt_crash_ppm=60_000,
        mtbf_hours=2.0,
        mttr_minutes=5,
        gpu_mtbf_hours=3,
        urgent_share=0.2,
    )
    simulate(config, journal=kept)
    fork = Fork.of(None, kept.records, kept.records[len(kept.records) * eighth // 8].now)
    monkeypatch.setattr("sim.fork.Engine", Checking)
    seen = Watched(fork)
    world = run_forward(fork, Change(AIGC, load=1.5), seen, seed=1, window_us=300 * SECOND, horizon_us=60 * SECOND)
    assert live(fork).keys() <= seen.ends.keys()
    assert world.open_tasks == {}
