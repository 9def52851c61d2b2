"""Gangs close together: the members on one node where that is possible, else on nodes of one rack, else wherever there is room.

A node says in which rack it stands by its label `rack`. Within what is chosen as few nodes as possible are used, and the smallest
room that suffices is taken, so that large room stays whole.
"""

from __future__ import annotations

from engine.entities import Node
from engine.kinds import RoomLine
from engine.levels.room import room_for
from engine.resources import GpuGrant, NodeSpec
from engine.turn import Turn

RACK = "rack"
"""Label of a node."""

Rooms = list[tuple[int, Node]]
"""(members that a node has room for, node)."""


def rack_of(spec: NodeSpec) -> str:
    """Return the rack of a node; empty when it does not say."""
    return dict(spec.labels).get(RACK, "")


def close_together(turn: Turn, line: RoomLine, members: int) -> list[tuple[Node, tuple[GpuGrant, ...]]] | None:
    """Return places for all members on one node or in one rack; None when neither has the room."""
    fit, cluster = line.fit, turn.state.cluster
    fit.refresh()
    rooms: Rooms = []
    racks: dict[str, Rooms] = {}
    for row, score in enumerate(fit.scores.tolist()):
        if score >= 0:
            node = cluster.nodes[row]
            room = (1 if fit.empty else room_for(turn, node, fit, members), node)
            rooms.append(room)
            rack = rack_of(node.spec)
            if rack:
                racks.setdefault(rack, []).append(room)
    one = [room for room in rooms if room[0] >= members]
    if one:
        return _take(
            turn, line, [(members, max(one, key=lambda room: (int(fit.scores[room[1].index]), -room[1].index))[1])]
        )
    plans = [_fewest(each, members) for each in racks.values() if sum(room for room, _ in each) >= members]
    if not plans:
        return None
    return _take(turn, line, min(plans, key=lambda plan: (len(plan), plan[0][1].index)))


def _fewest(rooms: Rooms, members: int) -> Rooms:
    """Return (members, node) on as few nodes as possible; the last part goes to the smallest room that suffices."""
    rest = sorted(rooms, key=lambda room: (-room[0], room[1].index))
    plan: Rooms = []
    while members:
        enough = [room for room in rest if room[0] >= members]
        room = enough[-1] if enough else rest[0]
        rest.remove(room)
        count = min(members, room[0])
        plan.append((count, room[1]))
        members -= count
    return plan


def _take(turn: Turn, line: RoomLine, plan: Rooms) -> list[tuple[Node, tuple[GpuGrant, ...]]] | None:
    """Choose the devices; everything is given back on leaving."""
    cluster, fit = turn.state.cluster, line.fit
    places: list[tuple[Node, tuple[GpuGrant, ...]]] = []
    with cluster.trial():
        for count, node in plan:
            for _ in range(count):
                grants = fit.grants(node) if fit.fits(node) else None
                if grants is None:
                    return None
                cluster.take(node, grants, fit.demand)
                places.append((node, grants))
    return places
