"""How many GPUs are needed, and which: a search over simulations for the cheapest cluster that keeps what was promised."""

from __future__ import annotations

from sim.planner.objectives import Objective, ObjectiveError
from sim.planner.planning import plan
from sim.planner.request import PlanError, PlanRequest
from sim.planner.results import Plan

__all__ = ["Objective", "ObjectiveError", "Plan", "PlanError", "PlanRequest", "plan"]
