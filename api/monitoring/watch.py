"""Watches the platform through SS's port: follows job changes, reads nodes and queue, and keeps metrics and alerts up to date."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog
from prometheus_client import Gauge

from api.monitoring.abnormal import AbnormalityDetector, Alert, NodeSeen
from api.monitoring.fold import JobsFold
from api.monitoring.logs import FileTail
from api.monitoring.metrics import Metrics
from api.ports import SupportPort
from engine.tasks import SECOND

log = structlog.get_logger("monitoring")
_MAX_NODES = 20_000


class Watch:
    """Metrics and alerts of everything behind SS; one per process."""

    def __init__(
        self,
        support: SupportPort,
        metrics: Metrics,
        clock_s: Callable[[], float],
        *,
        every_s: float = 5.0,
        detector: AbnormalityDetector | None = None,
        tail: FileTail | None = None,
    ) -> None:
        self._support = support
        self._clock_s = clock_s
        self._every_s = every_s
        self._tail = tail
        self.detector = detector if detector is not None else AbnormalityDetector()
        self.jobs = JobsFold(metrics, self.detector, clock_s())
        self._tasks: list[asyncio.Task[None]] = []
        self._alerts: tuple[Alert, ...] = ()
        self._refreshed_at: float | None = None
        registry = metrics.registry
        self.up = Gauge("aigc_module_up", "Whether a module works.", ("module",), registry=registry)
        self.nodes = Gauge("aigc_nodes", "Nodes by state.", ("state",), registry=registry)
        self.gpus = Gauge(
            "aigc_node_gpus", "GPUs by node, model and health.", ("node", "model", "healthy"), registry=registry
        )
        self.gpu_busy = Gauge("aigc_gpu_busy_ratio", "How busy a GPU is.", ("node", "gpu"), registry=registry)
        self.gpu_used = Gauge(
            "aigc_gpu_memory_used_bytes", "Memory in use on a GPU.", ("node", "gpu"), registry=registry
        )
        self.gpu_total = Gauge("aigc_gpu_memory_bytes", "Memory of a GPU.", ("node", "gpu"), registry=registry)
        self.pods = Gauge("aigc_pods", "Pods by method and state.", ("method", "state"), registry=registry)
        self.queue = Gauge("aigc_queue", "Figures of queue and engine, by name.", ("name",), registry=registry)
        self.alerting = Gauge(
            "aigc_alerts", "Abnormal states that hold, by kind.", ("kind", "severity"), registry=registry
        )

    def alerts(self) -> tuple[Alert, ...]:
        """Return the alerts found by the latest look."""
        return self._alerts

    def start(self) -> None:
        """Begin to follow and to look, in the running event loop."""
        if self._every_s > 0:
            self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._look_often())]

    async def stop(self) -> None:
        """End what `start` began."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def refresh(self, at_least_every_s: float = 1.0) -> None:
        """Read nodes, queue and health, and look for abnormal states; at most once a second."""
        now = self._clock_s()
        if self._refreshed_at is not None and 0 <= now - self._refreshed_at < at_least_every_s:
            return
        self._refreshed_at = now
        health = await _or_empty(self._support.health())
        modules = {str(name): bool(module.get("ok")) for name, module in dict(health.get("modules", {})).items()}
        modules["support"] = bool(health)
        for name, works in modules.items():
            self.up.labels(name).set(int(works))
        nodes: Sequence[Mapping[str, Any]] = []
        with contextlib.suppress(Exception):
            nodes = (await self._support.nodes())[:_MAX_NODES]
        self._show_nodes(nodes)
        for name, value in flat(await _or_empty(self._support.queue())):
            self.queue.labels(name).set(value)
        self.jobs.gauges()
        seen = [_node_seen(node, now) for node in nodes]
        self._announce(self.detector.look(int(now * SECOND), list(self.jobs.live.values()), seen, modules))

    def _announce(self, alerts: tuple[Alert, ...]) -> None:
        known = {(alert.kind, alert.subject) for alert in self._alerts}
        for alert in alerts:
            if (alert.kind, alert.subject) not in known:
                log.warning(
                    "abnormal", kind=alert.kind, subject=alert.subject, severity=alert.severity, message=alert.message
                )
        self._alerts = alerts
        self.alerting.clear()
        for alert in alerts:
            self.alerting.labels(alert.kind, alert.severity).inc()

    def _show_nodes(self, nodes: Sequence[Mapping[str, Any]]) -> None:
        for gauge in (self.nodes, self.gpus, self.gpu_busy, self.gpu_used, self.gpu_total, self.pods):
            gauge.clear()
        for node in nodes:
            name = str(node.get("name", ""))
            self.nodes.labels(str(node.get("state", "unknown"))).inc()
            for gpu in node.get("gpus") or ():
                uuid = str(gpu.get("uuid", ""))
                self.gpus.labels(name, str(gpu.get("model", "")), "yes" if gpu.get("healthy", True) else "no").inc()
                self.gpu_busy.labels(name, uuid).set(_number(gpu, "busy_permille") / 1000)
                self.gpu_used.labels(name, uuid).set(_number(gpu, "memory_used_bytes"))
                self.gpu_total.labels(name, uuid).set(_number(gpu, "memory_bytes"))
            for pod in node.get("pods") or ():
                if isinstance(pod, Mapping):
                    self.pods.labels(str(pod.get("method", "")), str(pod.get("state", ""))).inc()

    async def _look_often(self) -> None:
        while True:
            try:
                await self.refresh()
                if self._tail is not None:
                    await asyncio.to_thread(self._tail.poll)
            except Exception:
                log.exception("watch_failed")
            await asyncio.sleep(min(self._every_s, 1.0) if self._tail is not None else self._every_s)

    async def _follow(self) -> None:
        after = 0
        while True:
            try:
                async for event in self._support.events("*", "", after):
                    after = max(after, event.event_id)
                    self.jobs.fold(event)
            except Exception as error:
                log.warning("job_events_lost", error=repr(error))
            await asyncio.sleep(min(1.0, self._every_s))


def flat(tree: Mapping[str, Any], prefix: str = "", depth: int = 4) -> list[tuple[str, float]]:
    """Return the numbers of a nested mapping with their dotted names; at most 1,000."""
    rows: list[tuple[str, float]] = []
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and depth:
            rows += flat(value, f"{path}.", depth - 1)
        elif isinstance(value, (int, float)):
            rows.append((path, float(value)))
    return rows[:1000]


def _node_seen(node: Mapping[str, Any], now_s: float) -> NodeSeen:
    heard = node.get("heard_at")
    at = heard if isinstance(heard, (int, float)) and heard > 0 else now_s
    return NodeSeen(str(node.get("name", "")), int(at * SECOND), str(node.get("state", "")) not in ("lost", "gone"))


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name, 0)
    return float(value) if isinstance(value, (int, float)) else 0.0


async def _or_empty(call: Any) -> Mapping[str, Any]:
    try:
        found = await call
    except Exception:
        return {}
    return found if isinstance(found, Mapping) else {}
