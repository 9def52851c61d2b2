"""What a step of a running batch takes beside a step of one row: measured figures from a table that anyone can edit.

The simulator slows tasks that share a Pod by it, and the predictor's physics starts from it. One row is one picture of one request
(with guidance it goes through the UNet twice, alone or not, so that does not matter here).
"""

from __future__ import annotations

import tomllib
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

_FIELDS = {"gpu", "family", "picture_px", "rows", "rows_per_s", "gain", "step_ms", "source"}
_MEASURES = ("rows_per_s", "gain", "step_ms")


class StepTimesError(ValueError):
    """A table cannot be used; the message names the entry, the field and the remedy."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Steps of one GPU model, family and picture size."""

    gpu: str
    family: str
    picture_px: int
    """Edge of the square picture, in pixels."""
    rows: tuple[int, ...]
    """Batch sizes that were measured, rising from 1."""
    steps: tuple[float, ...]
    """Time of a step at each of them, over that of a step of one row."""
    source: str = ""

    def step(self, rows: float) -> float:
        """Return the time of a step of so many rows, over that of one row."""
        if rows <= 1 or len(self.rows) == 1:
            return max(1.0, rows)
        place = min(max(1, bisect_left(self.rows, rows)), len(self.rows) - 1)
        low, high = self.rows[place - 1], self.rows[place]
        slope = (self.steps[place] - self.steps[place - 1]) / (high - low)
        return self.steps[place - 1] + slope * (rows - low)

    def gain(self, rows: float) -> float:
        """Return how many times the rows per second of a batch of one come out of this batch."""
        return rows / self.step(rows)


@lru_cache(maxsize=8)
def read(path: Path | None = None) -> tuple[StepTimes, ...]:
    """Read a table, the project's own for None; raises `StepTimesError`."""
    try:
        if path is None:
            text = resources.files("predictors").joinpath("step_times.toml").read_text(encoding="utf-8")
        else:
            text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StepTimesError(f"step times: cannot read {path or 'step_times.toml'}: {error}") from None
    entries = values.get("measured")
    if set(values) != {"measured"} or not isinstance(entries, list):
        raise StepTimesError("step times: the table consists of entries [[measured]]; see predictors/step_times.toml")
    return tuple(_entry(number, entry) for number, entry in enumerate(entries, 1))


def find(table: Iterable[StepTimes], gpu: str, family: str, pixels: float) -> StepTimes | None:
    """Return the entry for a GPU model, a family and pictures of so many pixels, or None where nothing was measured."""
    for entry in table:
        if entry.gpu == gpu and entry.family == family and entry.picture_px * entry.picture_px == round(pixels):
            return entry
    return None


def _entry(number: int, entry: Mapping[str, Any]) -> StepTimes:
    where = f"step times, entry {number}"
    if not isinstance(entry, dict):
        raise StepTimesError(f"{where}: must be a table of fields")
    unknown = sorted(set(entry) - _FIELDS)
    if unknown:
        raise StepTimesError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(sorted(_FIELDS))}")
    for name in ("gpu", "family"):
        if not isinstance(entry.get(name), str) or not entry[name]:
            raise StepTimesError(f"{where}, {name}: give a name such as h100 or sdxl")
    size = entry.get("picture_px")
    if isinstance(size, bool) or not isinstance(size, int) or not 8 <= size <= 16_384:
        raise StepTimesError(f"{where}, picture_px: must be a whole number between 8 and 16384, got {size!r}")
    rows = entry.get("rows")
    if (
        not isinstance(rows, list)
        or len(rows) < 2
        or not all(isinstance(each, int) and not isinstance(each, bool) for each in rows)
        or rows[0] != 1
        or any(low >= high for low, high in pairwise(rows))
    ):
        raise StepTimesError(f"{where}, rows: must be batch sizes that rise from 1, such as [1, 4, 8], got {rows!r}")
    given = [name for name in _MEASURES if name in entry]
    if len(given) != 1:
        raise StepTimesError(f"{where}: give exactly one of {', '.join(_MEASURES)}, got {', '.join(given) or 'none'}")
    steps = _steps(where, given[0], entry[given[0]], rows)
    return StepTimes(entry["gpu"], entry["family"], size, tuple(rows), steps, str(entry.get("source", "")))


def _steps(where: str, name: str, values: object, rows: list[int]) -> tuple[float, ...]:
    if (
        not isinstance(values, list)
        or len(values) != len(rows)
        or not all(isinstance(each, int | float) and not isinstance(each, bool) and each > 0 for each in values)
    ):
        raise StepTimesError(
            f"{where}, {name}: must be {len(rows)} numbers above 0, one for each of rows, got {values!r}"
        )
    figures = [float(each) for each in values]
    spent = figures if name == "step_ms" else [count / rate for count, rate in zip(rows, figures, strict=True)]
    steps = tuple(each / spent[0] for each in spent)
    if any(low > high for low, high in pairwise(steps)):
        raise StepTimesError(f"{where}, {name}: a step of more rows cannot be quicker than one of fewer; measure again")
    return steps
