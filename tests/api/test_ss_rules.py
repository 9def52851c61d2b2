"""The rules of SS without storage or threads: what a step means for jobs, outcomes and models, and how requests are understood."""

from __future__ import annotations

import json
import sqlite3
import tempfile
import uuid
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.mq.messages import MessageRefused, decode, encode_request
from api.sm.journal import SqliteJournal
from api.support.intake import MethodDefaults, understand
from api.support.jobs import Job, JobFold, Model, outcome_of, read_result, trained_model
from api.support.payloads import StorePayloads, resolve
from api.support.store import Store
from engine.commands import CreatePod, Notify, PrefetchModel, StartTask
from engine.events import ModelDeployed, ModelUndeployed, TaskProgressed, TaskStopped, TaskSubmitted
from engine.protocol.controller import PayloadRefused
from engine.resources import Demand
from engine.tasks import SECOND, TERMINAL_STATES, Affinity, FailureCause, TaskSpec, TaskState, TaskType

DEFAULTS = MethodDefaults(Demand(cpu_milli=7), slots=2, max_attempts=4, run_limit_us=9)
METHODS = dict.fromkeys(("sleep", "text_to_image", "dreambooth"), DEFAULTS)
MODELS = {
    "tiny": Model("tiny", "builtin"),
    "mine": Model("mine", "lora", "tiny", "acme", files={"a.safetensors": "f" * 64}),
    "local": Model("local", "local", metadata={"path": "/models/local"}),
}


def job(name: str = "t1", **fields: Any) -> Job:
    header = {"reqNo": name, "priority": 0, "taskType": "GC", "group": ""}
    return Job(
        name, "acme", name, header, "GC", fields.pop("method", "sleep"), fields.pop("parameters", {}), 1.0, **fields
    )


def accepted(*jobs: Job) -> JobFold:
    fold = JobFold([], lambda _: None, 100)
    fold.expected.update({each.task_id: each for each in jobs})
    fold.fold(1, [TaskSubmitted(TaskSpec(each.task_id, "acme", "", TaskType.GC, "sleep")) for each in jobs], [])
    return fold


def test_a_task_nobody_asked_ss_for_means_nothing() -> None:
    fold = JobFold([], lambda _: None, 1)
    events = [TaskSubmitted(TaskSpec("x", "acme", "", TaskType.GC, "sleep")), TaskProgressed("x", 1, 1, 2)]
    assert fold.fold(5, events, [Notify("x", TaskState.FINISHED)]).empty


def test_the_first_outcome_stands_and_later_ones_mean_nothing() -> None:
    for first, second in ((TaskState.CANCELLED, TaskState.FINISHED), (TaskState.FINISHED, TaskState.CANCELLED)):
        one = job()
        fold = accepted(one)
        assert [o.kind for o in fold.fold(2, [], [Notify("t1", first)]).outcomes] == [first]
        fold._find = {"t1": one}.get
        assert fold.fold(3, [], [Notify("t1", second), Notify("t1", TaskState.RUNNING)]).empty
        assert one.state == first


def test_progress_of_an_old_attempt_is_not_shown() -> None:
    one = job()
    fold = accepted(one)
    fold.fold(2, [], [Notify("t1", TaskState.RUNNING, attempt=2, node="n1")])
    fold.fold(
        3, [TaskProgressed("t1", 1, 9, 10), TaskProgressed("t1", 2, 3, 10), TaskProgressed("t1", 2, 8, 10, rank=1)], []
    )
    assert (one.progress_done, one.progress_total, one.node) == (3, 10, "n1")
    assert fold.fold(4, [TaskProgressed("t1", 2, 4, 10)], []).changes[0].durable is False


def test_what_a_method_says_of_its_last_step_is_shown_while_it_runs() -> None:
    one = job()
    fold = accepted(one)
    fold.fold(2, [], [Notify("t1", TaskState.RUNNING, attempt=1, node="n1")])
    told = fold.fold(3, [TaskProgressed("t1", 1, 9, 10, 0, "checkpoint", "loss 0.1234")], [])
    assert told.changes[0].view["progress_note"] == "loss 0.1234"
    fold.fold(4, [], [Notify("t1", TaskState.BACKOFF, attempt=1, reason="crashed")])
    assert one.progress_note == ""


def test_the_last_two_checkpoints_of_a_job_are_known_however_they_were_told() -> None:
    one = job()
    fold = accepted(one)
    fold.fold(2, [], [Notify("t1", TaskState.RUNNING, attempt=1, node="n1")])
    told = [TaskProgressed("t1", 1, n, 10, 0, name) for n, name in enumerate(["a", "b", "b", "c"])]
    fold.fold(3, [*told, TaskProgressed("t1", 1, 9, 10), TaskStopped("t1", 1, 0, "d"), TaskStopped("t1", 1)], [])
    assert one.checkpoints == ["c", "d"]


def test_a_retry_begins_its_progress_anew_and_keeps_its_first_start() -> None:
    one = job()
    fold = accepted(one)
    fold.fold(2_000_000, [TaskProgressed("t1", 0, 5, 10)], [Notify("t1", TaskState.RUNNING, attempt=1)])
    fold.fold(3_000_000, [], [Notify("t1", TaskState.BACKOFF, attempt=1, reason="crashed")])
    assert (one.progress_done, one.reason, one.started_at) == (0, "crashed", 2.0)
    fold.fold(9_000_000, [], [Notify("t1", TaskState.RUNNING, attempt=2)])
    assert one.started_at == 2.0


def test_a_dead_letter_may_run_again_and_end_again_under_its_own_message_id() -> None:
    one = job()
    fold = accepted(one)
    (dead,) = fold.fold(2, [], [Notify("t1", TaskState.DEAD, attempt=3)]).outcomes
    fold._find = {"t1": one}.get
    again = fold.fold(3, [], [Notify("t1", TaskState.PENDING)])
    assert (again.reopened, one.rerun, one.finished_at) == ([one], 1, None)
    (finished,) = fold.fold(4, [], [Notify("t1", TaskState.FINISHED, attempt=4)]).outcomes
    assert (dead.message_id, finished.message_id) == ("acme/t1", "acme/t1/rerun-1")


def test_equal_jobs_give_equal_result_bytes() -> None:
    one, two = (job(state="finished", result={"files": [], "metadata": {"b": 1, "a": 2}}) for _ in range(2))
    assert outcome_of(one).body == outcome_of(two).body


@pytest.mark.parametrize(
    ("text", "reads"),
    [
        ("", {"files": [], "metadata": {}}),
        ("abc", {"reference": "abc", "files": [], "metadata": {}}),
        ("[1]", {"reference": "[1]", "files": [], "metadata": {}}),
        ('{"files": [1]}', {"files": [1], "metadata": {}}),
    ],
)
def test_an_executors_result_is_read_whatever_it_is(text: str, reads: dict[str, Any]) -> None:
    assert read_result(text) == reads


def test_a_training_names_its_model_by_the_request_alone_and_takes_the_adapters_files() -> None:
    files = [
        {"file_id": "a" * 64, "role": "adapter", "name": "adapter.safetensors"},
        {"file_id": "b" * 64, "role": "preview", "name": "preview.png"},
    ]
    one = job(
        method="dreambooth", model="tiny", result={"files": files, "metadata": {"kind": "full", "base_model": "local"}}
    )
    model = trained_model(one, 5.0)
    assert (model.kind, model.base, model.tenant, model.files) == (
        "full",
        "local",
        "acme",
        {"adapter.safetensors": "a" * 64},
    )
    assert model.model_id == trained_model(one, 9.0).model_id
    assert json.loads(model.manifest)["source"] == "t1"


def test_a_deployment_is_fulfilled_by_its_own_event() -> None:
    fold = JobFold([], lambda _: None, 1)
    fold.deploying["tiny", 2] = deque([job("d1", method="deploy"), job("d2", method="deploy")])
    fold.deploying["tiny", 0] = deque([job("u1", method="undeploy")])
    done = fold.fold(
        1, [ModelDeployed("tiny", "text_to_image", Demand(), pods=2), ModelUndeployed("tiny", "text_to_image")], []
    )
    assert [each.task_id for each in done.new] == ["d1", "u1"]
    assert done.deployments == [("tiny", 2), ("tiny", 0)]


notices = st.builds(Notify, st.sampled_from(["t1", "t2", "?"]), st.sampled_from(list(TaskState)), st.integers(0, 3))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(notices, max_size=4), max_size=12))
def test_whatever_the_engine_says_there_is_one_outcome_per_run_and_ids_only_grow(steps: list[list[Notify]]) -> None:
    jobs = {"t1": job("t1"), "t2": job("t2")}
    fold = accepted(*jobs.values())
    fold._find = jobs.get
    ids, ended = [], set()
    for n, commands in enumerate(steps):
        before = {name: each.state for name, each in jobs.items()}
        folded = fold.fold(n, [], commands)
        ids += [change.event_id for change in folded.changes]
        for outcome in folded.outcomes:
            assert outcome.message_id not in ended
            ended.add(outcome.message_id)
        for name, state in before.items():
            if state in ("finished", "cancelled", "rejected"):
                assert jobs[name].state == state, "what ended well or by wish stays so"
    assert ids == sorted(set(ids))
    for name, each in jobs.items():
        assert (name in fold.live) == (TaskState(each.state) not in TERMINAL_STATES)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(notices, max_size=4), max_size=8))
def test_the_store_holds_what_the_fold_says(steps: list[list[Notify]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "journal.db"
        journal, store = SqliteJournal(path), Store(path)
        fold = JobFold([], store.job_by_task, 1)
        jobs = [job("t1"), job("t2")]
        fold.expected.update({each.task_id: each for each in jobs})
        events = [TaskSubmitted(TaskSpec(each.task_id, "acme", "", TaskType.GC, "sleep")) for each in jobs]
        sent: list[str] = []
        for n, commands in enumerate([[], *steps]):
            folded = fold.fold(n, events if n == 0 else [], commands)
            with journal.transaction() as db:
                store.write_folded(db, folded)
            sent += [outcome.message_id for outcome in folded.outcomes]
        assert [row[1] for row in store.unsent(0, 1000)] == sent
        for name in ("t1", "t2"):
            stored = store.job("acme", name)
            assert stored is not None
            outcome = store.outcome("acme", name)
            assert (outcome[0] if outcome else None) == (stored.state if stored.terminal else None)
            if name in fold.live:
                assert stored == fold.live[name]
        again = JobFold(store.live_jobs(), store.job_by_task, store.last_event_id() + 1)
        assert again.live == fold.live
        store.close()
        journal.close()


def test_the_history_of_jobs_is_bounded_and_the_newest_is_kept(tmp_path: Path) -> None:
    journal, store = SqliteJournal(tmp_path / "journal.db"), Store(tmp_path / "journal.db", max_events=200)
    one = job()
    fold = JobFold([], store.job_by_task, 1)
    fold.expected["t1"] = one
    events = [TaskSubmitted(TaskSpec("t1", "acme", "", TaskType.GC, "sleep"))]
    for n in range(500):
        with journal.transaction() as db:
            store.write_folded(db, fold.fold(n, events if n == 0 else [], [Notify("t1", TaskState.RUNNING, attempt=n)]))
    kept = store.events("acme", "t1", 0, 10_000)
    assert 198 <= len(kept) <= 200
    assert kept[-1][4]["attempt"] == 499
    store.close()
    journal.close()


def test_the_outcome_row_is_taken_once_even_if_the_fold_were_wrong(tmp_path: Path) -> None:
    journal, store = SqliteJournal(tmp_path / "journal.db"), Store(tmp_path / "journal.db")
    one, two = job(), job()
    with journal.transaction() as db:
        store.write_folded(db, accepted_step(one))
        store.write_folded(db, accepted(one).fold(2, [], [Notify("t1", TaskState.CANCELLED)]))
        second = accepted(two)
        two.n = one.n
        second._next_event = 500
        store.write_folded(db, second.fold(3, [], [Notify("t1", TaskState.FINISHED)]))
    assert [row[1] for row in store.unsent(0, 10)] == ["acme/t1"]
    assert store.outcome("acme", "t1")[0] == "cancelled"  # type: ignore[index]
    with pytest.raises(sqlite3.IntegrityError), journal.transaction() as db:
        db.execute("INSERT INTO outcome VALUES('acme', 't1', 1, 'finished', '', 0)")
    store.close()
    journal.close()


def accepted_step(one: Job) -> Any:
    fold = JobFold([], lambda _: None, 1)
    fold.expected[one.task_id] = one
    return fold.fold(1, [TaskSubmitted(TaskSpec(one.task_id, "acme", "", TaskType.GC, "sleep"))], [])


# --- requests -----------------------------------------------------------------------------------------------------------


def request(method: str, parameters: dict[str, Any], **header: Any) -> Any:
    fields = {"task_type": "GC", "tenant": "acme", **header}
    message = decode(encode_request(req_no=str(uuid.UUID(int=7)), method=method, parameters=parameters, **fields))
    return understand(
        message,
        message_id="m",
        task_id="task",
        now=5 * SECOND,
        methods=METHODS,
        default_model="tiny",
        find_model=MODELS.get,
    )


def test_a_request_becomes_a_task_with_its_methods_demand_and_features() -> None:
    asked = request(
        "text_to_image",
        {"prompt": "x", "count": 3, "model": "mine"},
        group="g",
        priority=5,
        affinity="strict",
        deadline=60,
    )
    spec = asked.spec
    assert (spec.req_no, spec.tenant, spec.group, spec.priority) == ("task", "acme", "g", 5)
    assert (spec.model, spec.adapters, asked.job.model) == ("tiny", ("mine",), "mine")
    assert (spec.demand.cpu_milli, spec.slots, spec.max_attempts, spec.run_limit_us) == (7, 2, 4, 9)
    assert (spec.affinity, spec.start_deadline) == (Affinity.STRICT, 60 * SECOND)
    assert dict(spec.features) == {
        "group": "g", "images": 3, "loras": 1, "model": "tiny", "steps": 20, "user": "acme",
    }  # fmt: skip
    assert asked.job.parameters["prompt"] == "x"
    assert asked.job.submitted_at == 5.0


def test_a_sleep_declares_its_time_and_a_training_its_base() -> None:
    assert request("sleep", {"seconds": 1.5}).spec.declared_us == 1_500_000
    pictures = [f"{n:064x}" for n in range(4)]
    spec = request("dreambooth", {"pictures": pictures, "category": "dog"}, task_type="TP").spec
    assert (spec.model, spec.task_type, dict(spec.features)["images"]) == ("tiny", TaskType.TP, 4)


@pytest.mark.parametrize("base", ["mine", "absent"])
def test_a_training_needs_a_base_model(base: str) -> None:
    parameters = {"pictures": [f"{n:064x}" for n in range(3)], "category": "dog", "base_model": base}
    with pytest.raises(MessageRefused, match="base_model"):
        request("dreambooth", parameters, task_type="TP")


def test_models_are_resolved_for_their_pods() -> None:
    assert resolve(MODELS["tiny"]) == {"id": "tiny", "kind": "builtin", "base": "tiny", "adapter": None, "path": None}
    assert resolve(MODELS["mine"])["adapter"] == {"a.safetensors": "f" * 64}
    assert resolve(MODELS["local"])["path"] == "/models/local"


def test_payloads_come_from_the_store_and_what_is_gone_fails_the_attempt() -> None:
    live = {"t1": job(parameters={"seconds": 2})}
    payloads = StorePayloads(live, lambda _: None, MODELS.get)
    assert payloads.task(StartTask("t1", 1, 1, "n1")) == {"seconds": 2}
    assert payloads.pod(CreatePod(1, "n1", "sleep", "", (), Demand())) == {}
    assert payloads.prefetch(PrefetchModel("n1", "mine"))["base"] == "tiny"
    with pytest.raises(PayloadRefused) as caught:
        payloads.pod(CreatePod(1, "n1", "text_to_image", "gone", (), Demand()))
    assert caught.value.cause is FailureCause.MODEL_MISSING
    with pytest.raises(PayloadRefused):
        payloads.task(StartTask("t9", 1, 1, "n1"))
