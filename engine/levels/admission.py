"""Level 1, admission: may a task enter? Refused at once, with the reason, or let in to wait."""

from __future__ import annotations

from engine.entities import Task
from engine.fit import possible
from engine.kinds import Shape
from engine.reasons import Reason
from engine.resources import WHOLE_GPU, Demand
from engine.tasks import Affinity, TaskSpec, TaskState
from engine.turn import Turn


def admit(turn: Turn, task: Task) -> None:
    """Admit or reject a task that was submitted."""
    refusal = _refusal(turn, task)
    if refusal is None:
        turn.let_in(task)
    else:
        reason, detail = refusal
        turn.tell(task, TaskState.REJECTED, reason, detail)


def _refusal(turn: Turn, task: Task) -> tuple[Reason, str] | None:
    state, spec, tenant = turn.state, task.spec, task.tenant
    shape: Shape = task.shape or turn.backlog.asked.shape_of(task)
    task.shape = shape
    if shape.wrong is None:
        shape.wrong = invalid_demand(spec.demand)
    wrong = shape.wrong or invalid(spec, turn.limits.gang_members)
    if wrong:
        return Reason.INVALID, wrong
    if task.misjudged:
        return Reason.INVALID, 'estimate.durations: the entry "*" is missing; every estimate carries one'
    if task.deadline is not None and task.deadline <= turn.now:
        return (
            Reason.DEADLINE_PASSED,
            f"start_deadline: {task.deadline} us is not later than now, {turn.now} us; send a later one",
        )
    if state.pending >= turn.limits.pending:
        return (
            Reason.QUEUE_FULL,
            f"{state.pending} tasks wait already, the limit is {turn.limits.pending}; try again later",
        )
    if tenant.max_pending and tenant.pending >= tenant.max_pending:
        return (
            Reason.TENANT_PENDING_QUOTA,
            f"tenant {tenant.name!r} has {tenant.pending} tasks waiting, its limit is {tenant.max_pending}; try again later",
        )
    if turn.profile.reject_impossible and len(state.cluster) and not _possible(turn, task):
        return Reason.IMPOSSIBLE, f"demand: the known nodes could never hold it: {describe(spec.demand)}; ask for less"
    return None


def _possible(turn: Turn, task: Task) -> bool:
    spec = task.spec
    together = spec.members > 1 and bool(spec.group) and spec.affinity in (Affinity.STRICT, Affinity.EXCLUSIVE)
    shape: Shape = task.shape
    cache = shape.possible
    key = (spec.members, together)
    known = cache.get(key)
    topology = turn.state.cluster.topology
    if known is None or known[0] != topology:
        known = cache[key] = (topology, possible(turn.state.cluster, spec.demand, spec.members, together))
    return known[1]


def invalid(spec: TaskSpec, most_members: int) -> str:
    """Return what is wrong with a task besides its demand, naming the field and the remedy; empty when nothing is."""
    if not spec.req_no:
        return "req_no: it is empty; every task needs its own identity"
    if not spec.method:
        return "method: it is empty; name an AI method"
    if not 1 <= spec.members <= most_members:
        return f"members: {spec.members} is out of range; use 1 to {most_members}"
    if spec.slots < 1:
        return f"slots: {spec.slots} is out of range; use at least 1"
    if spec.urgent_slots < 0:
        return f"urgent_slots: {spec.urgent_slots} is out of range; use 0 or more"
    if spec.max_attempts < 1:
        return f"max_attempts: {spec.max_attempts} is out of range; use at least 1"
    if spec.run_limit_us is not None and spec.run_limit_us < 1:
        return f"run_limit_us: {spec.run_limit_us} is out of range; use at least 1, or none"
    return ""


def invalid_demand(demand: Demand) -> str:
    """Return what is wrong with a demand, naming the field and the remedy; empty when nothing is."""
    if demand.gpus < 0:
        return f"demand.gpus: {demand.gpus} is out of range; use 0 or more"
    if demand.gpus and not 1 <= demand.gpu_share <= WHOLE_GPU:
        return f"demand.gpu_share: {demand.gpu_share} is out of range; use 1 to {WHOLE_GPU} thousandths"
    amounts = (demand.gpu_memory_bytes, demand.cpu_milli, demand.memory_bytes, demand.disk_bytes, demand.network_bps)
    if min(amounts) < 0 or (demand.extra and min(amount for _, amount in demand.extra) < 0):
        return "demand: an amount is below 0; use 0 or more"
    return ""


def describe(demand: Demand) -> str:
    """Say a demand in words."""
    parts = []
    if demand.gpus:
        which = " or ".join(demand.gpu_models) or "any model"
        parts.append(f"{demand.gpus} GPU ({demand.gpu_share}/1000, {demand.gpu_memory_bytes} bytes each, {which})")
    for name in ("cpu_milli", "memory_bytes", "disk_bytes", "network_bps"):
        if getattr(demand, name):
            parts.append(f"{name} {getattr(demand, name)}")
    parts += [f"{name} {amount}" for name, amount in demand.extra if amount]
    return ", ".join(parts) or "nothing"
