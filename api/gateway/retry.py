"""When those who were refused should come again: an honest time, spread, so that they do not come back together."""

from __future__ import annotations

import random

MOST_S = 120.0
SPREAD = 0.25


def retry_after(seconds: float, luck: float | None = None) -> int:
    """Return whole seconds from 1 to 120: what was expected, and up to a quarter more by luck (0 to 1; None: drawn)."""
    luck = random.random() if luck is None else luck
    least = max(1.0, seconds)
    return int(min(MOST_S, -(-least // 1) + int(least * SPREAD * luck)))
