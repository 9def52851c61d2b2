"""How SS shows things to the gateway: jobs, models, nodes and queues in the shapes of `api.ports`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from api.mq.messages import Message
from api.ports import Expected, JobEvent, JobView, ModelView
from api.support.jobs import Change, Job, Model, view_of
from engine.ahead.foresight import Promise
from engine.ahead.instead import Instead
from engine.entities import Pod
from engine.faults import is_cordoned
from engine.reasons import Blocker
from engine.state import State
from engine.tasks import TERMINAL_STATES

Use = tuple[int, int]
"""Memory used in bytes and busy thousandths of a GPU, as its node said last."""


def job_view(view: Mapping[str, Any], promise: Promise | None = None) -> JobView:
    """Return a view as the gateway gets it; it was made by us, so nothing is validated again."""
    if promise is None or view["state"] in TERMINAL_STATES:
        return JobView.model_construct(**view)
    return JobView.model_construct(**view, **promise_view(promise))


def promise_view(promise: Promise) -> dict[str, Any]:
    """Return a promise as the fields of a job; times in Unix seconds."""
    return {
        "queue_position": promise.position or None,
        "start_at": Expected(p50=promise.start_p50 / 1e6, p90=promise.start_p90 / 1e6),
        "finish_at": Expected(p50=promise.finish_p50 / 1e6, p90=promise.finish_p90 / 1e6),
    }


def job_event(change: Change, promise: Promise | None = None) -> JobEvent:
    """Return a change as the gateway gets it."""
    return JobEvent.model_construct(
        event_id=change.event_id, kind=change.kind, at=change.at, view=job_view(change.view, promise)
    )


def stored_event(row: tuple[int, str, float, int, dict[str, Any]], job: Job) -> JobEvent:
    """Return a stored change: what changed then, over what never changes."""
    event_id, kind, at, _, changed = row
    view = {**view_of(job), **changed}
    if changed["state"] != job.state:
        view["result"] = None
    return JobEvent.model_construct(event_id=event_id, kind=kind, at=at, view=job_view(view))


def queued_view(message: Message, seen_at: float) -> JobView:
    """Return a request that is still in the queue."""
    header, body = message.header, message.body
    return JobView(
        req_no=message.req_no,
        tenant=header.tenant,
        group=header.group,
        task_type=header.taskType,
        method=body.method,
        model=str(body.parameters.get("model") or body.parameters.get("base_model") or ""),
        priority=header.priority,
        state="queued",
        submitted_at=seen_at,
        parameters=body.parameters,
    )


def model_view(model: Model) -> ModelView:
    """Return a model as the gateway gets it."""
    return ModelView.model_validate(
        {
            "model_id": model.model_id,
            "tenant": model.tenant,
            "kind": model.kind,
            "base": model.base,
            "created_at": model.created_at,
            "source_req_no": model.source_req_no,
            "deployed_pods": model.deployed_pods,
            "files": model.files,
            "metadata": model.metadata,
        }
    )


def blockers_view(blockers: Sequence[Blocker]) -> list[dict[str, Any]]:
    """Return why a task waits."""
    shown = []
    for blocker in blockers:
        missing: dict[str, Any] = {
            name: value
            for name, value in (("nodes", blocker.nodes), ("amount", blocker.missing), ("node", blocker.node))
            if value
        }
        if blocker.until:
            missing["until"] = blocker.until / 1e6
        shown.append({"reason": str(blocker.reason), "message": blocker.detail, "missing": missing})
    return shown


def _adapters(state: State, pod: Pod) -> list[str]:
    """Return the personalised models that a Pod's tasks draw with."""
    return sorted({adapter for name in pod.tasks if name in state.tasks for adapter in state.tasks[name].spec.adapters})


def instead_view(found: Sequence[Instead]) -> list[dict[str, Any]]:
    """Return what would let a task start now."""
    shown = []
    for each in found:
        named = (("node", each.node), ("model", each.model), ("gpu_memory_bytes", each.gpu_memory_bytes))
        missing: dict[str, Any] = {"change": each.kind, **{name: value for name, value in named if value}}
        message = f"it would start now if {each.detail}"
        shown.append({"reason": "would_start_if", "message": message, "missing": missing})
    return shown


def nodes_view(
    state: State,
    heard: Mapping[str, float],
    use: Mapping[str, Mapping[str, Use]],
    stocks: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Return every node with its GPUs, use, Pods, models and state.

    `heard` is in Unix seconds, `use` by node and GPU, `stocks` what `Stocks.view` returns.
    """
    return [
        {
            "name": node.name,
            "up": node.up,
            "draining": node.draining,
            "state": "down" if not node.up else "draining" if node.draining else "up",
            "heard_at": heard.get(node.name),
            "labels": dict(node.spec.labels),
            "cpu_milli": node.spec.cpu_milli,
            "memory_bytes": node.spec.memory_bytes,
            "gpus": [
                {
                    "uuid": gpu.uuid,
                    "model": gpu.model,
                    "memory_bytes": gpu.memory_bytes,
                    "memory_free_bytes": gpu.memory_free,
                    "share_free": gpu.share_free,
                    "healthy": gpu.healthy,
                    "present": gpu.present,
                    "draining": gpu.drained,
                    "faulty": is_cordoned(state, node, gpu.uuid),
                    **_use_view(use.get(node.name, {}).get(gpu.uuid)),
                }
                for gpu in node.gpus
            ],
            "pods": [
                {
                    "pod": pod.number,
                    "method": pod.method,
                    "model": pod.model,
                    "adapters": _adapters(state, pod),
                    "state": pod.state.value,
                    "slots": pod.slots,
                    "tasks": sorted(pod.tasks),
                    "gpus": [grant.uuid for grant in pod.grants],
                }
                for pod in node.pods.values()
            ],
            **stocks.get(node.name, {}),
        }
        for node in state.cluster.nodes
    ]


def _use_view(use: Use | None) -> dict[str, int]:
    return {} if use is None else {"memory_used_bytes": use[0], "busy_permille": use[1]}


def engine_view(state: State) -> dict[str, Any]:
    """Return the engine's queue by tenant and priority, and its counters."""
    tenants: dict[str, dict[str, int]] = {}
    priorities: dict[str, int] = {}
    for task in state.tasks.values():
        if task.state in TERMINAL_STATES:
            continue
        states = tenants.setdefault(task.spec.tenant, {})
        states[task.state.value] = states.get(task.state.value, 0) + 1
        band = str(task.spec.priority)
        priorities[band] = priorities.get(band, 0) + 1
    return {
        "tenants": tenants,
        "priorities": priorities,
        "pending": state.pending,
        "outcomes": dict(state.outcomes),
        "ignored_reports": dict(state.ignored),
        "wanted_nodes": state.wanted_nodes,
    }
