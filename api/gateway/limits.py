"""How often a tenant may ask: GCRA rates and a cap on requests in flight, pure and with the time as an argument.

GCRA keeps one number per key, the theoretical arrival time: a request conforms when it does not come earlier than that time minus
the burst's tolerance. (ITU-T I.371, the virtual scheduling form.)
"""

from __future__ import annotations

from dataclasses import dataclass

from api.gateway.config import RatePolicy

MINUTE_US = 60_000_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a request conforms, and what its headers say. Spans are microseconds."""

    allowed: bool
    limit: int
    remaining: int
    reset_us: int
    """Until the whole burst is available again."""
    retry_us: int
    """Until one request conforms; 0 when allowed."""
    window_us: int
    """The span in which `limit` requests are refilled."""


class Gcra:
    """Rates by key; memory is bounded by forgetting keys whose burst is whole again."""

    def __init__(self, max_keys: int = 65_536) -> None:
        if max_keys < 1:
            raise ValueError("max_keys: must be at least 1")
        self._max_keys = max_keys
        self._arrival: dict[str, int] = {}

    def check(self, key: str, policy: RatePolicy, now_us: int) -> Verdict:
        """Count one request of a key against a policy."""
        period = max(1, MINUTE_US // policy.per_minute)
        tolerance = period * policy.burst
        arrival = max(self._arrival.get(key, now_us), now_us)
        after = arrival + period
        early = after - tolerance - now_us
        if early > 0:
            return Verdict(False, policy.burst, 0, arrival - now_us, early, tolerance)
        if key not in self._arrival and len(self._arrival) >= self._max_keys:
            self._forget(now_us)
        self._arrival[key] = after
        return Verdict(True, policy.burst, (tolerance - (after - now_us)) // period, after - now_us, 0, tolerance)

    def would_refuse(self, key: str, policy: RatePolicy, now_us: int) -> Verdict | None:
        """Return the refusal that `check` would give now, without counting; None when it would allow."""
        period = max(1, MINUTE_US // policy.per_minute)
        arrival = max(self._arrival.get(key, now_us), now_us)
        early = arrival + period - period * policy.burst - now_us
        if early <= 0:
            return None
        return Verdict(False, policy.burst, 0, arrival - now_us, early, period * policy.burst)

    def _forget(self, now_us: int) -> None:
        whole = [key for key, arrival in self._arrival.items() if arrival <= now_us]
        for key in whole or list(self._arrival)[: max(1, self._max_keys // 8)]:
            del self._arrival[key]

    def __len__(self) -> int:
        return len(self._arrival)


class InFlight:
    """Counts requests in flight by key."""

    def __init__(self) -> None:
        self._count: dict[str, int] = {}

    def enter(self, key: str, limit: int) -> bool:
        """Take a place; False when all are taken."""
        count = self._count.get(key, 0)
        if count >= limit:
            return False
        self._count[key] = count + 1
        return True

    def leave(self, key: str) -> None:
        """Give a place back."""
        count = self._count[key] - 1
        if count:
            self._count[key] = count
        else:
            del self._count[key]

    def count(self, key: str) -> int:
        """Return the places taken now."""
        return self._count.get(key, 0)


def rate_headers(name: str, verdict: Verdict) -> list[tuple[bytes, bytes]]:
    """Return `x-ratelimit-*` as the openai SDK shows them, and the IETF `RateLimit` pair."""
    reset_s = -(-verdict.reset_us // 1_000_000)
    window_s = max(1, -(-verdict.window_us // 1_000_000))
    pairs = [
        ("x-ratelimit-limit-requests", str(verdict.limit)),
        ("x-ratelimit-remaining-requests", str(verdict.remaining)),
        ("x-ratelimit-reset-requests", f"{reset_s}s"),
        ("ratelimit-policy", f'"{name}";q={verdict.limit};w={window_s}'),
        ("ratelimit", f'"{name}";r={verdict.remaining};t={reset_s}'),
    ]
    return [(key.encode(), value.encode()) for key, value in pairs]
