"""How far would the figures move on other days like these? Draws a run's hours anew, with repetition, and looks at the spread.

Seeds vary luck; they cannot vary arrivals that were recorded. Tasks minutes apart share a burst and a queue, so whole spans of time
are drawn instead of tasks (the block bootstrap, Kuensch 1989). The result is a standard error, rough by nature: blocks are taken as
independent of each other, and a queue that crosses an edge is cut.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_HOUR_S = 3600.0
_DRAWS = 60
_FEWEST_BLOCKS = 24
_CELLS = 2_000_000
"""Weights that are held at once."""


def blocks_of(submitted_s: Floats) -> tuple[Ints, int]:
    """Return each task's block and the number of blocks: hours, or a 24th of what is shorter than a day."""
    if not len(submitted_s):
        return np.zeros(0, dtype=np.int64), 0
    span = max(1e-6, float(submitted_s.max()))
    length = min(_HOUR_S, span / _FEWEST_BLOCKS)
    blocks = np.minimum(submitted_s // length, max(0.0, np.ceil(span / length) - 1)).astype(np.int64)
    return blocks, int(blocks.max()) + 1


def draws(count: int) -> NDArray[np.int64]:
    """Return how often each block is drawn, one row per draw; the same for every run of equal length."""
    source = np.random.Generator(np.random.PCG64(20_000 + count))
    return source.multinomial(count, np.full(count, 1 / count), size=_DRAWS)


def standard_errors(
    ordered: Floats, blocks: Ints, drawn: NDArray[np.int64], shares: tuple[float, ...]
) -> list[float] | None:
    """Return the standard errors of the mean and of the quantiles; None where a value is infinite or there is nothing.

    `ordered` are values in ascending order, `blocks` the block of each.
    """
    if not len(ordered) or np.isinf(ordered[-1]):
        return None
    found = []
    width = max(1, _CELLS // len(ordered))
    for first in range(0, len(drawn), width):
        weights = drawn[first : first + width][:, blocks]
        total = np.cumsum(weights, axis=1)
        weights, total = weights[total[:, -1] > 0], total[total[:, -1] > 0]
        whole = total[:, -1]
        columns = [weights @ ordered / whole]
        for share in shares:
            rows = (total < (share * whole - 1e-9)[:, None]).sum(axis=1)
            columns.append(ordered[np.minimum(rows, len(ordered) - 1)])
        found.append(np.stack(columns, axis=1))
    return [float(value) for value in np.std(np.concatenate(found), axis=0, ddof=1)]
