"""The life of a task and of a Pod, each in one table: (state, cause) -> state. Everything else obeys; docs draw it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from engine.errors import InvariantViolated
from engine.tasks import PodState, TaskState


class TaskCause(StrEnum):
    """What moves a task from one state to another."""

    ADMIT = "admit"
    REJECT = "reject"
    BIND = "bind"
    ORDER_START = "order start"
    START = "start"
    FINISH = "finish"
    ORDER_STOP = "order stop"
    END = "attempt ends without a result"
    BACK_OFF = "back off"
    REQUEUE = "requeue"
    CANCEL = "cancel"
    DIE = "die"
    REVIVE = "revive"


class PodCause(StrEnum):
    """What moves a Pod from one state to another."""

    START = "start"
    TAKE = "take a slot"
    EMPTY = "last slot is free"
    DELETE = "delete"
    STOP = "stop"


_T, _C = TaskState, TaskCause

TASK_TABLE: dict[TaskState, dict[TaskCause, TaskState]] = {
    _T.PENDING: {
        _C.ADMIT: _T.PENDING,
        _C.REJECT: _T.REJECTED,
        _C.BIND: _T.BOUND,
        _C.ORDER_START: _T.STARTING,
        _C.CANCEL: _T.CANCELLED,
        _C.DIE: _T.DEAD,
    },
    _T.BOUND: {
        _C.BIND: _T.BOUND,
        _C.ORDER_START: _T.STARTING,
        _C.END: _T.BACKOFF,
        _C.REQUEUE: _T.PENDING,
        _C.CANCEL: _T.CANCELLED,
        _C.DIE: _T.DEAD,
    },
    _T.STARTING: {
        _C.ORDER_START: _T.STARTING,
        _C.START: _T.RUNNING,
        _C.FINISH: _T.FINISHED,
        _C.ORDER_STOP: _T.STOPPING,
        _C.END: _T.BACKOFF,
    },
    _T.RUNNING: {_C.FINISH: _T.FINISHED, _C.ORDER_STOP: _T.STOPPING, _C.END: _T.BACKOFF},
    _T.STOPPING: {_C.ORDER_STOP: _T.STOPPING, _C.FINISH: _T.FINISHED, _C.END: _T.BACKOFF},
    _T.BACKOFF: {
        _C.BACK_OFF: _T.BACKOFF,
        _C.REQUEUE: _T.PENDING,
        _C.CANCEL: _T.CANCELLED,
        _C.DIE: _T.DEAD,
    },
    _T.FINISHED: {},
    _T.CANCELLED: {},
    _T.REJECTED: {},
    _T.DEAD: {_C.REVIVE: _T.PENDING},
}

_P, _K = PodState, PodCause

POD_TABLE: dict[PodState, dict[PodCause, PodState]] = {
    _P.CREATING: {_K.START: _P.READY, _K.DELETE: _P.STOPPING, _K.STOP: _P.GONE},
    _P.READY: {_K.TAKE: _P.BUSY, _K.DELETE: _P.STOPPING, _K.STOP: _P.GONE},
    _P.BUSY: {_K.TAKE: _P.BUSY, _K.EMPTY: _P.IDLE, _K.DELETE: _P.STOPPING, _K.STOP: _P.GONE},
    _P.IDLE: {_K.TAKE: _P.BUSY, _K.DELETE: _P.STOPPING, _K.STOP: _P.GONE},
    _P.STOPPING: {_K.STOP: _P.GONE},
    _P.GONE: {},
}


def next_task_state(state: TaskState, cause: TaskCause) -> TaskState:
    """Return the state that follows, or raise InvariantViolated: the engine may only ask for moves of the table."""
    after = TASK_TABLE[state].get(cause)
    if after is None:
        raise InvariantViolated(f"a task that is {state} cannot {cause}")
    return after


def next_pod_state(state: PodState, cause: PodCause) -> PodState:
    """Return the state that follows, or raise InvariantViolated."""
    after = POD_TABLE[state].get(cause)
    if after is None:
        raise InvariantViolated(f"a Pod that is {state} cannot {cause}")
    return after


def mermaid() -> str:
    """Draw both tables as Mermaid state diagrams."""
    lines: list[str] = []
    tables: tuple[tuple[str, Mapping[Any, Mapping[Any, str]]], ...] = (("task", TASK_TABLE), ("Pod", POD_TABLE))
    for title, table in tables:
        lines += [f"The life of a {title}:", "", "```mermaid", "stateDiagram-v2", f"    [*] --> {next(iter(table))}"]
        for state, row in table.items():
            arrows: dict[str, list[str]] = {}
            for cause, after in row.items():
                arrows.setdefault(after, []).append(cause)
            lines += [f"    {state} --> {after}: {', '.join(causes)}" for after, causes in arrows.items()]
            if not row:
                lines.append(f"    {state} --> [*]")
        lines += ["```", ""]
    return "\n".join(lines)


def main() -> None:
    """Print the diagrams: ``python -m engine.lifecycle``."""
    print(mermaid())


if __name__ == "__main__":
    main()
