"""Members of the enums that hot paths compare with, each by a name of its own.

A native build finds a `Final` name at a fixed address, where `TaskState.PENDING` costs it two lookups; there are some forty in the
life of a task.
"""

from __future__ import annotations

from typing import Final

from engine.lifecycle import TASK_TABLE, PodCause, TaskCause
from engine.tasks import Affinity, PodState, TaskState

TABLE: Final = TASK_TABLE

PENDING: Final = TaskState.PENDING
BOUND: Final = TaskState.BOUND
STARTING: Final = TaskState.STARTING
RUNNING: Final = TaskState.RUNNING
BACKOFF: Final = TaskState.BACKOFF
FINISHED: Final = TaskState.FINISHED
CANCELLED: Final = TaskState.CANCELLED
REJECTED: Final = TaskState.REJECTED
DEAD: Final = TaskState.DEAD

ADMIT: Final = TaskCause.ADMIT
ORDER_START: Final = TaskCause.ORDER_START
START: Final = TaskCause.START
FINISH: Final = TaskCause.FINISH
BIND: Final = TaskCause.BIND
REQUEUE: Final = TaskCause.REQUEUE
BACK_OFF: Final = TaskCause.BACK_OFF
CANCEL: Final = TaskCause.CANCEL
DIE: Final = TaskCause.DIE
REJECT: Final = TaskCause.REJECT

POD_CREATING: Final = PodState.CREATING
POD_READY: Final = PodState.READY
POD_BUSY: Final = PodState.BUSY
POD_IDLE: Final = PodState.IDLE
POD_STOPPING: Final = PodState.STOPPING
POD_GONE: Final = PodState.GONE

TAKE: Final = PodCause.TAKE

NO_AFFINITY: Final = Affinity.NONE
PREFERRED: Final = Affinity.PREFERRED
EXCLUSIVE: Final = Affinity.EXCLUSIVE
