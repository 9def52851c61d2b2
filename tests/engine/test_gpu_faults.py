"""Failures of a device: what is tried again and how often, and when a GPU that keeps failing takes no more work."""

from __future__ import annotations

from typing import Any

import pytest

from engine import codec, profiles
from engine import events as ev
from engine.commands import CreatePod, Notify
from engine.faults import GPU_FAULTS, is_cordoned
from engine.journal import decode_record, encode_record
from engine.limits import Limits
from engine.replay import recover, replay
from engine.resources import Demand, GpuSpec
from engine.snapshot import restore
from engine.tasks import LAST_ATTEMPT, NOT_RETRYABLE, FailureCause, TaskState

_OWN_PODS = {"model": "m", "max_attempts": 5}
_LATER = ev.NodeReported("some other node", ())
"""Nodes report every few seconds; with that it is noticed that time has passed."""


def _cluster(desk: Any, nodes: int = 2, **limits: int) -> Any:
    d = desk("aigc", Limits(**limits)) if limits else desk("aigc")
    for number in range(1, nodes + 1):
        d.node(f"n{number}", model=f"of-n{number}")
    return d


def _on(node: str) -> Demand:
    return Demand(gpus=1, gpu_models=(f"of-{node}",))


def _fail_on(d: Any, task: Any, node: str, name: str, cause: FailureCause, whole_pod: bool = True) -> None:
    """Run a task on a node and let it fail there; then cancel it."""
    d.step(_LATER, after=61)  # A GPU rests after a hung step.
    d.answer(d.submit(task(name, **{**_OWN_PODS, "model": name, "demand": _on(node)})))
    assert d.where(name) == node
    pod = d.engine.state.tasks[name].pods[0]
    if whole_pod:
        d.step(ev.PodStopped(pod, cause, "the log's tail"))
    else:
        d.step(ev.TaskFailed(name, d.engine.state.tasks[name].attempt, cause))
    d.answer(d.step(ev.TaskCancelRequested(name)))


def _gpu(d: Any, node: str, index: int = 0) -> Any:
    return d.engine.state.cluster.by_name[node].gpus[index]


def _notices(commands: Any, req_no: str) -> list[Notify]:
    return [c for c in commands if isinstance(c, Notify) and c.req_no == req_no]


@pytest.mark.parametrize("cause", FailureCause)
def test_each_cause_is_tried_again_or_refused_as_the_tables_say(desk: Any, task: Any, cause: FailureCause) -> None:
    d = _cluster(desk, 1)
    d.answer(d.submit(task("t", **_OWN_PODS)))
    commands = d.step(ev.TaskFailed("t", 1, cause, 0, "why"))
    state = d.engine.state.tasks["t"].state
    assert state is (TaskState.DEAD if cause in NOT_RETRYABLE else TaskState.BACKOFF)
    [notice] = _notices(commands, "t")
    assert (str(cause) in notice.detail, "why" in notice.detail) == (True, True)


def test_numbers_that_are_none_are_tried_once_more_and_no_further(desk: Any, task: Any) -> None:
    assert LAST_ATTEMPT[FailureCause.NOT_FINITE] == 2
    d = _cluster(desk, 1)
    d.answer(d.submit(task("t", **_OWN_PODS)))
    d.step(ev.TaskFailed("t", 1, FailureCause.NOT_FINITE))
    assert d.state("t") == "backoff"
    d.answer(d.step(after=60))
    assert d.state("t") == "running"
    commands = d.step(ev.TaskFailed("t", 2, FailureCause.NOT_FINITE, 0, "latents are no numbers"))
    assert d.state("t") == "dead"
    assert "in the last of 2 attempts: not_finite: latents are no numbers" in _notices(commands, "t")[-1].detail


@pytest.mark.parametrize("cause", sorted(GPU_FAULTS))
@pytest.mark.parametrize("whole_pod", [True, False])
def test_a_gpu_that_fails_one_task_after_another_takes_no_more(
    desk: Any, task: Any, cause: FailureCause, whole_pod: bool
) -> None:
    d = _cluster(desk)
    for number in range(3):
        assert not is_cordoned(d.engine.state, d.engine.state.cluster.by_name["n1"], "n1-g0")
        _fail_on(d, task, "n1", f"t{number}", cause, whole_pod)
    assert not _gpu(d, "n1").open
    assert is_cordoned(d.engine.state, d.engine.state.cluster.by_name["n1"], "n1-g0")
    d.answer(d.submit(task("next", model="other", demand=Demand(gpus=1))))
    assert d.where("next") == "n2"


@pytest.mark.parametrize("cause", sorted(set(FailureCause) - GPU_FAULTS))
def test_other_failures_say_nothing_of_the_gpu(desk: Any, task: Any, cause: FailureCause) -> None:
    d = _cluster(desk)
    for number in range(4):
        _fail_on(d, task, "n1", f"t{number}", cause)
    assert _gpu(d, "n1").open
    assert d.engine.state.faults == {}


def test_one_task_that_fails_again_and_again_counts_once(desk: Any, task: Any) -> None:
    d = _cluster(desk, 2)
    d.answer(d.submit(task("t", **_OWN_PODS, demand=_on("n1"))))
    for attempt in (1, 2, 3, 4):
        d.step(ev.TaskFailed("t", attempt, FailureCause.HUNG))
        d.answer(d.step(after=30))
    assert _gpu(d, "n1").open
    assert len(d.engine.state.faults["n1", "n1-g0"]) == 1


def test_a_success_in_between_makes_the_gpu_well_again(desk: Any, task: Any) -> None:
    d = _cluster(desk)
    for number in range(2):
        _fail_on(d, task, "n1", f"t{number}", FailureCause.HUNG)
    d.step(_LATER, after=61)
    d.answer(d.submit(task("good", model="good", demand=_on("n1"))))
    d.finish("good")
    assert d.engine.state.faults == {}
    for number in range(2, 4):
        _fail_on(d, task, "n1", f"t{number}", FailureCause.HUNG)
    d.step(_LATER, after=61)
    assert _gpu(d, "n1").open


def test_faults_of_long_ago_do_not_count(desk: Any, task: Any) -> None:
    d = _cluster(desk, gpu_faults_us=100_000_000)
    for number in range(4):
        _fail_on(d, task, "n1", f"t{number}", FailureCause.HUNG)
        d.step(_LATER, after=61)
    assert _gpu(d, "n1").open


def test_the_last_gpu_is_never_cordoned_by_its_faults(desk: Any, task: Any) -> None:
    d = _cluster(desk, 1)
    for number in range(5):
        _fail_on(d, task, "n1", f"t{number}", FailureCause.HUNG)
    assert _gpu(d, "n1").open


def test_a_model_that_fails_everywhere_takes_a_quarter_of_the_gpus_at_most(desk: Any, task: Any) -> None:
    d = _cluster(desk, 6)
    for node in range(1, 7):
        for number in range(3):
            _fail_on(d, task, f"n{node}", f"t{node}-{number}", FailureCause.NOT_FINITE)
    cordoned = [node.name for node in d.engine.state.cluster.nodes if not node.gpus[0].open]
    assert cordoned == ["n1"]


def test_an_operator_gives_a_cordoned_gpu_back(desk: Any, task: Any) -> None:
    d = _cluster(desk)
    for number in range(3):
        _fail_on(d, task, "n1", f"t{number}", FailureCause.HUNG)
    d.step(ev.NodeUncordoned("n1", "n1-g0"))
    assert _gpu(d, "n1").open
    assert d.engine.state.faults == {}
    _fail_on(d, task, "n1", "later", FailureCause.HUNG)
    d.step(_LATER, after=61)
    assert _gpu(d, "n1").open, "it begins anew"


def test_a_gpu_that_falls_off_the_bus_again_and_again_stays_cordoned_when_it_comes_back(desk: Any, task: Any) -> None:
    d = _cluster(desk)
    there = (GpuSpec("n1-g0", "of-n1", 80),)
    for number in range(3):
        d.answer(d.submit(task(f"t{number}", **{**_OWN_PODS, "model": f"t{number}", "demand": _on("n1")})))
        d.answer(d.step(ev.NodeReported("n1", ())))
        assert d.state(f"t{number}") == "backoff", "the GPU went while it ran"
        d.answer(d.step(ev.TaskCancelRequested(f"t{number}"), ev.NodeReported("n1", there)))
    assert not _gpu(d, "n1").open
    assert is_cordoned(d.engine.state, d.engine.state.cluster.by_name["n1"], "n1-g0")


def test_a_gpu_that_an_operator_drained_is_not_called_faulty(desk: Any, task: Any) -> None:
    d = _cluster(desk)
    for number in range(2):
        _fail_on(d, task, "n1", f"t{number}", FailureCause.HUNG)
    d.step(ev.NodeDrainRequested("n1", "n1-g0"))
    assert not is_cordoned(d.engine.state, d.engine.state.cluster.by_name["n1"], "n1-g0")
    assert not _gpu(d, "n1").open


def test_recovery_snapshots_and_replay_know_of_faults(desk: Any, task: Any) -> None:
    d = _cluster(desk)
    for number in range(3):
        _fail_on(d, task, "n1", f"t{number}", FailureCause.HUNG)
    records = [decode_record(encode_record(record)) for record in d.journal.records]
    recovered = recover(None, records)
    assert recovered.state.digest() == d.engine.state.digest()
    assert not recovered.state.cluster.by_name["n1"].gpus[0].open
    assert replay(records, profiles.load("aigc")).same
    restored = restore(d.engine.snapshot())
    assert restored.faults == d.engine.state.faults
    assert restored.digest() == d.engine.state.digest()


def test_a_snapshot_from_before_faults_were_counted_is_still_read(desk: Any, task: Any) -> None:
    d = _cluster(desk)
    _fail_on(d, task, "n1", "t", FailureCause.HUNG)
    whole = codec.loads(d.engine.snapshot())
    del whole[1]["faults"]
    older = restore(codec.dumps(whole))
    assert older.faults == {}


def test_a_cordoned_gpu_lets_its_idle_pods_go_and_those_that_run_finish(desk: Any, task: Any) -> None:
    d = _cluster(desk)
    shared = {"model": "big", "slots": 4, "max_attempts": 5, "demand": _on("n1")}
    orders = d.answer(d.submit(*(task(f"s{number}", **shared) for number in range(4))))
    assert len([c for c in orders if isinstance(c, CreatePod)]) == 1
    d.step(*(ev.TaskFailed(f"s{number}", 1, FailureCause.NOT_FINITE) for number in range(3)))
    assert not _gpu(d, "n1").open
    assert d.state("s3") == "running"
    d.answer(d.finish("s3"))
    assert d.engine.state.cluster.by_name["n1"].pods == {}


# --- after a hung step ------------------------------------------------------------------------------------------------


def _hang(d: Any, name: str) -> None:
    d.step(ev.PodStopped(d.engine.state.tasks[name].pods[0], FailureCause.HUNG, "no step"))


def test_an_attempt_that_hung_is_tried_on_another_gpu_and_the_first_rests_for_a_while(desk: Any, task: Any) -> None:
    d = _cluster(desk, 2)
    d.answer(d.submit(task("t", **_OWN_PODS, demand=Demand(gpus=1))))
    first = d.where("t")
    _hang(d, "t")
    assert not _gpu(d, first).open
    assert not is_cordoned(d.engine.state, d.engine.state.cluster.by_name[first], f"{first}-g0")
    d.answer(d.step(after=5))
    assert d.where("t") != first
    d.finish("t")
    d.step(_LATER, after=40)
    assert not _gpu(d, first).open
    d.step(_LATER, after=40)
    assert _gpu(d, first).open
    assert d.engine.state.resting == {}


def test_the_only_gpu_does_not_rest(desk: Any, task: Any) -> None:
    d = _cluster(desk, 1)
    d.answer(d.submit(task("t", **_OWN_PODS)))
    _hang(d, "t")
    assert _gpu(d, "n1").open
    d.answer(d.step(after=5))
    assert d.state("t") == "running"


def test_a_gpu_that_an_operator_drains_while_it_rests_stays_drained(desk: Any, task: Any) -> None:
    d = _cluster(desk, 2)
    d.answer(d.submit(task("t", **_OWN_PODS, demand=_on("n1"))))
    _hang(d, "t")
    d.step(ev.NodeDrainRequested("n1", "n1-g0"))
    d.step(_LATER, after=600)
    assert not _gpu(d, "n1").open
    d.step(ev.NodeUncordoned("n1", "n1-g0"))
    assert _gpu(d, "n1").open


def test_an_operator_ends_a_rest(desk: Any, task: Any) -> None:
    d = _cluster(desk, 2)
    d.answer(d.submit(task("t", **_OWN_PODS, demand=_on("n1"))))
    _hang(d, "t")
    d.step(ev.NodeUncordoned("n1", "n1-g0"))
    assert (_gpu(d, "n1").open, d.engine.state.resting) == (True, {})


def test_what_still_runs_on_a_resting_gpu_counts_and_may_have_it_cordoned(desk: Any, task: Any) -> None:
    d = _cluster(desk, 2)
    part = Demand(gpus=1, gpu_share=250, gpu_models=("of-n1",))
    for number in range(3):
        d.answer(d.submit(task(f"t{number}", model=f"m{number}", max_attempts=5, demand=part)))
    for number in range(3):
        d.step(ev.PodStopped(d.engine.state.tasks[f"t{number}"].pods[0], FailureCause.HUNG), after=0.01)
    assert is_cordoned(d.engine.state, d.engine.state.cluster.by_name["n1"], "n1-g0")
    d.step(_LATER, after=600)
    assert not _gpu(d, "n1").open, "a rest ends by itself, a cordon does not"


def test_recovery_snapshots_and_replay_know_of_rests(desk: Any, task: Any) -> None:
    d = _cluster(desk, 2)
    d.answer(d.submit(task("t", **_OWN_PODS, demand=_on("n1"))))
    _hang(d, "t")
    restored = restore(d.engine.snapshot())
    assert restored.resting == d.engine.state.resting != {}
    assert restored.digest() == d.engine.state.digest()
    d.step(_LATER, after=100)
    records = [decode_record(encode_record(record)) for record in d.journal.records]
    assert recover(None, records).state.digest() == d.engine.state.digest()
    assert replay(records, profiles.load("aigc")).same
