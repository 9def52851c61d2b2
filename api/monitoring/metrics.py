"""The gateway's Prometheus metrics, and the registry that every module's metrics share.

Names follow the conventions: prefix ``aigc_<module>_``, base units (seconds, bytes), ``_total`` on counters. No label carries
a reqNo, a key, or a path with ids in it, so that the number of series is bounded.
"""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """One registry with the process's own figures and the gateway's."""

    def __init__(self, registry: CollectorRegistry | None = None, *, process: bool = True) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        if process:
            ProcessCollector(registry=self.registry)
            PlatformCollector(registry=self.registry)
        self.requests = Counter(
            "aigc_gateway_requests", "Requests answered.", ("method", "route", "status"), registry=self.registry
        )
        self.request_seconds = Histogram(
            "aigc_gateway_request_duration_seconds",
            "Time to answer.",
            ("route",),
            buckets=_FAST,
            registry=self.registry,
        )
        self.in_flight = Gauge("aigc_gateway_requests_in_flight", "Requests being answered.", registry=self.registry)
        self.refused = Counter(
            "aigc_gateway_refused", "Requests refused, by reason.", ("reason",), registry=self.registry
        )
        self.queued = Counter(
            "aigc_gateway_submissions_queued", "Submissions put on the queue.", ("urgency",), registry=self.registry
        )
        self.window_waiting = Gauge(
            "aigc_gateway_window_submissions", "Submissions waiting in the admission window.", registry=self.registry
        )
        self.window_seconds = Histogram(
            "aigc_gateway_window_wait_seconds",
            "Time from arrival to durable in the queue.",
            ("urgency",),
            registry=self.registry,
        )
        self.served_bytes = Counter(
            "aigc_gateway_file_bytes", "Bytes of files offered by signed links.", registry=self.registry
        )

    def exposition(self) -> bytes:
        """Return all metrics in the text format."""
        return generate_latest(self.registry)
