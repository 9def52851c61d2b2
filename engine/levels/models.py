"""Which model earns a Pod where others must leave: loads cost what many tasks cost, so they are spread over many tasks.

A profile asks for it with three figures. `gather_us`: room goes to models that earn it, not to single tasks, and a task stands back
for so long. `serve_loads`: a Pod serves its model for so many times its load before it leaves others its room. `warm_first_loads`:
how much longer another task must have waited, in loads of the place where the Pod is: devices that load quickly change their models
often, slow ones seldom. What a load takes is learned device by device from the Pods that started there.
"""

from __future__ import annotations

from engine.entities import Pod, Task
from engine.kinds import Kind, RoomLine
from engine.lines import Rank
from engine.tasks import SECOND, Micros
from engine.turn import Turn

WORTH_LOADS = 4
"""Where more tasks wait than there are Pods, one more Pod of a model must find so many loads' worth of waiting work for each Pod of
that model; else it must find what takes longer than the load."""

LOOK_BACK_US = 5 * SECOND

Head = tuple[Rank, Task]


def next_for_room(turn: Turn, line: RoomLine) -> Head | None:
    """Return whom room goes to that others must leave: the head of the line or, with `gather_us`, whose model earns a Pod most.

    Urgent tasks come first, then those that have stood back for long enough, then the model with the most waiting tasks per Pod, so
    that one load serves many. None: all who wait here are better served by the Pods that are there.
    """
    if not turn.profile.gather_us or line.node >= 0:
        return line.head()
    load_us = _next_load_us(turn)
    worth_us = load_us * (WORTH_LOADS if line.live > len(turn.state.pods) else 1)
    first: Head | None = None
    fullest: Head | None = None
    by_model = turn.backlog.by_model
    most, among = 0, 1  # waiting tasks and Pods of the fullest model, one more Pod counted in
    young_since = turn.now - turn.profile.gather_us
    for kind in turn.backlog.kinds_waiting:
        waiting = kind.waiting
        pods = len(by_model.get(kind.serves, ()))
        if waiting < pods and not kind.urgent and kind.since > young_since and worth_us > 0:
            continue  # `_earns` would say no to whoever is next
        head = _head_of(kind, line)
        if head is None:
            continue
        if pods and not _earns(turn, head[1], waiting // pods, load_us, worth_us):
            continue
        if head[1].urgent or head[1].pending_since + turn.profile.gather_us <= turn.now:
            if first is None or head[0] < first[0]:
                first = head
            continue
        more = waiting * among - most * (pods + 1)
        if more > 0 or (more == 0 and fullest is not None and head[0] < fullest[0]):
            most, among, fullest = waiting, pods + 1, head
    return first or fullest


def may_leave(turn: Turn, pod: Pod, task: Task, other: Task, same_band: bool) -> bool:
    """Tell whether an idle Pod that would serve `task` may go for the sake of `other`, who ranks before it."""
    profile = turn.profile
    if profile.gather_us and not other.urgent:
        there = _pods_of(turn, other)
        here = max(1, _pods_of(turn, task))
        if there and other.shape.kind.waiting * here < task.shape.kind.waiting * (there + 1):
            return False
    if same_band:
        loads = profile.warm_first_loads
        longer_us = loads * turn.backlog.idle_pods.load_us(pod) if loads else profile.warm_first_us
        return other.submitted_at + longer_us <= task.submitted_at
    stands_us = turn.backlog.idle_pods.load_us(pod) if profile.gather_us else profile.preempt_patience_us
    return other.pending_since + stands_us <= turn.now or not _has_pods(turn, other)


def stands_back(turn: Turn, task: Task) -> bool:
    """Tell whether a task waits for the Pods of its model rather than for one more of them."""
    return turn.profile.gather_us > 0 and _has_pods(turn, task)


def look_back(turn: Turn, task: Task) -> None:
    """See to it that tasks that stand back are looked at again, though nothing else happens."""
    backlog = turn.backlog
    if backlog.look_back_at <= turn.now:
        backlog.look_back_at = turn.now + LOOK_BACK_US
        backlog.task_due(task, backlog.look_back_at)


def _head_of(kind: Kind, line: RoomLine) -> Head | None:
    """Return who is next of a kind among those that wait in this line as well."""
    best: Head | None = None
    for each in kind.lines.values():
        if each.live:
            head = each.head()
            if head is not None and head[1].lines[-1] is line and (best is None or head[0] < best[0]):
                best = head
    return best


def _earns(turn: Turn, task: Task, waiting_per_pod: int, load_us: Micros, worth_us: Micros) -> bool:
    """Tell whether one more Pod of a task's model is worth its load."""
    waited_us = turn.now - task.pending_since
    if task.urgent:
        return waited_us >= load_us
    work_us = waiting_per_pod * task.predicted_us
    return work_us >= worth_us or waited_us >= turn.profile.gather_us + work_us


def _next_load_us(turn: Turn) -> Micros:
    """Return what the next load will take, if it is where the idle Pod is that goes first."""
    pod = turn.backlog.idle_pods.first()
    return turn.profile.reload_us if pod is None else turn.backlog.idle_pods.load_us(pod)


def _pods_of(turn: Turn, task: Task) -> int:
    """Return how many Pods of a task's model there are. Not all may be of use to it: so nobody stands back for ever."""
    return len(turn.backlog.by_model.get((task.spec.method, task.spec.model), ()))


def _has_pods(turn: Turn, task: Task) -> bool:
    """Tell whether Pods of the task's model are there: one of their slots may be free sooner than a new Pod is ready."""
    return (task.spec.method, task.spec.model) in turn.backlog.by_model
