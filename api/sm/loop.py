"""The thread that drives the engine. Nothing else touches it: others post events, or ask questions answered between two steps."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import structlog

from api.sm.journal import SqliteJournal
from engine import snapshot
from engine.commands import Command, CreatePod, DeletePod, StartTask, StopTask
from engine.events import Event
from engine.ports import Forecaster, Journal, World, drive
from engine.protocol.controller import Outstanding
from engine.reasons import Reason
from engine.scheduler import Engine
from engine.state import State
from engine.tasks import Micros, PodState, TaskState
from predictors.demand_forecaster import DemandForecaster
from predictors.forecaster import OnlineForecaster

Observe = Callable[[Micros, Sequence[Event], Sequence[Command], float], None]
_log = structlog.get_logger("sm")
T = TypeVar("T")


class LiveWorld(World, Protocol):
    """A world in real time: it can be waited for, woken and posted to from other threads."""

    def wait(self, until: Micros | None) -> None:
        """Return at `until`, or as soon as `take` has something."""
        ...

    def post(self, event: Event) -> None:
        """Hand in an event from outside; from any thread."""
        ...

    def wake(self) -> None:
        """End a `wait` early; from any thread."""
        ...

    def close(self) -> None:
        """Let go of sockets and threads."""
        ...


class SchedulerLoop:
    """Drives an engine in a live world until told to stop, or until something fails that must end the process.

    ``observe`` sees every step once it is durable, with the seconds that took; ``save`` is called before each snapshot, for what
    learns from the journal and must remember as far back as the records go; ``look`` is called between two steps.
    """

    def __init__(
        self,
        engine: Engine,
        world: LiveWorld,
        journal: SqliteJournal,
        forecaster: Forecaster,
        *,
        observe: Observe | None = None,
        save: Callable[[], None] = lambda: None,
        look: Callable[[], None] = lambda: None,
        snapshot_every: int = 20_000,
        failed: Callable[[BaseException], None] = lambda _: None,
        longest_wait_us: Micros = 1_000_000,
        demand: DemandForecaster | None = None,
    ) -> None:
        self._engine, self._world, self._journal, self._forecaster = engine, world, journal, forecaster
        self._stamps: Forecaster = forecaster if demand is None else demand
        self._observe, self._save, self._look = observe, save, look
        self._snapshot_every = snapshot_every
        self._failed = failed
        self._longest_wait_us = longest_wait_us
        self._snapshot_at = journal.seq
        self._questions: deque[tuple[Callable[[Engine], Any], Future[Any]]] = deque()
        self._stopping = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="scheduler-loop", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the step that is under way, with a snapshot, so that the next start is quick."""
        self._stopping = True
        self._world.wake()
        if self._thread.is_alive():
            self._thread.join()
        self._refuse_questions()

    def post(self, event: Event) -> None:
        """Give the engine an event; from any thread."""
        self._world.post(event)

    async def ask(self, question: Callable[[Engine], T]) -> T:
        """Answer a question about the engine between two of its steps."""
        future: Future[T] = Future()
        self._questions.append((question, future))
        self._world.wake()
        if not self._thread.is_alive():
            self._refuse_questions()
        return await asyncio.wrap_future(future)

    def health(self) -> Mapping[str, tuple[bool, str]]:
        """Return whether the loop runs."""
        detail = str(self._error) if self._error is not None else "" if self._thread.is_alive() else "not running"
        return {"scheduler": (self._thread.is_alive() and self._error is None, detail)}

    def _run(self) -> None:
        try:
            for wakeup_at in drive(self._engine, self._world, self._record(), self._stamps):
                self._look()
                self._answer()
                if self._stopping:
                    break
                # The more there is to write, the rarer: a snapshot costs about as much as it saves.
                every = max(self._snapshot_every, len(self._engine.state.tasks) // 2)
                if self._journal.seq - self._snapshot_at >= every:
                    self._snapshot()
                latest = self._world.now() + self._longest_wait_us
                self._world.wait(latest if wakeup_at is None else min(wakeup_at, latest))
            self._snapshot()
        except BaseException as error:
            self._error = error
            _log.exception("scheduler_failed", error=str(error))
            self._failed(error)
        finally:
            self._refuse_questions()

    def _record(self) -> Journal:
        """Return the journal with those around it who listen."""
        journal, observe = self._journal, self._observe

        def record(now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
            began = time.perf_counter()
            journal(now, events, commands)
            if observe is not None and (events or commands):
                observe(now, events, commands, time.perf_counter() - began)

        forecaster = self._forecaster
        return forecaster.watching(record) if isinstance(forecaster, OnlineForecaster) else record

    def _snapshot(self) -> None:
        if self._journal.seq > self._snapshot_at:
            self._save()
            self._journal.write_snapshot(snapshot.take(self._engine.state))
            self._snapshot_at = self._journal.seq

    def _answer(self) -> None:
        while self._questions:
            question, future = self._questions.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(question(self._engine))
            except Exception as error:
                future.set_exception(error)

    def _refuse_questions(self) -> None:
        while self._questions:
            _, future = self._questions.popleft()
            if future.set_running_or_notify_cancel():
                future.set_exception(RuntimeError("the scheduler's loop has ended"))


def outstanding_of(state: State) -> Outstanding:
    """Return what a recovered state believes to be under way, for the world to order again."""
    creates: list[CreatePod] = []
    started: list[int] = []
    deletes: list[DeletePod] = []
    for pod in state.pods.values():
        if pod.state is PodState.GONE:
            continue
        creates.append(CreatePod(pod.number, pod.node.name, pod.method, pod.model, pod.grants, pod.demand, pod.slots))
        if pod.state is PodState.STOPPING:
            deletes.append(DeletePod(pod.number, pod.reason, state.limits.grace_us))
        elif pod.state is not PodState.CREATING:
            started.append(pod.number)
    starts: list[StartTask] = []
    stops: list[StopTask] = []
    for task in state.live_tasks():
        for rank, number in enumerate(task.pods):
            if not task.live >> rank & 1:
                continue
            node = state.pods[number].node.name
            starts.append(StartTask(task.req_no, task.attempt, number, node, rank, task.checkpoint))
            if task.state is TaskState.STOPPING:
                keep = task.stop_reason == Reason.PREEMPTED
                stop = StopTask(
                    task.req_no, task.attempt, number, node, rank, state.limits.grace_us, task.stop_reason, keep
                )
                stops.append(stop)
    nodes = tuple(node.name for node in state.cluster.nodes if node.up)
    return Outstanding(nodes, tuple(creates), frozenset(started), tuple(starts), tuple(deletes), tuple(stops))
