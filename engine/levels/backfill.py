"""Levels 3 and 4 in exact order: for policies under which who may start depends on who comes before, whatever each waits for.

Head-of-line blocking, EASY and conservative backfill, shares of what is held now, quotas. `binding.place` serves the others, for
which it is enough that each line is in order.
"""

from __future__ import annotations

from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

from engine.entities import Node, Task
from engine.kinds import RoomLine, Shape
from engine.levels.choice import bind_warm, choose_node, room_version
from engine.levels.creation import create_pod
from engine.levels.endings import run_of
from engine.levels.gangs import place_gang, place_gang_within
from engine.levels.ordering import AGED
from engine.levels.quotas import Balance, gpus_of
from engine.levels.reservations import Plan
from engine.levels.room import claim, make_room
from engine.levels.waiting import FIRST, Bucket, Entry, Place, Waiting
from engine.reasons import Reason
from engine.tasks import NEVER, Micros, PodState, TaskState
from engine.turn import Turn

MOST_BLOCKED = 64
"""How many of the first tasks that find no room preemption looks at in one step."""

Standing = tuple[tuple[int, ...], int, int, int, int, int, int, int]
"""(quota, band, share, tenant, group's virtual time, group, key, sequence number): smaller is sooner."""


class _Next(NamedTuple):
    standing: Standing
    number: int
    """Of the bucket: a task that moves to another one stands twice until its old entry is met."""
    bucket: Bucket
    entry: Entry


def place_in_order(turn: Turn, waiting: Waiting) -> None:
    """Place waiting tasks, the next one first, as far as the profile lets others pass those that find no room."""
    backlog = turn.backlog
    backlog.wake_by_changes()
    if not turn.profile.warm_reuse:
        for pod in list(backlog.idle.values()):
            if not turn.is_kept(pod):
                turn.delete(pod, Reason.IDLE)
    waiting.blocked.clear()
    while True:
        waiting.moved = False
        placed = _Round(turn, waiting).run()
        if turn.more:
            return
        if not (placed and waiting.moved):
            break
    waiting.all_may_start = False
    for line in list(backlog.active):
        backlog.sleep(line)
    for kind in list(backlog.kinds_awake):
        for warm in list(kind.awake):
            backlog.sleep(warm)
    backlog.woken.clear()


class _Round:
    """One pass through all that waits."""

    __slots__ = (
        "_heap",
        "_idle_goes",
        "_mode",
        "_open",
        "_passed",
        "_plan",
        "_quotas",
        "_refused",
        "_sees_all",
        "_turn",
        "_waiting",
    )

    def __init__(self, turn: Turn, waiting: Waiting) -> None:
        self._turn = turn
        self._waiting = waiting
        self._mode = turn.profile.backfill
        self._plan = Plan(turn)
        self._heap: list[_Next] = []
        self._passed: dict[tuple[object, ...], Place] = {}
        """Bucket -> the last of its tasks that was passed over."""
        self._refused: dict[tuple[object, ...], Micros] = {}
        """Bucket -> the shortest run time for which its room was refused for the sake of a reservation."""
        self._open: dict[tuple[object, ...], None] = {}
        """Buckets for which something may be free; without any nobody can start, whatever is reserved."""
        self._idle_goes = turn.profile.reclaim_idle
        self._sees_all = self._mode == "none" or turn.profile.ordering.preemptive or turn.profile.quotas is not None
        if waiting.accounts is not None:
            waiting.accounts.begin()
        waiting.rank_anew(turn.now)
        waiting.making.clear()
        waiting.held_back.clear()
        quotas = turn.profile.quotas
        self._quotas: Balance | None = None
        if quotas is not None and waiting.accounts is not None:
            self._quotas = Balance(quotas, list(turn.state.tenants.values()), waiting.accounts)
        waiting.balance = self._quotas

    def run(self) -> bool:
        """Go through the buckets; tell whether anything was placed."""
        turn, heap = self._turn, self._heap
        for bucket in self._candidates():
            self._push(bucket)
        if self._mode == "skip" and not self._sees_all:
            heap[:] = [each for each in heap if each.bucket.key in self._open]
        heapify(heap)
        placed = False
        while heap and (self._open or self._sees_all):
            if len(turn.commands) >= turn.limits.commands_per_step:
                turn.more = True
                return placed
            standing, number, bucket, entry = heap[0]
            current = bucket.after(self._passed.get(bucket.key, FIRST))
            if current is None:
                self._pop()
                continue
            now_at = self._standing(current)
            if now_at != standing:
                heapreplace(heap, _Next(now_at, number, bucket, current))
                continue
            task = entry[3]
            if self._may_not_start(task):
                self._pop()  # nor may the others in this bucket: they are the same tenant's and ask for the same
            elif self._start(bucket, task):
                placed = True
            elif not self._goes_on(bucket, entry):
                break
        return placed

    def _candidates(self) -> list[Bucket]:
        """Return the buckets to look at: all where it matters who is first, else those for which anything may be free."""
        waiting = self._waiting
        found = list(waiting.buckets.values())
        skips = self._mode == "skip" and self._quotas is None and not self._turn.profile.ordering.preemptive
        if not skips or waiting.all_may_start or (self._turn.backlog.idle and self._turn.profile.reclaim_idle):
            return found
        return [b for b in found if b.room.active or (b.warm is not None and b.warm.active)]

    def _push(self, bucket: Bucket) -> None:
        entry = bucket.entries[0]
        self._heap.append(_Next(self._standing(entry), len(self._heap), bucket, entry))
        if self._may_be_free(bucket):
            self._open[bucket.key] = None

    def _pop(self) -> None:
        """Leave a bucket be for this round."""
        self._open.pop(heappop(self._heap).bucket.key, None)

    def _may_be_free(self, bucket: Bucket) -> bool:
        """Tell whether there may be a slot or room for the tasks of a bucket."""
        warm, room = bucket.warm, bucket.room
        if (warm is not None and warm.kind.offers(warm.need)) or (self._turn.backlog.idle and self._idle_goes):
            return True
        if room.node >= 0 or (room.members > 1 and self._turn.profile.warm_reuse):
            return True
        return room.fit.best() is not None

    def _standing(self, entry: Entry) -> Standing:
        """Return where a task stands now; inside a step that only grows, as others of its tenant or queue are placed."""
        band, key, seq, task = entry
        quota = self._quotas.standing(task) if self._quotas is not None else ()
        ordering, accounts = self._turn.profile.ordering, self._waiting.accounts
        tenant, group = task.tenant, task.group
        if band == AGED or not (ordering.fair_tenants or ordering.shares):
            return quota, band, 0, -1, 0, -1, key, seq
        share = tenant.vtime
        if ordering.shares and accounts is not None:
            share = ordering.share(tenant, accounts)
        if group is None or not ordering.fair_groups:
            return quota, band, share, tenant.seq, 0, -1, key, seq
        return quota, band, share, tenant.seq, group.vtime, group.seq, key, seq

    def _may_not_start(self, task: Task) -> bool:
        tenant = task.tenant
        if tenant.max_running and tenant.running >= tenant.max_running:
            return True
        return self._quotas is not None and self._quotas.exceeded(task) is not None

    # --- starting ------------------------------------------------------------------------------------------------------

    def _start(self, bucket: Bucket, task: Task) -> bool:
        """Bind a task to a warm slot, to a new Pod, or to room that idle Pods make; tell whether that went."""
        shortest = self._refused.get(bucket.key)
        run_us = run_of(task)
        if shortest is not None and run_us >= shortest:
            return False
        shape: Shape = task.shape
        started = self._start_warm(bucket, task, run_us)
        if not started:
            if bucket.room.members > 1:
                started = self._start_gang(bucket.room, task, shape, run_us)
            else:
                started = self._start_new(bucket, task, shape, run_us) or self._claim(bucket.room, task, run_us)
        if started and self._quotas is not None:
            self._quotas.add(task.tenant, gpus_of(task))
        return started

    def _start_warm(self, bucket: Bucket, task: Task, run_us: Micros) -> bool:
        warm = bucket.warm
        if warm is None or not warm.kind.offers(warm.need):
            return False
        pod = self._turn.backlog.pick_warm(warm, task)
        if pod is None:
            return False
        if not self._plan.allows_in(pod, run_us):
            self._waiting.held_back[task.seq] = self._plan.blamed(pod.node)
            return False
        bind_warm(self._turn, task, pod)
        self._plan.changed(pod.node)
        return True

    def _start_new(self, bucket: Bucket, task: Task, shape: Shape, run_us: Micros) -> bool:
        turn, room = self._turn, bucket.room
        node = choose_node(turn, room, task, shape)
        if node is not None and self._plan.rows:
            node = self._allowed(room, task, node, run_us)
            if node is None:
                self._refused[bucket.key] = run_us
        if node is None:
            return False
        grants = room.fit.grants(node)
        assert grants is not None
        create_pod(turn, task, node, grants, shape.demand)
        self._plan.changed(node)
        return True

    def _allowed(self, room: RoomLine, task: Task, node: Node, run_us: Micros) -> Node | None:
        """Return the best node on which a task delays no reservation."""
        plan, fit = self._plan, room.fit
        if plan.allows(node, fit, 1, run_us):
            return node
        self._waiting.held_back[task.seq] = plan.blamed(node)
        if room.node >= 0:
            return None
        scores = fit.scores.copy()
        scores[node.index] = -1
        while True:
            row = int(scores.argmax())
            if scores[row] < 0:
                return None
            other = self._turn.state.cluster.nodes[row]
            if plan.allows(other, fit, 1, run_us):
                return other
            scores[row] = -1

    def _start_gang(self, room: RoomLine, task: Task, shape: Shape, run_us: Micros) -> bool:
        plan = self._plan
        if not plan.rows:
            return place_gang(self._turn, room, task, shape)
        if place_gang_within(self._turn, room, task, shape, plan, run_us):
            return True
        self._waiting.held_back[task.seq] = plan.reserved_for()
        return False

    def _claim(self, room: RoomLine, task: Task, run_us: Micros) -> bool:
        """Claim room for a task where idle Pods can go."""
        turn = self._turn
        if not turn.profile.reclaim_idle or not turn.backlog.idle or len(turn.state.claims) >= turn.limits.claims:
            return False
        version = room_version(turn)
        if room.failed_at == version:
            return False
        found = make_room(turn, task, room)
        if found is None:
            room.failed_at = version
            return False
        node, grants, pods = found
        if node.index in self._plan.rows:
            return False
        claim(turn, task, node, grants, room.fit.demand, pods)
        if self._waiting.accounts is not None and task.req_no in turn.state.claims:
            self._waiting.accounts.claims(task)
        self._plan.changed(node)
        return True

    # --- not starting --------------------------------------------------------------------------------------------------

    def _goes_on(self, bucket: Bucket, entry: Entry) -> bool:
        """Decide what follows when a task finds no room; tell whether anybody may pass it."""
        task, waiting, plan = entry[3], self._waiting, self._plan
        self._passed[bucket.key] = entry[:3]
        preemptive = self._turn.profile.ordering.preemptive or self._quotas is not None
        refused = bucket.key in self._refused or task.seq in waiting.held_back
        if len(waiting.blocked) < MOST_BLOCKED:
            waiting.blocked.append(task)
        most = {"easy": 1, "conservative": self._turn.profile.backfill_depth}.get(self._mode, 0)
        gang_first = bucket.room.members > 1 and not plan.made and self._anything_goes()
        if plan.made < most or gang_first:
            start = plan.reserve(task, bucket.room, task.shape)
            if start <= self._turn.now + 1 and bucket.room.members > 1:
                waiting.making[task.seq] = None
                self._send_idle_away(task)
            elif start != NEVER and not most:
                plan.forget(task)
        if self._mode == "none":
            return False
        if not refused:
            self._open.pop(bucket.key, None)
        if self._mode == "conservative" and plan.made < most:
            return True
        if not refused and not (preemptive and len(waiting.blocked) < MOST_BLOCKED) and bucket is self._heap[0].bucket:
            self._pop()  # the others in this bucket ask for the same, and there is none
        return True

    def _anything_goes(self) -> bool:
        """Tell whether any Pod is idle or going, or any attempt is being stopped."""
        turn = self._turn
        if turn.backlog.idle:
            return True
        tasks = turn.state.tasks
        return any(
            pod.state is PodState.STOPPING or any(tasks[r].state is TaskState.STOPPING for r in pod.tasks)
            for pod in turn.state.pods.values()
        )

    def _send_idle_away(self, task: Task) -> None:
        """Let the idle Pods go that stand where room is being made for a gang."""
        turn = self._turn
        for row, pods in self._plan.in_the_way(task).items():
            for pod in pods:
                turn.delete(pod, Reason.ROOM)
            self._plan.changed(turn.state.cluster.nodes[row])
