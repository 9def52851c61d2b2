"""What the executor protocol carries for SS: resolved models and task parameters, looked up when an order is about to leave.

Implements `engine.protocol.controller.TermPayloads`. Called from the scheduler's loop and the world's I/O thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from api.support.intake import GENERATION_METHOD
from api.support.jobs import Job, Model
from api.support.sharing import ModelsDoNotFit, further, terms_of
from engine.commands import CreatePod, PrefetchModel, StartTask
from engine.protocol.controller import PayloadRefused
from engine.tasks import FailureCause
from executors.terms import Terms


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
        return dict(self._job(command.req_no).parameters)

    def terms(self, command: StartTask) -> dict[str, object]:
        """Return what the Pod must know besides: the adapters to draw with, resolved, and how urgent the job is."""
        job = self._job(command.req_no)
        if job.method != GENERATION_METHOD or not job.model:
            return Terms(priority=job.priority).to_json()
        model = self._model(job.model)
        asked = ""
        adapters = []
        if model.kind == "lora":
            asked = model.model_id
            adapters.append(terms_of(model, float(job.parameters.get("adapter_scale", 1.0))))
        try:
            others = further(model, job.parameters.get("adapters") or (), job.tenant, self._find_model)
        except ModelsDoNotFit as error:
            raise PayloadRefused(FailureCause.MODEL_MISSING, str(error)) from None
        adapters += [terms_of(other, weight) for other, weight in others]
        return Terms(tuple(adapters), job.priority, asked).to_json()

    def _job(self, req_no: str) -> Job:
        job = self._live.get(req_no) or self._find_job(req_no)
        if job is None:
            raise PayloadRefused(FailureCause.BAD_INPUT, f"the parameters of {req_no} are not in the store")
        return job

    def prefetch(self, command: PrefetchModel) -> dict[str, object]:
        """Return the resolved model to bring to a node's cache."""
        return self._resolved(command.model)

    def _resolved(self, model_id: str) -> dict[str, object]:
        if not model_id:
            return {}
        return resolve(self._model(model_id))

    def _model(self, model_id: str) -> Model:
        model = self._find_model(model_id)
        if model is None:
            raise PayloadRefused(FailureCause.MODEL_MISSING, f"model {model_id!r} was deleted or never existed")
        return model


def resolve(model: Model) -> dict[str, Any]:
    """Return a model as `executors.ports.PodOrder.model` spells it."""
    return {
        "id": model.model_id,
        "kind": model.kind,
        "base": model.base or model.model_id,
        "adapter": dict(model.files) or None,
        "path": model.metadata.get("path") if model.kind == "local" else None,
    }
