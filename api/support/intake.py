"""From a message to a task: what is asked is checked against the method's parameters and the models, once and in one place.

Pure: the answer depends only on the arguments, and a refusal is a `MessageRefused` with a stable code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from api.mq.messages import Header, Message, MessageRefused
from api.support.jobs import TRAINING_METHOD, Job, Model
from api.support.sharing import ModelsDoNotFit, further, pod_model
from engine.resources import Demand
from engine.tasks import SECOND, Affinity, Micros, TaskSpec, TaskType
from executors.methods.parameters import ParameterError, steps_taken, validate

GENERATION_METHOD = "text_to_image"
DEPLOY_METHODS = frozenset({"deploy", "undeploy"})
"""TP messages that SS fulfils itself: keep a model warm, or no longer."""
MAX_DEPLOYED_PODS = 64
MAX_CREDIT_US = 30 * SECOND
"""Most that the time of a quote moves a task forward."""
QUOTE_FORGOTTEN_US = 600 * SECOND
"""A message older than this was delayed or is run again: its quote counts no more."""
_TASK_TYPES = {TRAINING_METHOD: "TP", GENERATION_METHOD: "GC", "deploy": "TP", "undeploy": "TP"}


@dataclass(frozen=True, slots=True)
class MethodDefaults:
    """What a Pod of one AI method asks for, and how its tasks are treated."""

    demand: Demand = field(default_factory=Demand)
    slots: int = 1
    urgent_slots: int = 0
    max_attempts: int = 3
    run_limit_us: Micros | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A message that was understood. `spec` is what the engine gets; None for a deployment."""

    job: Job
    spec: TaskSpec | None
    pods: int = 0
    """Warm Pods a deployment asks for."""


def understand(
    message: Message,
    *,
    message_id: str,
    task_id: str,
    now: Micros,
    methods: Mapping[str, MethodDefaults],
    default_model: str,
    find_model: Callable[[str], Model | None],
) -> Request:
    """Turn a message into a job and its task; raises MessageRefused."""
    header, method = message.header, message.body.method
    expected = _TASK_TYPES.get(method, header.taskType)
    if header.taskType != expected:
        raise _refused(message, "invalid", f"header.taskType: {method} is a {expected} method, not {header.taskType}")
    job = Job(
        task_id=task_id,
        tenant=header.tenant,
        req_no=message.req_no,
        header=header_of(message),
        task_type=header.taskType,
        method=method,
        parameters={},
        submitted_at=now / 1e6,
        group=header.group,
        priority=header.priority,
        message_id=message_id,
    )
    if method in DEPLOY_METHODS:
        return _deployment(message, job, find_model)
    if method not in methods:
        raise _refused(
            message, "invalid", f"body.method: {method!r} is unknown; choose one of: {', '.join(sorted(methods))}"
        )
    job.parameters = _parameters(message, default_model)
    model = _model(message, job, find_model)
    held = ""
    adapters: tuple[str, ...] = ()
    if model is not None:
        job.model = held = model.model_id
        if method == GENERATION_METHOD:
            held, adapters = _shared(message, job, model, find_model)
    return Request(job, _spec(message, job, methods[method], held, adapters, now))


def header_of(message: Message) -> dict[str, Any]:
    """Return the header as it is echoed in the result, unknown fields included."""
    tree: dict[str, Any] = message.header.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    tree["tenant"] = message.header.tenant
    return tree


def _parameters(message: Message, default_model: str) -> dict[str, Any]:
    method, given = message.body.method, dict(message.body.parameters)
    if method == GENERATION_METHOD:
        given.setdefault("model", default_model)
    elif method == TRAINING_METHOD:
        given.setdefault("base_model", default_model)
    try:
        checked = validate(method, given)
    except ParameterError as error:
        raise _refused(message, "invalid", f"body.parameters.{error}") from None
    parameters: dict[str, Any] = checked.model_dump(mode="json", exclude_none=True)
    return parameters


def _shared(
    message: Message, job: Job, model: Model, find_model: Callable[[str], Model | None]
) -> tuple[str, tuple[str, ...]]:
    """Return the model that the Pod holds and the adapters that the task adds."""
    held, adapters = pod_model(model, find_model)
    try:
        others = further(model, job.parameters.get("adapters") or (), job.tenant, find_model)
    except ModelsDoNotFit as error:
        code = "model_unknown" if "there is no model" in str(error) else "invalid"
        raise _refused(message, code, f"body.parameters.{error}") from None
    return held, (*adapters, *(other.model_id for other, _ in others))


def _model(message: Message, job: Job, find_model: Callable[[str], Model | None]) -> Model | None:
    field_name = "base_model" if job.method == TRAINING_METHOD else "model"
    model_id = job.parameters.get(field_name)
    if model_id is None:
        return None
    model = find_model(str(model_id))
    where = f"body.parameters.{field_name}"
    if model is None or model.tenant not in ("", job.tenant):
        raise _refused(
            message,
            "model_unknown",
            f"{where}: there is no model {model_id!r}; the list of models names those there are",
        )
    if job.method == TRAINING_METHOD and model.kind in ("lora", "full"):
        raise _refused(
            message, "invalid", f"{where}: {model_id!r} was itself trained; train from its base {model.base!r}"
        )
    return model


def _credit_us(header: Header, now: Micros) -> Micros:
    """Return how much earlier than now the task ranks: a quote keeps its place for 30 s, and then no longer."""
    if header.quotedAt is None:
        return 0
    age_us = now - int(header.quotedAt * SECOND)
    return 0 if age_us > QUOTE_FORGOTTEN_US else min(MAX_CREDIT_US, max(0, age_us))


def _spec(
    message: Message, job: Job, defaults: MethodDefaults, held: str, adapters: tuple[str, ...], now: Micros
) -> TaskSpec:
    header, parameters = message.header, job.parameters
    declared = int(float(parameters.get("seconds", 1.0)) * SECOND) if job.method == "sleep" else None
    return TaskSpec(
        req_no=job.task_id,
        tenant=job.tenant,
        group=job.group,
        task_type=TaskType(job.task_type),
        method=job.method,
        model=held,
        priority=job.priority,
        demand=defaults.demand,
        slots=defaults.slots,
        affinity=Affinity(header.affinity) if job.group else Affinity.NONE,
        start_deadline=int(header.deadline * SECOND) if header.deadline is not None else None,
        run_limit_us=defaults.run_limit_us,
        max_attempts=defaults.max_attempts,
        declared_us=declared,
        features=_features(job, held, adapters),
        adapters=adapters,
        credit_us=_credit_us(header, now),
        urgent_slots=defaults.urgent_slots,
    )


def _features(job: Job, held: str, adapters: tuple[str, ...]) -> tuple[tuple[str, str | int | float], ...]:
    """Return what predictions key on, sorted by name: models that share Pods are one to them."""
    known: dict[str, str | int | float] = {"user": job.tenant, "model": held}
    if adapters:
        known["loras"] = len(adapters)
    names = {
        "count": "images",
        "steps": "steps",
        "width": "width",
        "height": "height",
        "scheduler": "scheduler",
        "rank": "rank",
        "guidance": "guidance",
    }
    for name, feature in names.items():
        value = job.parameters.get(name)
        if isinstance(value, str | int | float):
            known[feature] = value
    if job.method == GENERATION_METHOD and (taken := steps_taken(job.parameters)) is not None:
        known["steps"] = taken
    if job.method == TRAINING_METHOD:
        known["images"] = len(job.parameters.get("pictures", ()))
        known["method"] = str(job.parameters.get("method", "lora"))
        known |= _training_memory(job.parameters)
    if job.group:
        known["group"] = job.group
    return tuple(sorted(known.items()))


def _training_memory(given: Mapping[str, Any]) -> dict[str, int]:
    """Return what the memory of a training goes by: its side in pixels, rows of its batch, and whether it keeps activations."""
    rows = int(given["batch"]) * (2 if given["prior_preservation"] else 1)
    known = {"rows": rows, "frugal": int(given["gradient_checkpointing"])}
    return known | {side: int(given["size"]) for side in ("width", "height") if "size" in given}


def _deployment(message: Message, job: Job, find_model: Callable[[str], Model | None]) -> Request:
    given = message.body.parameters
    allowed = {"model", "pods"} if job.method == "deploy" else {"model"}
    unknown = sorted(set(given) - allowed)
    if unknown:
        raise _refused(
            message,
            "invalid",
            f"body.parameters.{unknown[0]}: is no parameter of {job.method}; it has: {', '.join(sorted(allowed))}",
        )
    model_id, pods = given.get("model"), given.get("pods", 1) if job.method == "deploy" else 0
    if not isinstance(model_id, str):
        raise _refused(message, "invalid", "body.parameters.model: give the id of a model")
    if isinstance(pods, bool) or not isinstance(pods, int) or not 0 <= pods <= MAX_DEPLOYED_PODS:
        raise _refused(message, "invalid", f"body.parameters.pods: give a whole number from 0 to {MAX_DEPLOYED_PODS}")
    model = find_model(model_id)
    if model is None or model.tenant not in ("", job.tenant):
        raise _refused(message, "model_unknown", f"body.parameters.model: there is no model {model_id!r}")
    job.model, job.parameters = model_id, dict(given)
    return Request(job, None, pods)


def _refused(message: Message, code: str, text: str) -> MessageRefused:
    return MessageRefused(code, text, message.req_no, message.header.tenant, header_of(message))
