"""Quotes: when a request would start and end if it were submitted now, what it would cost, and what else could be done.

A quote is the forward run with the request put in; nothing of it stays. Alternatives are quoted the same way, and only those are
offered that were found to help.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, Protocol

from api.mq.messages import Message, MessageRefused, decode, request_id
from api.ports import SupportRefused
from api.sm.foresight import Quoted
from api.support.core import SupportCore
from api.support.intake import understand
from api.support.views import promise_view
from engine.ahead.foresight import Outlook, Promise
from engine.tasks import SECOND, URGENT_PRIORITY, Micros, TaskSpec, is_urgent
from sim import prices

FEWEST_STEPS: Final = 4
MOST_WAITING: Final = 2_000
"""With more tasks waiting a run is too dear to be made for alternatives too."""
WORTH: Final = 0.9
"""An alternative is offered when it shortens the time to the P50 of the finish to this share, or less."""
MOST_RETRY_S: Final = 120.0
LEAST_RETRY_S: Final = 1.0
NEWS_SHARE: Final = 0.1
NEWS_LEAST_US: Final = 2 * SECOND
_HOUR_US: Final = 3_600 * SECOND


class Foreseeing(Protocol):
    """What SS needs of the scheduler's foresight."""

    @property
    def outlook(self) -> Outlook:
        """Return what the last look saw; any thread may read it."""
        ...

    def quote(self, spec: TaskSpec) -> Quoted:
        """Return what a task would be promised; only between two steps."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that is not submitted: its task, and tasks that would do instead, by how they differ."""

    spec: TaskSpec
    fewer_steps: TaskSpec | None
    steps: int

    @classmethod
    def read(cls, message: str, core: SupportCore) -> Asked:
        """Read a request message as SS would; raises SupportRefused 422 naming what is wrong with it."""
        try:
            decoded = decode(message.encode())
            spec = _task(decoded, core)
            parameters = decoded.body.parameters
            steps = int(dict(spec.features).get("steps", 0))
            fewer = None
            if steps // 2 >= FEWEST_STEPS:
                body = decoded.body.model_copy(update={"parameters": {**parameters, "steps": steps // 2}})
                fewer = _task(decoded.model_copy(update={"body": body}), core)
        except MessageRefused as refused:
            raise SupportRefused(422, refused.code, str(refused)) from None
        return cls(spec, fewer, steps // 2)


def _task(message: Message, core: SupportCore) -> TaskSpec:
    header = message.header
    request = understand(
        message,
        message_id=request_id(header.tenant, message.req_no),
        task_id=f"quote/{message.req_no}",
        now=int(core.clock() * 1e6),
        methods=core.methods,
        default_model=core.default_model,
        find_model=core.store.model,
    )
    if request.spec is None:
        raise SupportRefused(422, "no_quote", f"body.method: {message.body.method} makes no task; nothing to quote")
    return request.spec


def answer(asked: Asked, foresight: Foreseeing) -> dict[str, Any]:
    """Return the quote as JSON."""
    quoted = foresight.quote(asked.spec)
    shown = _shown(asked.spec, quoted)
    shown["waiting"] = quoted.waiting
    shown["retry_after_s"] = retry_after_s(foresight.outlook, foresight_now(quoted, foresight.outlook))
    shown["reason"] = "" if quoted.promise else "no node that takes work now could hold it"
    shown["alternatives"] = _alternatives(asked, quoted, foresight) if quoted.waiting <= MOST_WAITING else []
    return shown


def foresight_now(quoted: Quoted, outlook: Outlook) -> Micros:
    """Return the time of a quote."""
    return quoted.promise.made_at if quoted.promise else outlook.at


def retry_after_s(outlook: Outlook, now: Micros, tenant: str = "") -> float:
    """Return when it is worth asking again, in seconds: when the first waiting task is likely to have left the queue."""
    room_at = outlook.room_at(tenant)
    if not outlook.waiting:
        return LEAST_RETRY_S
    if room_at is None:
        return MOST_RETRY_S
    return round(min(MOST_RETRY_S, max(LEAST_RETRY_S, (room_at - now) / 1e6)), 3)


def _shown(spec: TaskSpec, quoted: Quoted) -> dict[str, Any]:
    promise = quoted.promise
    shown: dict[str, Any] = {"queue_position": None, "start_at": None, "finish_at": None}
    if promise is not None:
        fields = promise_view(promise)
        shown["queue_position"] = fields["queue_position"]
        shown["start_at"], shown["finish_at"] = fields["start_at"].model_dump(), fields["finish_at"].model_dump()
    shown["run_s"] = None
    if quoted.estimate is not None and quoted.estimate.serves_every_model:
        run = quoted.estimate.duration(quoted.gpu_models[0] if len(quoted.gpu_models) == 1 else "*")
        shown["run_s"] = {"mean": run.mean / 1e6, "p50": run.p50 / 1e6, "p90": run.p90 / 1e6}
    shown["cost"] = _cost(spec, quoted)
    return shown


def _cost(spec: TaskSpec, quoted: Quoted) -> dict[str, Any] | None:
    """Return what the run costs on the dearest GPU model that takes work now; None where no price or run time is known."""
    listed = _prices()
    if listed is None or quoted.estimate is None or not quoted.estimate.serves_every_model:
        return None
    wanted = spec.demand.gpu_models or quoted.gpu_models
    models = [model for model in wanted if model in quoted.gpu_models and model in listed.per_hour]
    if not models or len(models) < len([model for model in wanted if model in quoted.gpu_models]):
        return None
    gpus = spec.members * spec.demand.gpus * spec.demand.gpu_share / 1000 / max(1, spec.slots)
    costs = [(quoted.estimate.duration(model), listed.per_hour[model] * gpus / _HOUR_US) for model in models]
    return {
        "currency": listed.currency,
        "expected": round(max(run.mean * price for run, price in costs), 6),
        "p90": round(max(run.p90 * price for run, price in costs), 6),
    }


@lru_cache(maxsize=1)
def _prices() -> prices.PriceList | None:
    try:
        return prices.load()
    except prices.PriceError:
        return None


def _alternatives(asked: Asked, quoted: Quoted, foresight: Foreseeing) -> list[dict[str, Any]]:
    """Return what would help, each quoted, as far as there is time for quotes."""
    found: list[dict[str, Any]] = []
    try:
        _try_others(asked, quoted, foresight, found)
    except SupportRefused as refused:
        if refused.code != "quotes_used_up":
            raise
    promise = quoted.promise
    if promise is not None and promise.position:
        wait_s = round(max(0.0, (promise.start_p50 - promise.made_at) / 1e6), 3)
        found.append({"kind": "later", "change": {"after_s": wait_s}})
    return found


def _try_others(asked: Asked, quoted: Quoted, foresight: Foreseeing, found: list[dict[str, Any]]) -> None:
    """Add the alternatives that a quote of their own finds to help."""
    spec, promise = asked.spec, quoted.promise
    if promise is not None and asked.fewer_steps is not None:
        other = foresight.quote(asked.fewer_steps)
        if _helps(other.promise, promise):
            change = {"parameters": {"steps": asked.steps}}
            found.append({"kind": "fewer_steps", "change": change, **_shown(asked.fewer_steps, other)})
    if is_urgent(spec):
        ordinary = replace(spec, priority=0)
        other = foresight.quote(ordinary)
        if other.promise is not None:
            found.append({"kind": "ordinary_lane", "change": {"priority": 0}, **_shown(ordinary, other)})
    elif promise is not None and promise.position:
        urgent = replace(spec, priority=URGENT_PRIORITY)
        other = foresight.quote(urgent)
        if _helps(other.promise, promise):
            found.append({"kind": "urgent_lane", "change": {"priority": URGENT_PRIORITY}, **_shown(urgent, other)})


def _helps(other: Promise | None, promise: Promise) -> bool:
    if other is None:
        return False
    return other.finish_p50 - other.made_at <= WORTH * (promise.finish_p50 - promise.made_at)


def told_apart(tenant: str, req_no: str) -> str:
    """Return the engine's name of a request whose reqNo another tenant had chosen before."""
    return f"{req_no}-{hashlib.sha256(tenant.encode()).hexdigest()[:12]}"


class Told:
    """What the reader of a job's events knows of its promise."""

    def __init__(self) -> None:
        self._last: Promise | None = None

    def tell(self, promise: Promise | None) -> None:
        """Note what the reader was told."""
        self._last = promise or self._last

    def is_news(self, promise: Promise) -> bool:
        """Tell whether a promise differs enough to be told: another position, or times that moved by a tenth of what is left."""
        last = self._last
        if last is None:
            return True
        if last.position != promise.position:
            return True
        moved = max(abs(promise.finish_p50 - last.finish_p50), abs(promise.finish_p90 - last.finish_p90))
        return moved > max(NEWS_LEAST_US, NEWS_SHARE * max(0, last.finish_p90 - last.made_at))
