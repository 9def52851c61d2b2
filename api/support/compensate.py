"""Compensations: put right what went wrong for one request, once per key, on record.

``redeliver_result`` sends the result message again, with the same id and the same bytes; ``rerun`` gives a dead-lettered task its
attempts back; ``release_quota`` returns the reservation that a dead-lettered task keeps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from api.mq.port import RESULTS, Outgoing
from api.ports import SupportRefused
from api.support.core import SupportCore
from api.support.jobs import Job
from engine.events import TaskRevived, TaskSubmitted
from engine.tasks import TaskState

ACTIONS = ("redeliver_result", "rerun", "release_quota")
RERUN_TIMEOUT_S = 30.0
Remembered = Callable[[str], Awaitable[bool]]


async def compensate(core: SupportCore, remembered: Remembered, job: Job, action: str, key: str) -> Mapping[str, Any]:
    """Carry out one compensation and return its recorded answer; the same key returns the same answer.

    `remembered` tells whether the engine still knows a task.
    """
    if action not in ACTIONS:
        raise SupportRefused(
            422, "unknown_action", f"action: {action!r} is unknown; choose one of: {', '.join(ACTIONS)}"
        )
    key = f"{job.tenant}/{key}" if key else f"{action}/{job.tenant}/{job.req_no}/{job.rerun}"
    recorded = _recorded(core, job, action, key)
    if recorded is not None:
        return recorded
    match action:
        case "redeliver_result":
            answer = await asyncio.to_thread(_redeliver, core, job)
        case "rerun":
            answer = await _rerun(core, remembered, job)
        case _:
            answer = {"released": job.state == TaskState.DEAD}
            if job.state != TaskState.DEAD:
                raise SupportRefused(
                    409, "not_dead", f"job {job.req_no} is {job.state}; only a dead-lettered job keeps its reservation"
                )
    answer = {"action": action, "req_no": job.req_no, "key": key, "at": core.clock(), **answer}

    def record() -> None:
        with core.journal.transaction() as db:
            if (
                core.store.write_compensation(db, key, job.key, action, core.clock(), answer)
                and action == "release_quota"
            ):
                core.store.write_quota_released(db, job.key)

    await asyncio.to_thread(record)
    return _recorded(core, job, action, key) or answer


def _recorded(core: SupportCore, job: Job, action: str, key: str) -> Mapping[str, Any] | None:
    known = core.store.compensation(key)
    if known is None:
        return None
    tenant, req_no, recorded_action, answer = known
    if (tenant, req_no, recorded_action) != (*job.key, action):
        raise SupportRefused(
            409, "key_used", f"key {key!r} was used for {recorded_action} of {req_no}; choose a new one"
        )
    return answer


def _redeliver(core: SupportCore, job: Job) -> dict[str, Any]:
    """Put the result on its queue again; a copy that still waits there is enough."""
    result = core.store.newest_result(job.tenant, job.req_no)
    if result is None:
        raise SupportRefused(409, "no_result", f"job {job.req_no} is {job.state}; it has no result message yet")
    message_id, priority, body = result
    put = core.queue.put_many(RESULTS, [Outgoing(message_id, body, priority)], again=True)
    return {"message_id": message_id, "delivered": put == 1, "still_waiting": put == 0}


async def _rerun(core: SupportCore, remembered: Remembered, job: Job) -> dict[str, Any]:
    """Run a dead-lettered task again: the engine revives it, or gets it once more where it has forgotten it."""
    if job.state != TaskState.DEAD:
        raise SupportRefused(
            409, "not_dead", f"job {job.req_no} is {job.state}; only a dead-lettered job can be run again"
        )
    if await remembered(job.task_id):
        core.post(TaskRevived(job.task_id))
    else:
        core.post(TaskSubmitted(core.again(job)))

    def revived() -> Job | None:
        now = core.store.job(job.tenant, job.req_no)
        return now if now is not None and now.rerun > job.rerun else None

    found = await core.board.until(revived, RERUN_TIMEOUT_S)
    if found is None:
        raise SupportRefused(504, "not_certain", f"job {job.req_no}: it is not taken up again yet; look at it later")
    return {"rerun": found.rerun, "state": found.state}
