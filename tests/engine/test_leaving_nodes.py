"""A node that drains itself to leave takes work again when it comes back; one that an operator drained does not."""

from __future__ import annotations

import pytest

from engine import invariants, profiles
from engine.events import NodeDrainRequested, NodeJoined, NodeLost, NodeUncordoned
from engine.resources import GpuSpec, NodeSpec
from engine.scheduler import Engine
from engine.snapshot import restore

NODE = NodeSpec("n", (GpuSpec("g", "a100", 1 << 30),))


def _engine(*events: object) -> Engine:
    engine = Engine(profiles.load("fifo"))
    for now, event in enumerate((NodeJoined(NODE), *events), 1):
        engine.step(now, [event])
        invariants.check(engine.state)
    return engine


LEAVING, CORDON = NodeDrainRequested("n", leaving=True), NodeDrainRequested("n")


@pytest.mark.parametrize(
    ("events", "draining"),
    [
        ((LEAVING,), True),
        ((LEAVING, NodeLost("n"), NodeJoined(NODE)), False),
        ((CORDON, NodeLost("n"), NodeJoined(NODE)), True),
        ((CORDON, LEAVING, NodeLost("n"), NodeJoined(NODE)), True),
        ((LEAVING, CORDON, NodeLost("n"), NodeJoined(NODE)), True),
        ((CORDON, NodeLost("n"), NodeUncordoned("n"), NodeJoined(NODE)), False),
        ((CORDON, NodeUncordoned("n")), False),
    ],
)
def test_only_an_operators_drain_outlives_a_restart(events: tuple[object, ...], draining: bool) -> None:
    engine = _engine(*events)
    assert engine.state.cluster.by_name["n"].draining is draining
    again = Engine.from_state(profiles.load("fifo"), restore(engine.snapshot()))
    again.step(100, [NodeLost("n")])
    again.step(101, [NodeJoined(NODE)])
    engine.step(100, [NodeLost("n")])
    engine.step(101, [NodeJoined(NODE)])
    assert again.state.digest() == engine.state.digest()
