"""Watches the platform through SS's port: follows job changes, reads nodes and queue, and keeps metrics and alerts up to date."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog
from prometheus_client import Gauge

from api.monitoring.abnormal import AbnormalityDetector, Alert, GpuSeen, NodeSeen
from api.monitoring.fold import JobsFold
from api.monitoring.logs import FileTail
from api.monitoring.metrics import Metrics
from api.ports import SupportPort
from engine.tasks import SECOND

log = structlog.get_logger("monitoring")
_MAX_NODES = 20_000
_MAX_SEED = 20_000
_LIVE = ("pending", "bound", "starting", "running", "stopping", "backoff")
_DOWN = ("down", "lost", "gone")


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
        self._seen_up: dict[str, float] = {}
        self._judged: dict[str, tuple[int, int]] = {}
        registry = metrics.registry
        self.up = Gauge("aigc_module_up", "Whether a module works.", ("module",), registry=registry)
        self.nodes = Gauge("aigc_nodes", "Nodes by state.", ("state",), registry=registry)
        self.gpus = Gauge(
            "aigc_node_gpus", "GPUs by node, model and health.", ("node", "model", "healthy"), registry=registry
        )
        self._gpu_gauges = [
            (Gauge(name, text, ("node", "gpu"), registry=registry), field, unit)
            for name, text, field, unit in (
                ("aigc_gpu_busy_ratio", "How busy a GPU is.", "busy_permille", 0.001),
                ("aigc_gpu_memory_bytes", "Memory of a GPU.", "memory_bytes", 1.0),
                ("aigc_gpu_memory_used_bytes", "Memory in use on a GPU.", "memory_used_bytes", 1.0),
                ("aigc_gpu_memory_free_bytes", "Memory of a GPU that no Pod holds.", "memory_free_bytes", 1.0),
                ("aigc_gpu_share_free_ratio", "Share of a GPU that no Pod holds.", "share_free", 0.001),
            )
        ]
        self.caches = Gauge(
            "aigc_node_cache",
            "Model caches of a node: models, bytes, hits, misses, evictions ... of each tier.",
            ("node", "tier", "figure"),
            registry=registry,
        )
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
        queue = await _or_empty(self._support.queue())
        self.queue.clear()
        for name, value in flat(queue):
            self.queue.labels(name).set(value)
        self._judge(queue.get("predictions"))
        self._judge_promises(queue.get("promises"))
        self.jobs.gauges()
        seen = self._nodes_seen(nodes, now)
        live = list(self.jobs.live.values())
        self._announce(self.detector.look(int(now * SECOND), live, seen, modules, gpus_seen(nodes)))

    def _nodes_seen(self, nodes: Sequence[Mapping[str, Any]], now: float) -> list[NodeSeen]:
        """Return the nodes with the time each was last known to be up; one that is drained may go."""
        names = {str(node.get("name", "")) for node in nodes}
        self._seen_up = {name: at for name, at in self._seen_up.items() if name in names}
        seen = []
        for node in nodes:
            name, heard = str(node.get("name", "")), node.get("heard_at")
            if isinstance(heard, (int, float)) and heard > 0:
                self._seen_up[name] = float(heard)
            elif node.get("state") not in _DOWN or name not in self._seen_up:
                self._seen_up[name] = now
            expected = not node.get("draining", False)
            seen.append(NodeSeen(name, int(self._seen_up[name] * SECOND), expected))
        return seen

    def _judge(self, predictions: Any) -> None:
        """Tell the detector of the runs that ended since the last look, from the scheduler's `MetricsFold.summary`."""
        if not isinstance(predictions, Mapping):
            return
        for method, counts in predictions.items():
            held, exceeded = int(counts.get("held", 0)), int(counts.get("exceeded", 0))
            before = self._judged.get(str(method), (held, exceeded))
            if held < before[0] or exceeded < before[1]:
                before = (0, 0)
            self._judged[str(method)] = (held, exceeded)
            for kind, count in ((False, held - before[0]), (True, exceeded - before[1])):
                for _ in range(min(count, 1000)):
                    self.detector.predicted(str(method), exceeded=kind)

    def _judge_promises(self, promises: Any) -> None:
        """Tell the detector how often promised finishes held, from the scheduler's foresight."""
        held = promises.get("held") if isinstance(promises, Mapping) else None
        latest = held.get("finish_p90") if isinstance(held, Mapping) else None
        if isinstance(latest, Mapping):
            count = int(latest["promises"])
            self.detector.promised(float(latest["level"]), round(float(latest["share"]) * count), count)

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
        for shown in (self.nodes, self.gpus, self.pods, self.caches, *(gauge for gauge, _, _ in self._gpu_gauges)):
            shown.clear()
        for node in nodes:
            name = str(node.get("name", ""))
            self.nodes.labels(str(node.get("state", "unknown"))).inc()
            for gpu in node.get("gpus") or ():
                uuid = str(gpu.get("uuid", ""))
                self.gpus.labels(name, str(gpu.get("model", "")), "yes" if gpu.get("healthy", True) else "no").inc()
                for gauge, field, unit in self._gpu_gauges:
                    if field in gpu:
                        gauge.labels(name, uuid).set(_number(gpu, field) * unit)
            for tier, figures in dict(node.get("caches") or {}).items():
                for figure, value in figures.items():
                    self.caches.labels(name, tier, figure).set(value)
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

    async def _seed(self) -> None:
        """Take in the jobs that were live before this process began to follow."""
        for state in _LIVE:
            cursor, count = "", 0
            while count < _MAX_SEED:
                page, cursor = await self._support.jobs("*", limit=100, cursor=cursor, state=state)
                for view in page:
                    self.jobs.seed(view, self._clock_s())
                count += len(page)
                if not cursor:
                    break

    async def _follow(self) -> None:
        after, seeded = 0, False
        while True:
            try:
                if not seeded:
                    await self._seed()
                    seeded = True
                async for event in self._support.events("*", "", after):
                    after = max(after, event.event_id)
                    self.jobs.fold(event)
            except Exception as error:
                log.warning("job_events_lost", error=repr(error))
            await asyncio.sleep(min(1.0, self._every_s))


def gpus_seen(nodes: Sequence[Mapping[str, Any]]) -> list[GpuSeen]:
    """Return the GPUs of nodes that are up, as SS shows them; those of lost nodes are no news."""
    return [
        GpuSeen(
            str(node.get("name", "")),
            str(gpu.get("uuid", "")),
            bool(gpu.get("healthy", True)) and bool(gpu.get("present", True)),
            bool(gpu.get("faulty", False)),
        )
        for node in nodes
        if node.get("state") not in _DOWN
        for gpu in node.get("gpus") or ()
        if isinstance(gpu, Mapping)
    ]


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


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name, 0)
    return float(value) if isinstance(value, (int, float)) else 0.0


async def _or_empty(call: Any) -> Mapping[str, Any]:
    try:
        found = await call
    except Exception:
        return {}
    return found if isinstance(found, Mapping) else {}
