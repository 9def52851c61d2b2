"""Levels 3 and 4, placement and binding: which node, which GPUs, which Pod, for whoever is next."""

from __future__ import annotations

from heapq import heappop, heappush, heapreplace

from engine.entities import Pod, Task
from engine.kinds import Kind, RoomLine, WarmLine
from engine.levels.backfill import place_in_order
from engine.levels.choice import bind_warm, choose_node, room_version
from engine.levels.creation import create_pod
from engine.levels.gangs import place_gang
from engine.levels.models import look_back, may_leave, next_for_room, stands_back
from engine.levels.room import claim, make_room
from engine.levels.sharing import choose_pod, wants_another
from engine.lines import Rank
from engine.turn import Turn


def place(turn: Turn) -> None:
    """Place waiting tasks until nothing more fits: in warm Pods first, then in new ones, then where idle Pods can make room.

    Kinds of warm Pods do not compete with each other, so each is served by itself, in the order of their keys; room is what all
    compete for, so there the next one of all lines is served.
    """
    backlog = turn.backlog
    if backlog.waiting is not None:
        place_in_order(turn, backlog.waiting)
        return
    if not backlog.stirred and not reclaim(turn):
        return
    backlog.wake_by_changes()
    for line in list(backlog.active):
        if line.node < 0 and line.members == 1 and line.fit.best() is None:
            backlog.sleep(line)
    backlog.woken.clear()
    backlog.woken.update(backlog.active)
    turns = Turns(turn)
    while True:
        for kind in sorted(backlog.kinds_awake, key=lambda kind: kind.key):
            _serve_kind(turn, kind)
        best = turns.next()
        if best is not None:
            line, task = best
            if not _place_new(turn, line, task):
                backlog.sleep(line)
        elif not reclaim(turn):
            return
        if len(turn.commands) >= turn.limits.commands_per_step:
            turn.more = True
            return


def _serve_kind(turn: Turn, kind: Kind) -> None:
    """Fill the free slots of one kind of warm Pods with whoever is next among its lines."""
    backlog, awake = turn.backlog, kind.awake
    most, commands = turn.limits.commands_per_step, turn.commands
    while awake and len(commands) < most:
        best: tuple[Rank, Task] | None = None
        first: WarmLine | None = None
        aged_first = backlog.may_be_aged and backlog.is_turn_of_aged()
        for line in list(awake):
            head = None
            if kind.offers(line.need):
                head = (line.aged_head() if aged_first else None) or line.head()
            if head is None:
                backlog.sleep(line)
                if not awake:
                    return
            elif best is None or head[0] < best[0]:
                best, first = head, line
        if best is not None and first is not None and not _place_warm(turn, first, best[0], best[1]):
            backlog.sleep(first)


class Turns:
    """Who is next among the room lines that are awake, in lazy heaps: inside a step ranks only grow, unless a line is woken.

    The aged stand in a heap of their own as well, for when it is their turn.
    """

    __slots__ = ("_aged", "_backlog", "_heap", "_order")

    def __init__(self, turn: Turn) -> None:
        self._backlog = turn.backlog
        self._heap: list[tuple[Rank, int, RoomLine]] = []
        self._aged: list[tuple[Rank, int, RoomLine]] = []
        self._order = 0

    def next(self) -> tuple[RoomLine, Task] | None:
        """Return the line whose head is next, with the head; lines where nobody waits go to sleep."""
        heap, backlog = self._heap, self._backlog
        if backlog.woken:
            for line in list(backlog.woken):
                self._push(line)
            backlog.woken.clear()
        if self._aged and backlog.is_turn_of_aged():
            found = self._next_aged()
            if found is not None:
                return found
        while heap:
            rank, order, line = heap[0]
            head = line.head() if line.active else None
            if head is None:
                heappop(heap)
                if line.active:
                    backlog.sleep(line)
            elif head[0] != rank:
                heapreplace(heap, (head[0], order, line))
            else:
                return line, head[1]
        return None

    def _next_aged(self) -> tuple[RoomLine, Task] | None:
        aged = self._aged
        while aged:
            rank, order, line = aged[0]
            head = line.aged_head() if line.active else None
            if head is None:
                heappop(aged)
            elif head[0] != rank:
                heapreplace(aged, (head[0], order, line))
            else:
                return line, head[1]
        return None

    def _push(self, line: RoomLine) -> None:
        head = line.head() if line.active else None
        if head is not None:
            self._order += 1
            heappush(self._heap, (head[0], self._order, line))
            aged = line.aged_head() if self._backlog.may_be_aged else None
            if aged is not None:
                heappush(self._aged, (aged[0], self._order, line))
        elif line.active:
            self._backlog.sleep(line)


def _place_warm(turn: Turn, line: WarmLine, rank: Rank, task: Task) -> bool:
    """Bind a task to a slot of a warm Pod, unless another that has waited much longer takes the Pod's room."""
    pod = turn.backlog.pick_warm(line, task)
    if pod is None:
        return False
    if not pod.tasks and turn.profile.reclaim_idle and not turn.backlog.idle_pods.pays_for_load(pod, turn.now):
        if rank[0] >= 0 and turn.backlog.is_turn_of_aged() and _yield_to_aged(turn, task):
            return True
        if not (turn.cold_known and turn.cold is None) and _yield_to_cold(turn, rank, task, pod):
            return True
    pod, cost_us = choose_pod(turn, line, task, pod)
    room: RoomLine = task.lines[-1]
    if wants_another(turn, rank, task, cost_us) and (_place_new(turn, room, task) or claim_room(turn, task, room)):
        return True
    bind_warm(turn, task, pod)
    return True


def _place_new(turn: Turn, line: RoomLine, task: Task) -> bool:
    """Create a Pod for a task where there is room."""
    shape = task.shape
    if line.members > 1:
        return place_gang(turn, line, task, shape)
    node = choose_node(turn, line, task, shape)
    grants = line.fit.grants(node) if node is not None else None
    if node is None or grants is None:
        return False
    create_pod(turn, task, node, grants, shape.demand)
    return True


def _yield_to_cold(turn: Turn, rank: Rank, task: Task, pod: Pod) -> bool:
    """Give an idle Pod's room to a task that ranks before the one the Pod would serve, if that has waited long enough."""
    cold = turn.cold
    if not turn.cold_known or (cold is not None and cold[1].line_ticket != cold[3]):
        cold = turn.cold = _next_cold(turn)
        turn.cold_known = True
    if cold is None or cold[0] > rank:
        return False
    cold_rank, other, line, _ = cold
    if not may_leave(turn, pod, task, other, cold_rank[0] == rank[0]):
        return False
    return other is not task and claim_room(turn, other, line)


def _yield_to_aged(turn: Turn, task: Task) -> bool:
    """Give an idle Pod's room to an aged task, in the turn of the aged, when none of them waits for that Pod."""
    best: tuple[Rank, Task, RoomLine] | None = None
    for line in turn.backlog.open_rooms:
        if line.live and not line.active and line.members == 1:
            head = line.aged_head()
            if head is not None and (best is None or head[0] < best[0]) and not stands_back(turn, head[1]):
                best = (head[0], head[1], line)
    return best is not None and best[1] is not task and claim_room(turn, best[1], best[2])


def _next_cold(turn: Turn) -> tuple[Rank, Task, RoomLine, int] | None:
    best: tuple[Rank, Task, RoomLine, int] | None = None
    for line in turn.backlog.open_rooms:
        if line.live and not line.active and line.members == 1:
            head = next_for_room(turn, line)
            if head is not None and (best is None or head[0] < best[0]):
                best = (head[0], head[1], line, head[1].line_ticket)
    return best


def reclaim(turn: Turn) -> bool:
    """Make room for tasks that fit nowhere, from Pods that nobody uses; tell whether any room is being made."""
    backlog = turn.backlog
    if not turn.profile.reclaim_idle or not backlog.idle:
        return False
    version = (*room_version(turn), backlog.pushed)
    if backlog.no_room_at == version:
        return False
    waiting = []
    standing_back: Task | None = None
    for line in backlog.room_lines.values():
        if line.live and not line.active and line.members == 1 and line.failed_at != room_version(turn):
            head = next_for_room(turn, line)
            if head is not None:
                waiting.append((head[0], line, head[1]))
            elif standing_back is None and (first := line.head()) is not None:
                standing_back = first[1]
    waiting.sort(key=lambda item: item[0])
    if backlog.is_turn_of_aged():
        aged = [(head[0], line, head[1]) for _, line, _ in waiting if (head := line.aged_head()) is not None]
        waiting[:0] = sorted(aged, key=lambda item: item[0])[:1]
    made = False
    for _, line, task in waiting:
        if task.line_ticket and claim_room(turn, task, line):
            made = True
            backlog.wake(line)
    if standing_back is not None:
        look_back(turn, standing_back)
    elif not made and len(turn.state.claims) < turn.limits.claims:
        backlog.no_room_at = version
    return made


def claim_room(turn: Turn, task: Task, line: RoomLine) -> bool:
    """Claim room for a task where idle Pods can go."""
    if len(turn.state.claims) >= turn.limits.claims or line.failed_at == room_version(turn):
        return False
    found = make_room(turn, task, line)
    if found is None:
        line.failed_at = room_version(turn)
        return False
    claim(turn, task, found[0], found[1], line.fit.demand, found[2])
    return True
