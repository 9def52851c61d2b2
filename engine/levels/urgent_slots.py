"""Urgent tasks beside those that fill a Pod's slots: its running batch sets ordinary pictures aside for them where it must.

Nobody is stopped and nothing is loaded, so it comes before any preemption, and without patience. Only tasks that say so take part
(`TaskSpec.urgent_slots`): the methods that can do it are known to whoever submits them.
"""

from __future__ import annotations

from engine.entities import Node, Pod, Task
from engine.kinds import Kind, WarmLine, cap_of
from engine.levels.choice import bind_warm
from engine.tasks import PodState
from engine.turn import Turn


def let_urgent_in(turn: Turn) -> None:
    """Start urgent tasks that found neither a slot nor room, beside the others in a full Pod of their kind."""
    backlog = turn.backlog
    if not backlog.beside or backlog.waiting is not None:
        return
    for kind in sorted(backlog.kinds_waiting, key=_key):
        for line in list(kind.lines.values()):
            while line.live and len(turn.commands) < turn.limits.commands_per_step:
                head = line.head()
                if head is None or not head[1].urgent or not head[1].spec.urgent_slots:
                    break
                pod = _pod_for(turn, kind, line, head[1])
                if pod is None:
                    break
                bind_warm(turn, head[1], pod)


def _key(kind: Kind) -> str:
    return kind.key


def _pod_for(turn: Turn, kind: Kind, line: WarmLine, task: Task) -> Pod | None:
    """Return the Pod with the fewest tasks beyond its slots, on the group's node if there is one."""
    spec = task.spec
    prefer: Node | None = None
    if task.group is not None and task.group.node is not None and turn.backlog.prefers_group_node(task):
        prefer = task.group.node
    best: Pod | None = None
    least = (True, 0, 0)
    for pod in turn.backlog.by_model.get((spec.method, spec.model), {}).values():
        busy = len(pod.tasks)
        if busy >= pod.slots + min(spec.urgent_slots, pod.slots) or pod.state is not PodState.BUSY or not pod.usable:
            continue
        if pod.warm.kind is not kind or cap_of(pod) < line.need or line.node not in (-1, pod.node.index):
            continue
        if pod.node.exclusive not in (None, task.group):
            continue
        rank = (prefer is not None and pod.node is not prefer, busy, pod.number)
        if best is None or rank < least:
            best, least = pod, rank
    return best
