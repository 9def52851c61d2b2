"""A State as plain data and back: what a recovery starts from, and what two states are compared by."""

from __future__ import annotations

from hashlib import sha256
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from engine import codec
from engine.capacity import DemandForecast, FleetConfigured
from engine.codec import Plain, from_plain, to_plain
from engine.entities import Claim, Deployment, Gpu, Group, Node, Pod, Task, Tenant
from engine.limits import Limits
from engine.resources import Demand, GpuGrant, GpuSpec, NodeSpec
from engine.tasks import Estimate, FailureCause, PodState, TaskSpec, TaskState

if TYPE_CHECKING:
    from engine.state import State

_COUNTERS = (
    "now",
    "next_pod",
    "next_seq",
    "next_tenant",
    "next_group",
    "floor",
    "wanted_nodes",
    "pending",
    "deployed",
    "placed",
)
_TENANT = ("seq", "weight", "max_pending", "max_running", "pending", "running", "vtime", "credit", "floor")
_GROUP = ("seq", "live", "pending", "placed", "vtime", "credit")
_GPU = ("uuid", "model", "memory_bytes", "healthy", "present", "drained", "share_free", "memory_free", "load_us")
_POD = ("number", "method", "model", "slots", "created_at", "idle_since", "stopping_since", "reason", "claimed_by")
_TASK = (
    "seq",
    "admitted",
    "submitted_at",
    "pending_since",
    "deadline",
    "attempt",
    "failures",
    "preemptions",
    "cancel_requested",
    "retry_at",
    "live",
    "rank_started",
    "done",
    "ordered_at",
    "started_at",
    "stopping_since",
    "finished_at",
    "progress_done",
    "progress_total",
    "checkpoint",
    "result",
    "detail",
    "stop_reason",
    "charged",
    "memory_floor",
    "alone",
    "ran_us",
    "kept_us",
    "began_at",
    "kept_until",
)

_GETTERS: dict[tuple[str, ...], attrgetter[tuple[Any, ...]]] = {
    names: attrgetter(*names) for names in (_TENANT, _GROUP, _GPU, _POD, _TASK)
}
_TASK_SETTERS = [getattr(Task, name).__set__ for name in _TASK]


def take(state: State) -> bytes:
    """Return a snapshot of a state between two steps."""
    return codec.dumps([codec.VERSION, to_data(state)])


def restore(snapshot: bytes) -> State:
    """Return the state of a snapshot; raises CodecError."""
    plain = codec.loads(snapshot)
    if not isinstance(plain, list) or len(plain) != 2:
        raise codec.CodecError("the snapshot is no list of version and state")
    codec.check_version(plain[0])
    try:
        return from_data(plain[1])
    except codec.CodecError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise codec.CodecError(f"the snapshot is damaged: {error!r}") from error


def digest(state: State) -> str:
    """Return a SHA-256 over the whole state besides its time: a step in which nothing happens changes nothing."""
    data = to_data(state)
    del data["counters"]["now"]
    return sha256(codec.dumps(data)).hexdigest()


def to_data(state: State) -> Plain:
    """Return everything a state holds, without its derived parts, as plain data."""
    cluster = state.cluster
    return {
        "limits": to_plain(state.limits),
        "counters": {name: getattr(state, name) for name in _COUNTERS},
        "columns": list(cluster.columns),
        "gpu_models": list(cluster.models),
        "tenants": {t.name: _get(t, _TENANT) for t in state.tenants.values()},
        "groups": [
            [g.tenant.name, g.name, g.node.index if g.node else -1, *_get(g, _GROUP)] for g in state.groups.values()
        ],
        "idle_groups": [list(key) for key in state.idle_groups],
        "nodes": [_node(node) for node in cluster.nodes],
        "pods": [_pod(pod) for pod in state.pods.values()],
        "tasks": [_task(task) for task in state.tasks.values()],
        "terminal": list(state.terminal),
        "claims": [
            [c.req_no, c.node.index, to_plain(c.grants), to_plain(c.demand), list(c.waits_for)]
            for c in state.claims.values()
        ],
        "deployments": [_deployment(deployment) for deployment in state.deployments.values()],
        "ignored": dict(sorted(state.ignored.items())),
        "outcomes": dict(sorted((str(k), v) for k, v in state.outcomes.items())),
        **_faults(state),
        **_capacity(state),
        **_loads(state),
    }


def _loads(state: State) -> dict[str, Plain]:
    """Nothing where no load from a known place was seen."""
    return {"loads_us": list(state.loads_us)} if any(state.loads_us) else {}


def _capacity(state: State) -> dict[str, Plain]:
    """Nothing where there is neither a fleet nor a forecast. Of the fourth entry only older versions know."""
    fleet = state.fleet
    if fleet.config is None and fleet.forecast is None and not fleet.peaks:
        return {}
    config, forecast = to_plain(fleet.config), to_plain(fleet.forecast)
    peaks = [list(each) for each in fleet.peaks]
    use = [fleet.looked_at, fleet.mean_use, [list(each) for each in fleet.asked]]
    return {"fleet": [config, forecast, fleet.forecast_at, 0, peaks, *use]}


def _faults(state: State) -> dict[str, Plain]:
    """Nothing where no GPU has failed, as in snapshots from before faults were counted."""
    found: dict[str, Plain] = {}
    if state.faults:
        seen = sorted(state.faults.items())
        found["faults"] = [[node, gpu, [list(fault) for fault in each]] for (node, gpu), each in seen]
    if state.resting:
        found["resting"] = [[node, gpu, until] for (node, gpu), until in state.resting.items()]
    return found


def _get(item: Any, names: tuple[str, ...]) -> list[Plain]:
    return list(_GETTERS[names](item))


def _set(item: Any, names: tuple[str, ...], values: list[Plain]) -> None:
    for name, value in zip(names, values, strict=True):
        setattr(item, name, value)


def _node(node: Node) -> Plain:
    return {
        "spec": to_plain(node.spec),
        "up": node.up,
        "draining": node.draining,
        "cordoned": node.cordoned,
        "exclusive": node.exclusive.seq if node.exclusive is not None else -1,
        "gpus": [_get(gpu, _GPU) for gpu in node.gpus],
        "free": node.free,
        "models": list(node.models),
        **_stock(node),
    }


def _stock(node: Node) -> dict[str, Plain]:
    """Return what is known of a node's caches beyond guesses; nothing where it never reported."""
    known: dict[str, Plain] = {}
    if node.tiers is not None:
        known["tiers"], known["expected"] = dict(node.tiers), dict(node.expected)
    if node.pins:
        known["pins"] = list(node.pins)
    return known


def _pod(pod: Pod) -> Plain:
    return {
        "values": _get(pod, _POD),
        "node": pod.node.index,
        "demand": to_plain(pod.demand),
        "grants": to_plain(pod.grants),
        "state": str(pod.state),
        "tasks": pod.tasks,
        "doomed": to_plain(pod.doomed),
        **({"loads_from": pod.loads_from} if pod.loads_from >= 0 else {}),
    }


def _deployment(d: Deployment) -> Plain:
    plain = [d.model, d.method, to_plain(d.demand), d.slots, d.pods]
    # The list of who wants them is left out where it says nothing more: older builds read such snapshots, too.
    return plain if d.wanted == {"": d.pods} else [*plain, d.wanted]


def _task(task: Task) -> Plain:
    return {
        "spec": to_plain(task.spec),
        "estimate": to_plain(task.estimate),
        "state": str(task.state),
        "cause": to_plain(task.cause),
        "pods": task.pods,
        "values": _get(task, _TASK),
    }


def from_data(data: Plain) -> State:
    """Return the state that plain data describes."""
    from engine.state import State

    state = State(from_plain(Limits, data["limits"]))
    data["counters"].setdefault("placed", 0)  # snapshots from before placements were counted
    for name in _COUNTERS:
        setattr(state, name, data["counters"][name])
    for name, values in data["tenants"].items():
        tenant = state.tenants[name] = Tenant(name, 0)
        _set(tenant, _TENANT, values)
    by_seq: dict[int, Group] = {}
    group_nodes: list[tuple[Group, int]] = []
    for tenant_name, name, row, *values in data["groups"]:
        group = state.groups[tenant_name, name] = Group(state.tenants[tenant_name], name, 0)
        _set(group, _GROUP, values)
        by_seq[group.seq] = group
        group_nodes.append((group, row))
    for tenant_name, name in data["idle_groups"]:
        state.idle_groups[tenant_name, name] = None
    _restore_nodes(state, data, by_seq)
    for group, row in group_nodes:
        if row >= 0:
            group.node = state.cluster.nodes[row]
            group.node.groups[group.seq] = group
    for each in data["pods"]:
        _restore_pod(state, each)
    for each in data["tasks"]:
        _restore_task(state, each)
    for req_no in data["terminal"]:
        state.terminal[req_no] = None
    for req_no, row, grants, demand, waits_for in data["claims"]:
        node = state.cluster.nodes[row]
        claim = Claim(req_no, node, from_plain(tuple[GpuGrant, ...], grants), from_plain(Demand, demand))
        claim.waits_for = dict.fromkeys(waits_for)
        state.claims[req_no] = claim
    for model, method, demand, slots, pods, *rest in data["deployments"]:
        wanted = dict(rest[0]) if rest else {"": pods}
        state.deployments[method, model] = Deployment(model, method, from_plain(Demand, demand), slots, wanted)
    state.ignored.update(data["ignored"])
    state.outcomes.update(data["outcomes"])
    if "fleet" in data:
        _restore_capacity(state, data["fleet"])
    for name, gpu_uuid, seen in data.get("faults", []):
        state.faults[name, gpu_uuid] = [(at, source) for at, source in seen]
    for name, gpu_uuid, until in data.get("resting", []):
        state.resting[name, gpu_uuid] = until
    state.loads_us = list(data.get("loads_us", state.loads_us))
    for node in state.cluster.nodes:
        state.cluster.put(node)
    return state


def _restore_capacity(state: State, data: Plain) -> None:
    fleet = state.fleet
    config, forecast, fleet.forecast_at, _, peaks, *use = data
    fleet.config = None if config is None else from_plain(FleetConfigured, config)
    fleet.forecast = None if forecast is None else from_plain(DemandForecast, forecast)
    fleet.peaks = [(at, used) for at, used in peaks]
    if use:
        fleet.looked_at, fleet.mean_use, asked = use
        fleet.asked = [(at, nodes) for at, nodes in asked]


def _restore_nodes(state: State, data: Plain, by_seq: dict[int, Group]) -> None:
    cluster = state.cluster
    for name in data["columns"]:
        cluster.column(name)
    for name in data["gpu_models"]:
        cluster.model(name)
    for each in data["nodes"]:
        node = cluster.add(from_plain(NodeSpec, each["spec"]))
        node.up, node.draining = each["up"], each["draining"]
        node.cordoned = each.get("cordoned", node.draining)
        if each["exclusive"] >= 0:
            node.exclusive = by_seq[each["exclusive"]]
        node.gpus.clear()
        node.by_uuid.clear()
        for values in each["gpus"]:
            gpu = Gpu(GpuSpec(values[0], values[1], values[2]))
            _set(gpu, _GPU, values)
            node.gpus.append(gpu)
            node.by_uuid[gpu.uuid] = gpu
        cluster.fit_width(len(node.gpus))
        node.free[: len(each["free"])] = each["free"]
        for model in each["models"]:
            cluster.remember_model(node, model, state.limits.models_per_node)
        node.tiers = dict(each["tiers"]) if "tiers" in each else None
        node.expected = dict(each.get("expected", {}))
        for model in each.get("pins", ()):
            cluster.pin_model(node, model)


def _restore_pod(state: State, data: Plain) -> None:
    node = state.cluster.nodes[data["node"]]
    grants = from_plain(tuple[GpuGrant, ...], data["grants"])
    pod = Pod(0, node, "", "", 1, from_plain(Demand, data["demand"]), grants)
    _set(pod, _POD, data["values"])
    pod.state = PodState(data["state"])
    pod.tasks = dict(data["tasks"])
    pod.doomed = None if data["doomed"] is None else FailureCause(data["doomed"])
    pod.loads_from = data.get("loads_from", -1)
    state.pods[pod.number] = pod
    node.pods[pod.number] = pod


def _restore_task(state: State, data: Plain) -> None:
    spec = from_plain(TaskSpec, data["spec"])
    estimate = None if data["estimate"] is None else from_plain(Estimate, data["estimate"])
    tenant = state.tenants[spec.tenant]
    task = Task(spec, 0, tenant, None, 0, estimate)
    values = data["values"]
    if len(values) in (len(_TASK) - 4, len(_TASK) - 1):
        # Snapshots from before run times, or running checkpoints, were kept.
        values = [*values, *[0] * (len(_TASK) - len(values))]
    for put, value in zip(_TASK_SETTERS, values, strict=True):
        put(task, value)
    if spec.group:
        task.group = state.groups.get((spec.tenant, spec.group)) or Group(tenant, spec.group, -1)
    task.state = TaskState(data["state"])
    task.cause = None if data["cause"] is None else FailureCause(data["cause"])
    task.pods = list(data["pods"])
    state.tasks[task.req_no] = task
