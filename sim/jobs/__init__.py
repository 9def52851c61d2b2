"""Batch jobs at full speed: gangs on nodes of equal size, without Pods, protocol and journal. See docs/reproduce.md."""

from __future__ import annotations

from sim.jobs.figures import JobFigures
from sim.jobs.result import JobsResult, simulate_jobs
from sim.jobs.workload import POLICIES, Jobs, from_workload, make_jobs

__all__ = ["POLICIES", "JobFigures", "Jobs", "JobsResult", "from_workload", "make_jobs", "simulate_jobs"]
