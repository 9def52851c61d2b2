"""Refusals for want of room, with an honest Retry-After and what is possible instead.

The time is when room is expected, never sooner; it is at most two minutes, and spread, so that those who were refused together do
not come back together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from api.gateway.problems import Refused
from api.gateway.retry import retry_after


def refused_for_now(
    status: int, code: str, what: str, seconds: float, alternatives: Sequence[Mapping[str, Any]] = ()
) -> Refused:
    """Return a refusal that says when to come again; `later` is always among the alternatives."""
    after_s = retry_after(seconds)
    later = {"kind": "later", "change": {"after_s": after_s}}
    others = [dict(one) for one in alternatives if one.get("kind") != "later"]
    return Refused(
        status,
        code,
        f"{what}; try again in {after_s} s.",
        headers={"Retry-After": str(after_s)},
        alternatives=[*others, later],
    )
