"""Running batches stepped to their end, as the tests of what they draw ask for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from executors.batching.batch import RunningBatch
from executors.batching.requests import Failed, Finished, PictureRequest


def drained(batch: RunningBatch, steps: int = 1000) -> dict[str, Any]:
    """Step until the batch is empty, or as often; returns the pictures by id, raises what a request failed with."""
    made: dict[str, Any] = {}
    for _ in range(steps):
        if not len(batch):
            break
        for event in batch.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                made[event.id] = np.asarray(event.picture, dtype=np.float64)
    return made


def paused_and_resumed(batch: RunningBatch, asked: PictureRequest, steps: int = 2) -> Any:
    """Draw a picture that is set aside after so many steps and goes on."""
    batch.admit(asked)
    for _ in range(steps):
        batch.step()
    batch.resume(batch.pause(asked.id))
    return drained(batch)[asked.id]
