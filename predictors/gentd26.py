"""Reads GenTD26's request trace as it is published: one row per request of a Stable Diffusion serving system.

Columns: ``gmt_create, predict_type, predict_status, exec_time_seconds, groupId, prompt_length, negative_prompt_length,
num_images_per_prompt, num_inference_steps, checkpoint_model_version_id, num_lora``. Source: alibaba/clusterdata,
cluster-trace-v2026-GenAI.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from engine.tasks import SECOND, Micros
from predictors.features import Feature

SUCCEED, FAILED, PENDING, PROCESSING = "SUCCEED", "FAILED", "PENDING", "PROCESSING"
_NEEDED = ("gmt_create", "predict_status", "exec_time_seconds", "groupId", "checkpoint_model_version_id")


@dataclass(frozen=True, slots=True)
class Row:
    """One request. Its time is end to end, in whole seconds: waiting and load are in it, and it is not GPU time."""

    submitted_us: Micros
    """On the trace's own clock, which is shifted: hours and weekdays mean nothing."""
    run_us: Micros
    status: str
    user: str
    model: str
    kind: str
    images: float
    """0 where the trace has none."""
    steps: float
    loras: int
    prompt_length: float

    def features(self) -> dict[str, Feature]:
        """Return what is known about the request when it is submitted."""
        return {
            "method": "text_to_image",
            "model": self.model,
            "user": self.user,
            "kind": self.kind,
            "images": self.images,
            "steps": self.steps,
            "loras": self.loras,
            "prompt_length": self.prompt_length,
        }


def read_rows(path: Path) -> list[Row]:
    """Return all rows, those that failed or never finished too, in order of submission.

    Raises ValueError naming the column or the line that cannot be read.
    """
    rows: list[Row] = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: column {missing[0]} is missing; expected lora_request_trace.csv of GenTD26")
        for line, fields in enumerate(reader, start=2):
            try:
                rows.append(_row(fields))
            except (ValueError, OverflowError) as error:
                raise ValueError(f"{path}, line {line}: {error}") from error
    rows.sort(key=lambda row: row.submitted_us)
    return rows


def _row(fields: dict[str, str]) -> Row:
    created = datetime.fromisoformat(fields["gmt_create"]).replace(tzinfo=UTC)
    return Row(
        submitted_us=round(created.timestamp() * SECOND),
        run_us=round(_number(fields, "exec_time_seconds") * SECOND),
        status=fields["predict_status"],
        user=fields["groupId"],
        model=fields["checkpoint_model_version_id"],
        kind=fields.get("predict_type") or "",
        images=_number(fields, "num_images_per_prompt"),
        steps=_number(fields, "num_inference_steps"),
        loras=int(_number(fields, "num_lora")),
        prompt_length=_number(fields, "prompt_length"),
    )


def _number(fields: dict[str, str], name: str) -> float:
    text = fields.get(name)
    if not text:
        return 0.0
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}: expected a number, got {text!r}") from None
