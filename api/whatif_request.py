"""What may be asked of `POST /v1/whatif` and `aigc whatif`; apart from what answers it, so that the gateway loads no simulator."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PoolText = Annotated[str, Field(max_length=120, description="`2xa100`, or `2xa100:8` with 8 GPUs on each node.")]


class WhatIfRequest(BaseModel):
    """What to change. Everything left out stays as it is."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    add_nodes: list[PoolText] = Field(default_factory=list, max_length=20, description="Nodes that join.")
    remove_nodes: list[PoolText] = Field(default_factory=list, max_length=20, description="Nodes that are drained.")
    profile: str = Field(
        default="", max_length=64, pattern=r"^[a-z0-9-]*$", description="Name of another scheduling profile."
    )
    load: float = Field(default=1.0, gt=0, le=1000, description="Arrivals come so many times as fast.")
    window_hours: float | None = Field(
        default=None, ge=0, le=8784, description="So much of the past arrives once more; absent: all, at most 24."
    )
    hours: float | None = Field(
        default=None, ge=0, le=8784, description="It arrives for so long; absent: as the window."
    )
    back_s: float = Field(default=0.0, ge=0, description="Begin so many seconds before the journal's end.")
    seeds: int = Field(default=5, ge=2, le=100, description="Pairs of simulations; more give narrower intervals.")
