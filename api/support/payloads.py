"""What the executor protocol carries for SS: resolved models and task parameters, looked up when an order is about to leave.

Implements `engine.protocol.controller.Payloads`. Called from the scheduler's loop and the world's I/O thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from api.support.jobs import Job, Model
from engine.commands import CreatePod, PrefetchModel, StartTask
from engine.protocol.controller import PayloadRefused
from engine.tasks import FailureCause


class StorePayloads:
    """Payloads from the live jobs and the model table."""

    def __init__(
        self, live: Mapping[str, Job], find_job: Callable[[str], Job | None], find_model: Callable[[str], Model | None]
    ) -> None:
        self._live = live
        self._find_job = find_job
        self._find_model = find_model

    def pod(self, command: CreatePod) -> dict[str, object]:
        """Return ``{"id", "base", "adapter", "path"}`` of the Pod's model; empty for a method without one."""
        return self._resolved(command.model)

    def task(self, command: StartTask) -> dict[str, object]:
        """Return the parameters of an attempt."""
        job = self._live.get(command.req_no) or self._find_job(command.req_no)
        if job is None:
            raise PayloadRefused(FailureCause.BAD_INPUT, f"the parameters of {command.req_no} are not in the store")
        return dict(job.parameters)

    def prefetch(self, command: PrefetchModel) -> dict[str, object]:
        """Return the resolved model to bring to a node's cache."""
        return self._resolved(command.model)

    def _resolved(self, model_id: str) -> dict[str, object]:
        if not model_id:
            return {}
        model = self._find_model(model_id)
        if model is None:
            raise PayloadRefused(FailureCause.MODEL_MISSING, f"model {model_id!r} was deleted or never existed")
        return resolve(model)


def resolve(model: Model) -> dict[str, Any]:
    """Return a model as `executors.ports.PodOrder.model` spells it."""
    return {
        "id": model.model_id,
        "kind": model.kind,
        "base": model.base or model.model_id,
        "adapter": dict(model.files) or None,
        "path": model.metadata.get("path") if model.kind == "local" else None,
    }
