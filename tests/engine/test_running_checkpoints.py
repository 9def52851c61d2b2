"""Checkpoints that a running attempt tells of: what the next attempt starts from, and what time they save."""

from __future__ import annotations

from typing import Any

from engine import codec, profiles
from engine import events as ev
from engine.commands import StartTask
from engine.journal import decode_record, encode_record
from engine.replay import recover, replay
from engine.snapshot import restore, take
from engine.tasks import FailureCause, TaskType

SECOND = 1_000_000


def _training(desk: Any, task: Any) -> Any:
    d = desk("aigc")
    d.node()
    d.answer(d.submit(task("train", task_type=TaskType.TP, model="m")))
    assert d.state("train") == "running"
    return d


def _starts(commands: Any) -> list[StartTask]:
    return [c for c in commands if isinstance(c, StartTask)]


def _started_again(d: Any) -> StartTask:
    """Let time pass and answer orders until the task is ordered to start again."""
    for _ in range(20):
        commands = d.step(after=60)
        found = _starts(commands)
        if found:
            return found[0]
        found = _starts(d.answer(commands) or ())
        if found:
            return found[0]
    raise AssertionError("the task was not started again")


def test_an_attempt_whose_pod_died_goes_on_from_the_checkpoint_it_told_of_last(desk: Any, task: Any) -> None:
    d = _training(desk, task)
    d.step(ev.TaskProgressed("train", 1, 100, 300, 0, "a"), after=10)
    d.step(ev.TaskProgressed("train", 1, 200, 300, 0, "b"), after=10)
    d.step(ev.TaskProgressed("train", 1, 250, 300, 0, "b"), after=5)
    pod = d.engine.state.tasks["train"].pods[0]
    d.step(ev.PodStopped(pod, FailureCause.CRASHED, "killed by SIGKILL"), after=5)
    train = d.engine.state.tasks["train"]
    assert (train.checkpoint, train.failures) == ("b", 1)
    assert train.kept_us == 20 * SECOND
    assert _started_again(d).checkpoint == "b"


def test_while_it_runs_an_attempt_is_not_credited_with_what_it_has_saved(desk: Any, task: Any) -> None:
    d = _training(desk, task)
    d.step(ev.TaskProgressed("train", 1, 100, 300, 0, "a"), after=10)
    assert d.engine.state.tasks["train"].kept_us == 0


def test_a_second_loss_adds_only_what_the_second_attempt_saved(desk: Any, task: Any) -> None:
    d = _training(desk, task)
    d.step(ev.TaskProgressed("train", 1, 100, 300, 0, "a"), after=10)
    d.step(ev.TaskFailed("train", 1, FailureCause.CRASHED), after=7)
    order = _started_again(d)
    d.answer([order])
    train = d.engine.state.tasks["train"]
    assert train.attempt == 2
    d.step(ev.TaskProgressed("train", 2, 110, 300), after=3)
    d.step(ev.TaskFailed("train", 2, FailureCause.CRASHED), after=3)
    assert (train.checkpoint, train.kept_us) == ("a", 10 * SECOND)


def test_a_checkpoint_of_an_attempt_that_is_over_is_ignored(desk: Any, task: Any) -> None:
    d = _training(desk, task)
    d.step(ev.TaskFailed("train", 1, FailureCause.CRASHED), after=1)
    d.step(ev.TaskProgressed("train", 1, 100, 300, 0, "late"))
    assert d.engine.state.tasks["train"].checkpoint == ""


def test_only_the_first_member_of_a_gang_speaks_for_its_checkpoint(desk: Any, task: Any) -> None:
    d = desk("aigc")
    d.node()
    d.node("n2")
    d.answer(d.submit(task("train", task_type=TaskType.TP, model="m", members=2)))
    assert d.state("train") == "running"
    d.step(ev.TaskProgressed("train", 1, 1, 3, 1, "of rank 1"))
    assert d.engine.state.tasks["train"].checkpoint == ""


def test_a_progress_without_a_checkpoint_is_written_as_before() -> None:
    assert codec.encode(ev.TaskProgressed("r", 1, 2, 3)) == (
        b'[1,"TaskProgressed",{"req_no":"r","attempt":1,"done":2,"total":3}]'
    )
    read = codec.decode(b'[1,"TaskProgressed",{"req_no":"r","attempt":1,"done":2,"total":3,"checkpoint":"c"}]')
    assert read == ev.TaskProgressed("r", 1, 2, 3, 0, "c")


def test_recovery_and_replay_know_running_checkpoints(desk: Any, task: Any) -> None:
    d = _training(desk, task)
    d.step(ev.TaskProgressed("train", 1, 100, 300, 0, "a"), after=10)
    d.step(ev.TaskFailed("train", 1, FailureCause.CRASHED), after=1)
    _started_again(d)
    records = [decode_record(encode_record(record)) for record in d.journal.records]
    recovered = recover(None, records)
    assert recovered.state.tasks["train"].checkpoint == "a"
    assert recovered.state.digest() == d.engine.state.digest()
    assert replay(records, profiles.load("aigc")).same


def test_a_snapshot_from_before_running_checkpoints_is_still_read(desk: Any, task: Any) -> None:
    d = _training(desk, task)
    d.step(ev.TaskProgressed("train", 1, 100, 300, 0, "a"), after=10)
    whole = codec.loads(d.engine.snapshot())
    assert restore(codec.dumps(whole)).tasks["train"].kept_until == d.engine.state.tasks["train"].kept_until > 0
    for data in whole[1]["tasks"]:
        del data["values"][-1]
    older = restore(codec.dumps(whole))
    assert (older.tasks["train"].checkpoint, older.tasks["train"].kept_until) == ("a", 0)
    assert take(older) != d.engine.snapshot()
