"""Preemption by policy: running tasks go for waiting ones that outrank them, and borrowed GPUs are reclaimed for their queue.

The ordering says who outranks whom (`outranks`), who goes first (`standing`) and when that may change by time alone
(`next_change_at`); it is told what an exchange loses. Room for a single task is claimed at once. For a gang the tasks in its way
are stopped, and the room is reserved for it while they go.
"""

from __future__ import annotations

from engine.cluster import Cluster
from engine.entities import Node, Pod, Task
from engine.kinds import Kind, RoomLine, Shape
from engine.levels.quotas import gpus_of
from engine.levels.room import claim, room_for
from engine.levels.victims import look_again, loss_of, placed, room_plan
from engine.levels.waiting import Waiting
from engine.reasons import Reason
from engine.stopping import stop
from engine.tasks import NEVER, Affinity, Micros, PodState, TaskState
from engine.turn import Turn

MOST_VICTIMS = 64
"""How many running tasks are considered for one waiting task, those that rank last first."""


def preempt_by_rank(turn: Turn, waiting: Waiting) -> None:
    """Stop running tasks for those that found no room in this step, as far as the policy and the quotas say so."""
    if any(task.line_ticket for task in waiting.blocked):
        _Exchange(turn, waiting).run()


class _Exchange:
    """One step's preemptions."""

    __slots__ = ("_changes_at", "_freeing", "_ranked", "_running", "_turn", "_waiting", "_young_at")

    def __init__(self, turn: Turn, waiting: Waiting) -> None:
        self._turn = turn
        self._waiting = waiting
        self._young_at: Micros = NEVER
        self._changes_at: Micros = NEVER
        self._freeing: dict[Kind, int] = {}
        """Slots that are being freed by stopped tasks, for whoever is next there."""
        self._running: dict[int, Task] = {}
        """Tasks that may be stopped, by sequence number."""
        self._look()
        policy, now = turn.profile.ordering, turn.now
        self._ranked = sorted(
            (-policy.standing(task, now), loss_of(turn, task), -seq, task) for seq, task in self._running.items()
        )
        """(standing, the largest first; loss; the younger first; task)."""

    def _look(self) -> None:
        """Find who may be stopped, and what is being freed already."""
        turn, policy = self._turn, self._turn.profile.ordering
        least = max(turn.profile.min_run_us, 1)
        most = turn.profile.preemptions_per_task or turn.limits.preemptions_per_task
        seen: dict[int, None] = {}
        for task in placed(turn):
            if task.seq in seen:
                continue
            seen[task.seq] = None
            if task.state is TaskState.STOPPING:
                self._stops(task)
                continue
            if task.state is not TaskState.RUNNING and task.state is not TaskState.STARTING:
                continue
            if policy.preemptive:
                self._changes_at = min(self._changes_at, policy.next_change_at(task, turn.now))
            if task.preemptions >= most or not task.spec.preemptible or task.cancel_requested:
                continue
            old_at = (task.started_at or task.ordered_at) + least
            if old_at > turn.now:
                self._young_at = min(self._young_at, old_at)
            else:
                self._running[task.seq] = task

    def _stops(self, task: Task) -> None:
        """Count a task that is being stopped as gone."""
        if self._waiting.balance is not None:
            self._waiting.balance.add(task.tenant, -gpus_of(task))
        pod = self._turn.state.pods.get(task.pods[0])
        if task.spec.members == 1 and pod is not None and pod.usable:
            kind = pod.warm.kind
            self._freeing[kind] = self._freeing.get(kind, 0) + 1

    def run(self) -> None:
        """Go through the blocked tasks in their order."""
        turn, left = self._turn, self._turn.limits.preemptions_per_step
        hopeless: dict[tuple[RoomLine, int], None] = {}
        waits: Task | None = None
        for task in self._waiting.blocked:
            if not task.line_ticket or task.seq in self._waiting.making:
                continue
            room: RoomLine = task.lines[-1]
            key = (room, task.tenant.seq if self._waiting.balance is not None else -1)
            if key not in hopeless:
                if left <= 0:
                    turn.more = True
                    break
                stopped = self._preempt_for(task, room)
                if stopped >= 0:
                    left -= stopped
                    continue
                hopeless[key] = None
            waits = waits or task
        if waits is not None:
            look_again(turn, waits, min(self._young_at, self._changes_at))

    def _preempt_for(self, task: Task, room: RoomLine) -> int:
        """Stop what must go for one task; return how many were stopped, -1 when nobody can be."""
        shape: Shape = task.shape
        single = task.spec.members == 1
        if single and self._freeing.get(shape.kind, 0) > 0 and len(task.lines) > 1:
            self._freeing[shape.kind] -= 1
            return 0
        victims = self._victims(task)
        if not victims:
            return -1
        if not single:
            return self._for_gang(task, room, victims)
        victims = victims[:MOST_VICTIMS]
        if len(task.lines) > 1:
            for victim in victims:
                if self._serves(victim, task, room, shape):
                    self._stop([victim])
                    self._takes(task)
                    return 1
        return self._for_single(task, room, victims)

    def _victims(self, task: Task) -> list[Task]:
        """Return the tasks that may go for one, those that rank last first; of equals the cheaper and the younger."""
        turn, policy, balance = self._turn, self._turn.profile.ordering, self._waiting.balance
        now, least = turn.now, turn.profile.reload_us
        found = []
        wins = policy.preemptive
        for _, loss, _, other in self._ranked:
            if other.seq not in self._running:
                continue
            wins = wins and policy.outranks(task, other, now, least)
            if not wins and balance is None:
                break
            if (wins and (loss == least or policy.outranks(task, other, now, loss))) or (
                balance is not None and balance.may_reclaim(task, other)
            ):
                found.append(other)
        return found

    def _serves(self, victim: Task, task: Task, room: RoomLine, shape: Shape) -> bool:
        """Tell whether the victim's Pod would serve the task as it is."""
        if victim.spec.members > 1 or room.fit.empty:
            return False
        pod = self._turn.state.pods[victim.pods[0]]
        return (
            pod.warm.kind is shape.kind
            and pod.warm.cap >= shape.need
            and pod.usable
            and room.node in (-1, pod.node.index)
            and pod.node.exclusive in (None, task.group)
        )

    def _for_single(self, task: Task, room: RoomLine, victims: list[Task]) -> int:
        """Claim the room of Pods on one node whose only tasks may go, together with idle Pods there."""
        turn = self._turn
        if room.fit.empty or len(turn.state.claims) >= turn.limits.claims:
            return -1
        by_node: dict[int, list[tuple[int, Task, Pod]]] = {}
        for victim in victims:
            for pod in self._pods(victim):
                node = pod.node
                if len(pod.tasks) > 1 or not pod.usable or pod.state is not PodState.BUSY:
                    continue
                if room.node not in (-1, node.index) or node.exclusive not in (None, task.group):
                    continue
                if node.exclusive is None or room.node >= 0:
                    by_node.setdefault(node.index, []).append((0, victim, pod))
        for row, found in by_node.items():
            node = turn.state.cluster.nodes[row]
            plan = room_plan(turn, room, node, found)
            if plan is None:
                continue
            grants, gone = plan
            stopped = list({victim.seq: victim for _, victim, pod in found if pod in gone}.values())
            if not self._may_all_go(task, stopped):
                continue
            claim(turn, task, node, grants, room.fit.demand, gone)
            self._stop(stopped)
            self._takes(task)
            return len(stopped)
        return -1

    def _pods(self, task: Task) -> list[Pod]:
        pods = self._turn.state.pods
        return [pods[number] for rank, number in enumerate(task.pods) if number in pods and task.live >> rank & 1]

    def _may_all_go(self, task: Task, victims: list[Task]) -> bool:
        """Tell whether all of several victims may go: a queue gives back no more than it borrowed."""
        balance, policy, turn = self._waiting.balance, self._turn.profile.ordering, self._turn
        if balance is None:
            return True
        gone: list[Task] = []
        good = True
        for victim in victims:
            if not balance.may_reclaim(task, victim) and not (
                policy.preemptive and policy.outranks(task, victim, turn.now, loss_of(turn, victim))
            ):
                good = False
                break
            balance.add(victim.tenant, -gpus_of(victim))
            gone.append(victim)
        for victim in gone:
            balance.add(victim.tenant, gpus_of(victim))
        return good

    def _stop(self, victims: list[Task]) -> None:
        for victim in victims:
            del self._running[victim.seq]
            if self._waiting.balance is not None:
                self._waiting.balance.add(victim.tenant, -gpus_of(victim))
            stop(self._turn, victim, Reason.PREEMPTED, keep_checkpoint=True)

    def _takes(self, task: Task) -> None:
        if self._waiting.balance is not None:
            self._waiting.balance.add(task.tenant, gpus_of(task))

    # --- gangs ---------------------------------------------------------------------------------------------------------

    def _for_gang(self, task: Task, room: RoomLine, victims: list[Task]) -> int:
        """Stop tasks until all members of a gang fit once they, the idle and those that go anyway are gone."""
        together = room.node >= 0 or (
            task.group is not None and task.spec.affinity in (Affinity.STRICT, Affinity.EXCLUSIVE)
        )
        count = _Room(self._turn, task, room, together)
        chosen: list[Task] = []
        for victim in victims:
            if count.enough():
                break
            count.free(self._pods(victim))
            chosen.append(victim)
        if not count.enough():
            count.undo()
            return -1
        for victim in list(reversed(chosen)):
            count.take_back(self._pods(victim))
            if count.enough():
                chosen.remove(victim)
            else:
                count.free(self._pods(victim))
        count.undo()
        if not chosen or not self._may_all_go(task, chosen):
            return -1
        self._stop(chosen)
        self._takes(task)
        return len(chosen)


class _Room:
    """How many members of a gang fit while Pods are supposed to be gone, on the nodes' plain values."""

    __slots__ = ("_cluster", "_counts", "_freed", "_most", "_room", "_task", "_together", "_turn")

    def __init__(self, turn: Turn, task: Task, room: RoomLine, together: bool) -> None:
        self._turn = turn
        self._cluster: Cluster = turn.state.cluster
        self._task = task
        self._room = room
        self._together = together
        self._most = task.spec.members
        self._freed: dict[int, Pod] = {}
        self._counts: dict[int, int] = {}
        for pod in turn.state.pods.values():
            if self._goes_anyway(pod):
                self._cluster.suppose(pod.node, pod.grants, pod.demand, 1)
                self._freed[pod.number] = pod
        nodes = self._cluster.nodes if room.node < 0 else [self._cluster.nodes[room.node]]
        for node in nodes:
            self._recount(node)

    def _goes_anyway(self, pod: Pod) -> bool:
        if pod.state is PodState.STOPPING or pod.claimed_by:
            return True
        if not pod.tasks:
            return pod.number in self._turn.backlog.idle and not self._turn.is_kept(pod)
        tasks = self._turn.state.tasks
        return all(tasks[req_no].state is TaskState.STOPPING for req_no in pod.tasks)

    def _recount(self, node: Node) -> None:
        if self._room.node not in (-1, node.index) or node.exclusive not in (None, self._task.group):
            return
        self._counts[node.index] = room_for(self._turn, node, self._room.fit, self._most)

    def enough(self) -> bool:
        """Tell whether all members fit."""
        counts = self._counts.values()
        return (max(counts, default=0) if self._together else sum(counts)) >= self._most

    def free(self, pods: list[Pod]) -> None:
        """Suppose that Pods are gone."""
        for pod in pods:
            if pod.number not in self._freed and len(pod.tasks) == 1 and not pod.claimed_by:
                self._cluster.suppose(pod.node, pod.grants, pod.demand, 1)
                self._freed[pod.number] = pod
                self._recount(pod.node)

    def take_back(self, pods: list[Pod]) -> None:
        """Suppose that Pods are there after all."""
        for pod in pods:
            if self._freed.pop(pod.number, None) is not None:
                self._cluster.suppose(pod.node, pod.grants, pod.demand, -1)
                self._recount(pod.node)

    def undo(self) -> None:
        """Give the nodes their plain values back."""
        for pod in self._freed.values():
            self._cluster.suppose(pod.node, pod.grants, pod.demand, -1)
        self._freed.clear()
