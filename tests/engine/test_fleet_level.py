"""Nodes come for what waits and for what is forecast, and go on actuals only; Pods are held while that is cheaper than loading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from engine import codec, profiles, snapshot
from engine.capacity import CapacityChecked, DemandForecast, Fleet, FleetConfigured, ModelDemand
from engine.commands import CreatePod, DeletePod, ScaleNodes
from engine.events import NodeDrainRequested, NodeLost, PodStarted, TaskCancelRequested
from engine.replay import recover, replay
from engine.resources import Demand
from engine.tasks import SECOND

MINUTE = 60 * SECOND
FLEET = FleetConfigured(1, 10, 1, 60 * SECOND, 120 * SECOND, "e-")
DEMAND = Demand(gpus=1)


def _forecast(gpus: float, models: tuple[ModelDemand, ...] = (), low: float | None = None) -> DemandForecast:
    """Return a forecast in which so many GPUs are busy at P90, over 5 and 15 minutes."""
    rows = tuple(
        tuple(round(each * minutes * MINUTE) for each in (gpus if low is None else low, gpus, gpus))
        for minutes in (5, 15)
    )
    return DemandForecast((5 * MINUTE, 15 * MINUTE), (500, 900, 950), rows, models)


def _model(name: str, pods: tuple[float, float, float]) -> ModelDemand:
    rows = tuple(tuple(round(each * minutes * MINUTE) for each in pods) for minutes in (5, 15))
    return ModelDemand("text_to_image", name, DEMAND, 1, rows)


def _scaled(commands) -> list[ScaleNodes]:
    return [each for each in commands if isinstance(each, ScaleNodes)]


@pytest.fixture
def fleet(desk, node) -> Callable:
    """Return a desk with a fleet of so many nodes of one GPU that have joined."""

    def make(nodes: int = 1, **changes):
        made = desk(
            replace(profiles.load("aigc"), scale_fill_permille=1000, **{"scale_headroom_permille": 0, **changes})
        )
        made.step(FLEET)
        for number in range(nodes):
            made.node(f"e-{number}")
        return made

    return make


def test_a_high_quantile_of_the_demand_is_there_before_it_comes(fleet) -> None:
    made = fleet()
    (order,) = _scaled(made.step(_forecast(4.2), CapacityChecked()))
    assert (order.nodes, order.reason) == (5, "forecast")
    assert not _scaled(made.step(CapacityChecked())), "what was asked for is not asked for again"


def test_what_waits_brings_nodes_whatever_the_forecast_says(fleet, task) -> None:
    made = fleet()
    made.submit(*(task(f"t{number}", demand=DEMAND, model="m", method="text_to_image") for number in range(5)))
    (order,) = _scaled(made.step(_forecast(0.1), CapacityChecked()))
    assert order.nodes > 1
    assert order.reason == "pending_work"


def test_no_more_nodes_are_asked_for_than_there_may_be(fleet) -> None:
    (order,) = _scaled(fleet().step(_forecast(40.0), CapacityChecked()))
    assert order.nodes == FLEET.nodes_max


def test_a_low_forecast_sends_no_node_away_that_was_in_use_during_the_cool_down(fleet, task) -> None:
    made = fleet(3)
    made.answer(made.submit(*(task(f"t{n}", demand=DEMAND, model="m", method="text_to_image") for n in range(3))))
    made.step(_forecast(0.0), CapacityChecked())
    for number in range(3):
        made.finish(f"t{number}")
    assert not _scaled(made.step(_forecast(0.0), CapacityChecked(), after=60))
    orders = []
    for _ in range(4):
        orders += _scaled(made.step(_forecast(0.0), CapacityChecked(), after=60))
    assert [order.nodes for order in orders] == [1]
    assert orders[0].reason == "idle"
    assert len(orders[0].leave) == 2


def test_a_forecast_keeps_nodes_that_nothing_uses(fleet) -> None:
    made = fleet(3)
    for _ in range(10):
        assert not _scaled(made.step(_forecast(3.0), CapacityChecked(), after=60))


def test_a_forecast_that_is_old_counts_for_nothing(fleet) -> None:
    made = fleet()
    made.step(_forecast(6.0))
    assert not _scaled(made.step(CapacityChecked(), after=1200))


def test_the_emptiest_nodes_leave_and_none_of_others(fleet, node, task) -> None:
    made = fleet(3)
    made.node("own")
    made.answer(made.submit(task("t", demand=DEMAND, model="m", method="text_to_image", run_limit_us=None)))
    busy = made.where("t")
    orders = []
    for _ in range(8):
        orders += _scaled(made.step(_forecast(0.0), CapacityChecked(), after=60))
    left = [name for order in orders for name in order.leave]
    assert left
    assert busy not in left
    assert "own" not in left


def test_of_empty_nodes_those_leave_that_load_slowest_then_those_unused_for_longest(fleet, task) -> None:
    def left(loads: tuple[int, ...], keep: float) -> list[str]:
        made = fleet(len(loads))
        for number, load_s in enumerate(loads):
            made.submit(task(f"t{number}", demand=DEMAND, model=f"m{number}", method="text_to_image"))
            (pod,) = [pod.number for pod in made.engine.state.pods.values() if pod.model == f"m{number}"]
            made.answer(made.step(PodStarted(pod), after=load_s))
        used = {made.where(f"t{number}"): number for number in range(len(loads))}
        for number in range(len(loads)):
            made.finish(f"t{number}")
        orders = []
        for _ in range(10):
            orders += _scaled(made.step(_forecast(keep), CapacityChecked(), after=60))
        return [f"t{used[name]}" for order in orders for name in order.leave]

    assert left((5, 50, 5), 1.8) == ["t1"], "the slowest"
    assert left((5, 5, 5), 1.8) == ["t0"], "of alike ones that whose model was used longest ago"


def test_there_is_no_order_without_a_fleet(desk) -> None:
    made = desk(replace(profiles.load("aigc"), scale_after_us=0))
    made.node("e-0")
    assert not _scaled(made.step(_forecast(8.0), CapacityChecked()))
    made.step(FLEET)
    made.step(FleetConfigured(0, 0, 1, 0, 0))
    assert not _scaled(made.step(_forecast(8.0), CapacityChecked()))


def test_it_never_goes_back_and_forth_while_the_demand_stays(fleet) -> None:
    made = fleet(4)
    orders = []
    for number in range(120):
        swing = 3.0 + 0.2 * (number % 2)
        orders += _scaled(made.step(_forecast(swing), CapacityChecked(), after=30))
    assert orders == []


def test_pods_are_started_ahead_for_models_that_are_expected(fleet) -> None:
    made = fleet(2, warm_ahead=True, hold_permille=10)
    commands = made.step(_forecast(2.0, (_model("m", (0.2, 0.9, 1.4)),)), CapacityChecked())
    created = [each for each in commands if isinstance(each, CreatePod)]
    assert [(each.model, each.req_no) for each in created] == [("m", "")]
    made.step(*(PodStarted(each.pod) for each in created))
    again = made.step(_forecast(2.0, (_model("m", (0.2, 0.9, 1.4)),)), CapacityChecked())
    assert not [each for each in again if isinstance(each, CreatePod)]


def test_the_dearer_holding_is_the_fewer_pods_are_started_ahead(fleet) -> None:
    def started(hold: int) -> int:
        made = fleet(4, warm_ahead=True, hold_permille=hold)
        commands = made.step(_forecast(2.0, (_model("m", (0.0, 1.5, 3.0)),)), CapacityChecked())
        return len([each for each in commands if isinstance(each, CreatePod)])

    assert [started(hold) for hold in (1, 10, 1000)] == [3, 2, 0]


def test_idle_pods_that_nobody_is_expected_for_go_when_holding_has_cost_a_load(fleet, task) -> None:
    made = fleet(1, warm_ahead=True, hold_permille=100)
    made.answer(made.submit(task("t", demand=DEMAND, model="old", method="text_to_image")))
    made.finish("t")
    early = made.step(_forecast(1.0), CapacityChecked(), after=10)
    late = made.step(_forecast(1.0), CapacityChecked(), after=400)
    assert not [each for each in early if isinstance(each, DeletePod)]
    assert [each.reason for each in late if isinstance(each, DeletePod)] == ["idle"]


def test_a_deployment_keeps_its_pods_whatever_the_forecast_says(fleet) -> None:
    from engine.events import ModelDeployed

    made = fleet(1, warm_ahead=True, hold_permille=1000)
    made.answer(made.step(ModelDeployed("m", "text_to_image", DEMAND)))
    late = made.step(_forecast(0.0), CapacityChecked(), after=500)
    assert not [each for each in late if isinstance(each, DeletePod)]


def test_a_recovery_goes_on_where_the_engine_was_and_a_replay_decides_the_same(fleet, task) -> None:
    made = fleet(2, warm_ahead=True)
    made.answer(made.submit(task("t", demand=DEMAND, model="m", method="text_to_image")))
    made.step(_forecast(2.5, (_model("m", (0.5, 0.9, 1.0)),)), CapacityChecked())
    made.finish("t")
    for _ in range(6):
        made.step(_forecast(0.5), CapacityChecked(), after=60)
    made.step(NodeDrainRequested("e-1", leaving=True), NodeLost("e-1"))
    profile = made.engine.profile
    assert replay(made.journal.records, profile).difference is None
    recovered = recover(None, made.journal.records, profile)
    assert recovered.state.digest() == made.engine.state.digest()
    restored = snapshot.restore(made.engine.snapshot())
    assert restored.digest() == made.engine.state.digest()
    assert restored.fleet.peaks == made.engine.state.fleet.peaks
    assert restored.fleet.mean_use == made.engine.state.fleet.mean_use
    assert restored.fleet.asked == made.engine.state.fleet.asked


def test_forecasts_whose_parts_do_not_fit_together_change_nothing(desk) -> None:
    made = desk()
    for bad in (
        DemandForecast((), (), ()),
        DemandForecast((MINUTE,), (900,), ()),
        DemandForecast((MINUTE,), (900,), ((1, 2),)),
        DemandForecast((0,), (900,), ((1,),)),
        DemandForecast((MINUTE,), (900,), ((1,),), (ModelDemand("x", "m", DEMAND, 0, ((1,),)),)),
        DemandForecast((MINUTE,), (900,), ((1,),), (ModelDemand("x", "m", DEMAND, 1, ((1, 2),)),)),
        FleetConfigured(5, 2, 1, 0, 0),
        FleetConfigured(0, 2, 0, 0, 0),
    ):
        before = made.engine.state.ignored.get(type(bad).__name__, 0)
        made.step(bad)
        assert made.engine.state.ignored[type(bad).__name__] == before + 1


def test_the_peak_of_the_cool_down_is_remembered_and_no_longer() -> None:
    fleet = Fleet()
    fleet.config = replace(FLEET, cool_down_us=100)
    for now, used in ((0, 3), (10, 5), (20, 2), (60, 1)):
        fleet.note_use(now, used)
    assert fleet.peaks == [(10, 5), (20, 2), (60, 1)]
    fleet.note_use(111, 1)
    assert fleet.peaks[0] == (20, 2)


def test_an_order_from_before_there_were_fleets_is_still_read() -> None:
    assert codec.decode(b'[1,"ScaleNodes",{"nodes":3,"reason":"idle"}]') == ScaleNodes(3, "idle")


def test_an_idle_pod_is_kept_as_long_as_somebody_is_expected_for_it(fleet, task) -> None:
    made = fleet(1, warm_ahead=True, hold_permille=10)
    made.answer(made.submit(task("t", demand=DEMAND, model="m", method="text_to_image")))
    made.finish("t")
    gone = []
    for _ in range(20):
        gone += made.step(_forecast(1.0, (_model("m", (0.1, 0.5, 0.9)),)), CapacityChecked(), after=60)
    assert not [each for each in gone if isinstance(each, DeletePod)]
    late = made.step(_forecast(1.0), CapacityChecked(), after=60)
    assert [each.reason for each in late if isinstance(each, DeletePod)] == ["idle"]


def test_what_is_free_for_bursts_grows_with_the_root_of_what_is_expected(fleet) -> None:
    def ordered(gpus: float) -> int:
        made = fleet(scale_headroom_permille=1000)
        made.step(replace(FLEET, nodes_max=100))
        (order,) = _scaled(made.step(_forecast(gpus), CapacityChecked()))
        return order.nodes

    assert [ordered(gpus) for gpus in (4.0, 16.0, 64.0)] == [6, 20, 72]


def test_nodes_that_were_asked_for_have_a_cool_down_from_when_they_are_there(fleet, task) -> None:
    made = fleet()
    made.submit(*(task(f"t{number}", demand=DEMAND, model="m", method="text_to_image") for number in range(5)))
    (order,) = _scaled(made.step(CapacityChecked()))
    made.step(*(TaskCancelRequested(f"t{number}") for number in range(5)))
    early, late = [], []
    for second in range(30, 400, 30):
        found = _scaled(made.step(CapacityChecked(), after=30))
        (early if second + 1 <= (FLEET.start_us + FLEET.cool_down_us) // SECOND else late).extend(found)
    assert order.nodes > 1
    assert early == []
    assert [each.nodes for each in late] == [1]


def test_the_mean_of_the_use_follows_it_within_a_few_start_up_times() -> None:
    fleet = Fleet()
    fleet.config = replace(FLEET, start_us=100)
    fleet.note_use(0, 8000)
    assert fleet.mean_use == 8000, "the first look is all that is known"
    fleet.note_use(100, 0)
    assert fleet.mean_use == 4000
    fleet.note_use(100, 9000)
    assert fleet.mean_use == 4000, "looks at the same moment count once"
    for now in range(200, 1000, 100):
        fleet.note_use(now, 0)
    assert fleet.mean_use < 100


def test_a_snapshot_from_before_the_mean_was_kept_is_still_restored(fleet) -> None:
    made = fleet(2)
    made.step(_forecast(2.0), CapacityChecked())
    data = snapshot.to_data(made.engine.state)
    assert len(data["fleet"]) == 8
    data["fleet"] = data["fleet"][:5]
    restored = snapshot.from_data(data)
    assert (restored.fleet.mean_use, restored.fleet.asked) == (0, [])
    assert restored.fleet.peaks == made.engine.state.fleet.peaks
