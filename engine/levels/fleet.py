"""Elasticity from a forecast: how many nodes there should be, and which models have Pods before anybody asks.

Nodes are added for what waits, and so that what is free suits the bursts to be expected on top of what is in use or forecast over
their start-up time. They go on actuals only: when less has been in use for a whole cool-down; a forecast may keep them, never send
them away. Pods are started ahead where
room is free and a load costs more than holding them; idle ones that no forecast asks for go when holding them has cost what a load
does.
"""

from __future__ import annotations

from math import isqrt

from engine.capacity import FleetConfigured, ModelDemand
from engine.cluster import pick_gpus
from engine.commands import CreatePod, ScaleNodes
from engine.entities import Node, Pod
from engine.idle import ALIKE_US
from engine.reasons import Reason
from engine.tasks import PodState
from engine.turn import Turn

CREATED_PER_CHECK = 8
"""Pods that are started ahead at one look, so that a wrong forecast costs little."""
SPARE_PERMILLE = 1_100
"""Nodes stay for so many times what is forecast: small changes are no reason to go back and forth."""
STALE_HORIZONS = 2
"""A forecast older than so many of its shortest horizon counts for nothing."""


def check(turn: Turn) -> None:
    """Look at nodes, then at Pods."""
    config = turn.state.fleet.config
    if config is not None:
        _scale(turn, config)
    if turn.profile.warm_ahead and turn.state.fleet.forecast is not None:
        _let_go(turn)
        _start_ahead(turn)


# --- nodes ------------------------------------------------------------------------------------------------------------


def _scale(turn: Turn, config: FleetConfigured) -> None:
    state, fleet = turn.state, turn.state.fleet
    here = [node for node in state.cluster.nodes if fleet.owns(node) and node.up and not node.draining]
    asked = state.wanted_nodes if state.wanted_nodes else len(here)
    expected = _expected(turn, config)
    ahead = with_headroom(turn, max(fleet.mean_use, expected))
    waiting = _used_and_waiting(turn)
    needed = max(ahead, waiting)
    bounded = _bounded(config, _nodes_for(turn, config, needed))
    if bounded > asked:
        reason = Reason.FORECAST if expected >= fleet.mean_use and ahead > waiting else Reason.PENDING_WORK
        turn.count(reason)
        turn.order(ScaleNodes(bounded, reason))
        return
    if not fleet.peaks:
        return
    later = with_headroom(turn, max(fleet.mean_use, expected * SPARE_PERMILLE // 1000))
    kept = max(_nodes_for(turn, config, max(needed, later, fleet.peaks[0][1])), fleet.asked_lately(turn.now))
    kept = _bounded(config, kept)
    if kept < asked:
        turn.count(Reason.IDLE)
        turn.order(ScaleNodes(kept, Reason.IDLE, _leaving(here, len(here) - kept)))


def _bounded(config: FleetConfigured, nodes: int) -> int:
    return min(config.nodes_max, max(config.nodes_min, nodes))


def with_headroom(turn: Turn, used: int) -> int:
    """Return the thousandths of GPUs to have where so many are in use on average.

    The spread of a sum of independent bursts grows with the root of their number, so what must be free for them does too: a busy
    fleet gets by with a smaller share of itself than one of three GPUs.
    """
    filled = max(1, turn.profile.scale_fill_permille)
    return used * 1000 // filled + turn.profile.scale_headroom_permille * isqrt(1000 * used) // 1000


def _used_and_waiting(turn: Turn) -> int:
    """Return the thousandths of GPUs for what is in use, and for what waits to be worked off within `clear_us`."""
    used = turn.state.fleet.peaks[-1][1] if turn.state.fleet.peaks else 0
    clear_us = max(1, turn.profile.clear_us)
    waits = 0
    for line in turn.backlog.open_rooms:
        head = line.head()
        if not line.live or head is None:
            continue
        task = head[1]
        gpus = line.members * line.fit.demand.gpus * line.fit.demand.gpu_share
        run_us = max(1, task.predicted_us) // max(1, task.spec.slots)
        # What runs longer than the backlog may take needs its GPUs at once, but no more than those.
        waits += line.live * gpus * min(run_us, clear_us) // clear_us
    return used + waits


def _expected(turn: Turn, config: FleetConfigured) -> int:
    """Return the thousandths of GPUs that are expected to be in use on average while a node would start, at `scale_level`."""
    fleet = turn.state.fleet
    forecast = fleet.forecast
    if forecast is None or not is_fresh(turn):
        return 0
    horizon = fleet.horizon_of(config.start_us)
    return 1000 * fleet.quantile(horizon, turn.profile.scale_level) // forecast.horizons_us[horizon]


def _nodes_for(turn: Turn, config: FleetConfigured, gpus: int) -> int:
    """Return how many nodes of the fleet make so many thousandths of GPUs, besides those that are there anyway."""
    fleet = turn.state.fleet
    others = sum(
        1000 * len(node.gpus)
        for node in turn.state.cluster.nodes
        if not fleet.owns(node) and node.up and not node.draining
    )
    return -(-max(0, gpus - others) // (1000 * config.gpus))


def _leaving(here: list[Node], count: int) -> tuple[str, ...]:
    """Return the names of those that go.

    The emptiest go; of those, the ones onto whose GPUs models load slowest, for a fleet of quick ones waits less; then the ones
    that nobody used for longest, whose models are missed least; then the last to come.
    """
    if count <= 0:
        return ()
    order = sorted(here, key=lambda node: (_busy(node), -_slowness(node), _used_at(node), -node.index))
    return tuple(node.name for node in order[:count])


def _slowness(node: Node) -> int:
    """Return how long loads onto its GPUs take by what was measured, in steps of what is alike; 0: not known."""
    return int(sum([gpu.load_us for gpu in node.gpus])) // (ALIKE_US * max(1, len(node.gpus)))


def _used_at(node: Node) -> int:
    return int(max([pod.idle_since for pod in node.pods.values()], default=0))


def _busy(node: Node) -> int:
    return sum([sum([grant.share for grant in pod.grants]) for pod in node.pods.values() if pod.tasks])


# --- Pods -------------------------------------------------------------------------------------------------------------


def wanted_ahead(turn: Turn, each: ModelDemand) -> int:
    """Return how many Pods of a model to have, by the newsvendor's rule: the last one is worth its hold against a load."""
    fleet = turn.state.fleet
    forecast = fleet.forecast
    if forecast is None:
        return 0
    horizon_us = forecast.horizons_us[0]
    load_us = max(1, turn.profile.reload_us)
    hold_us = horizon_us * turn.profile.hold_permille // 1000
    level = 1000 * load_us // (load_us + max(1, hold_us))
    if level < forecast.levels_permille[0]:
        return 0
    run_us = each.run_us[0][_not_above(forecast.levels_permille, level)]
    return -(-run_us // (horizon_us * each.slots))


def _not_above(levels: tuple[int, ...], level: int) -> int:
    """Return the place of the highest given level that is not above one."""
    found = 0
    for place, each in enumerate(levels):
        if each <= level:
            found = place
    return found


def _start_ahead(turn: Turn) -> None:
    state, backlog = turn.state, turn.backlog
    forecast = state.fleet.forecast
    if forecast is None or state.pending or not is_fresh(turn):
        return
    created = 0
    for each in forecast.models:
        lacking = wanted_ahead(turn, each) - len(backlog.by_model.get((each.method, each.model), ()))
        while lacking > 0 and created < CREATED_PER_CHECK:
            node = backlog.asked.fit(each.demand).best()
            grants = pick_gpus(node, each.demand) if node is not None else None
            if node is None or grants is None:
                break
            turn.count(Reason.FORECAST)
            turn.order(CreatePod(state.next_pod, node.name, each.method, each.model, grants, each.demand, each.slots))
            lacking -= 1
            created += 1


def is_fresh(turn: Turn) -> bool:
    """Tell whether there is a forecast that is not too old to go by."""
    fleet = turn.state.fleet
    return fleet.forecast is not None and fleet.forecast_at + STALE_HORIZONS * fleet.forecast.horizons_us[0] >= turn.now


def _let_go(turn: Turn) -> None:
    """Let idle Pods go that cost more to hold than to load again, or idle for too long, unless anybody is expected for them."""
    hold = turn.profile.hold_permille
    forecast = turn.state.fleet.forecast
    if forecast is None or not is_fresh(turn):
        return
    longest_us = turn.limits.idle_ttl_us
    wanted = {(each.method, each.model): wanted_ahead(turn, each) for each in forecast.models}
    idle = turn.backlog.idle
    for number in sorted(idle):  # a recovered engine has them in another order
        pod = idle[number]
        key = (pod.method, pod.model)
        worth_us = turn.backlog.idle_pods.load_us(pod) * 1000 // hold if hold else longest_us
        if not _is_idle(pod) or turn.now - pod.idle_since < min(longest_us, worth_us):
            continue
        if len(turn.backlog.by_model.get(key, ())) <= wanted.get(key, 0) or turn.is_kept(pod):
            continue
        turn.delete(pod, Reason.IDLE)


def _is_idle(pod: Pod) -> bool:
    return not pod.tasks and pod.state in (PodState.READY, PodState.IDLE)
