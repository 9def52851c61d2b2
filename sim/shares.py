"""Fairness between tenants: who was served how much while there was not enough for all."""

from __future__ import annotations

from engine.resources import WHOLE_GPU
from engine.tasks import SECOND, Micros
from sim.sketches import jain


class Share:
    """What one tenant gets."""

    __slots__ = ("contended", "contended_at", "served", "served_at", "serving", "waiting", "weight")

    def __init__(self) -> None:
        self.weight = 1
        self.waiting = 0
        self.serving = 0.0
        self.served = 0.0
        """Thousandths of GPUs x microseconds, over all time."""
        self.contended = 0.0
        """The same, while at least two tenants had tasks waiting."""
        self.served_at: Micros = 0
        self.contended_at: Micros = 0
        """Time and contended time when `serving` last changed."""


class Shares:
    """Service by tenant. Only contended time tells about fairness: an idle cluster gives everybody all they ask for."""

    def __init__(self) -> None:
        self._tenants: dict[str, Share] = {}
        self._in_need = 0
        self._contended_us: Micros = 0
        self._since: Micros = 0

    def configure(self, tenant: str, weight: int) -> None:
        """Set a tenant's weight."""
        self.of(tenant).weight = max(1, weight)

    def of(self, tenant: str) -> Share:
        """Return what a tenant gets, from nothing on first sight."""
        known = self._tenants.get(tenant)
        if known is None:
            known = self._tenants[tenant] = Share()
        return known

    def waits(self, now: Micros, tenant: Share, by: int) -> None:
        """Raise the number of a tenant's waiting tasks."""
        if now != self._since:
            self._clock(now)
        before = tenant.waiting
        tenant.waiting = after = before + by
        if after > 0:
            if before <= 0:
                self._in_need += 1
        elif before > 0:
            self._in_need -= 1

    def serves(self, now: Micros, tenant: Share, by: float) -> None:
        """Raise the thousandths of GPUs that serve a tenant."""
        if now != self._since:
            self._clock(now)
        self._settle(tenant, now)
        tenant.serving += by

    def _clock(self, now: Micros) -> None:
        if self._in_need >= 2:
            self._contended_us += now - self._since
        self._since = now

    def _settle(self, tenant: Share, now: Micros) -> None:
        if tenant.serving:
            tenant.served += tenant.serving * (now - tenant.served_at)
            tenant.contended += tenant.serving * (self._contended_us - tenant.contended_at)
        tenant.served_at, tenant.contended_at = now, self._contended_us

    def close(self, now: Micros) -> None:
        """Bring everything up to this moment."""
        self._clock(now)
        for tenant in self._tenants.values():
            self._settle(tenant, now)

    def contended_hours(self) -> float:
        """Hours during which at least two tenants had tasks waiting."""
        return self._contended_us / SECOND / 3600

    def gpu_hours(self) -> dict[str, float]:
        """GPU hours by tenant, over all time."""
        scale = WHOLE_GPU * SECOND * 3600
        return {name: tenant.served / scale for name, tenant in sorted(self._tenants.items())}

    def fairness(self) -> float:
        """Jain's index over service divided by weight in contended time; 1 when nobody ever had to share."""
        return jain({name: tenant.contended / tenant.weight for name, tenant in self._tenants.items()})
