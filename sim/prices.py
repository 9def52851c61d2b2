"""What GPUs cost: an editable file of prices, and prices written on the command line."""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from sim.hardware import GPU_MODELS

HOURS_PER_MONTH = 730.0
_HOURS = {"h": 1.0, "hour": 1.0, "day": 24.0, "month": HOURS_PER_MONTH, "year": 8760.0}


class PriceError(ValueError):
    """A price cannot be used; names the model or the key and the remedy."""


@dataclass(frozen=True, slots=True)
class Price:
    """What one GPU of a model costs per hour."""

    gpu_model: str
    per_hour: float


@dataclass(frozen=True, slots=True)
class PriceList:
    """Prices per GPU-hour by GPU model, in one currency."""

    currency: str
    per_hour: Mapping[str, float]
    source: str
    """Where it was read from, for reports."""

    def of(self, gpu_model: str) -> Price:
        """Return a model's price; raises `PriceError` when the list has none."""
        found = self.per_hour.get(gpu_model)
        if found is None:
            known = ", ".join(sorted(self.per_hour))
            raise PriceError(
                f"--gpu: {self.source} has no price of {gpu_model!r} (it has {known}); write one, as {gpu_model}:1.5/h, or add it "
                "to the file"
            )
        return Price(gpu_model, found)


def default_text() -> str:
    """Return the price list that comes with the package, as a file to edit."""
    return resources.files("sim.planner").joinpath("prices.toml").read_text(encoding="utf-8")


def own_path() -> Path:
    """Return where a price list of one's own is looked for."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "aigc" / "prices.toml"


def load(path: Path | None = None) -> PriceList:
    """Read a price list: the file named, else one's own if there is one, else the package's. Raises `PriceError`."""
    if path is None and not own_path().is_file():
        return read(default_text(), "the package's price list")
    chosen = path or own_path()
    try:
        text = chosen.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PriceError(
            f"--prices: cannot read {chosen}: {error}; `aigc plan prices` prints a list to begin with"
        ) from None
    return read(text, str(chosen))


def read(text: str, source: str) -> PriceList:
    """Read a price list from TOML; raises `PriceError` naming the key."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PriceError(f"{source}: no TOML ({error}); `aigc plan prices` prints a list to begin with") from None
    for key in table:
        if key not in {"currency", "per_hour"}:
            raise PriceError(f"{source}, {key}: there is no such key; use currency and [per_hour]")
    currency, listed = table.get("currency", "USD"), table.get("per_hour", {})
    if not isinstance(currency, str) or not currency:
        raise PriceError(f'{source}, currency: {currency!r} is no text; write it as currency = "USD"')
    if not isinstance(listed, dict) or not listed:
        raise PriceError(f"{source}, per_hour: must be a table of GPU models and prices, such as a100 = 1.8")
    prices: dict[str, float] = {}
    for model, value in listed.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not _sound(value):
            raise PriceError(f"{source}, per_hour.{model}: {value!r} is no price; write a number of at least 0")
        prices[model] = float(value)
    return PriceList(currency, prices, source)


def parse_offers(text: str, prices: PriceList) -> tuple[Price, ...]:
    """Read ``a100:1.8/h,h100:3.9/h``; a model without a price takes the list's. Raises `PriceError`."""
    offers: list[Price] = []
    for part in text.split(","):
        part = part.strip()
        if not part:
            continue
        model, colon, written = (piece.strip() for piece in part.partition(":"))
        if model not in GPU_MODELS:
            raise PriceError(f"--gpu: unknown GPU model {model!r}; known are {', '.join(sorted(GPU_MODELS))}")
        if any(offer.gpu_model == model for offer in offers):
            raise PriceError(f"--gpu: {model} is named twice; give each GPU model once")
        offers.append(Price(model, _price(part, written)) if colon else prices.of(model))
    if not offers:
        raise PriceError("--gpu: names no GPU; write models with prices, such as a100:1.8/h,h100:3.9/h")
    return tuple(offers)


def _price(part: str, written: str) -> float:
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)(?:/([a-z]+))?", written)
    if found is None:
        raise PriceError(f"--gpu {part!r}: {written!r} is no price; write a number per hour, such as 1.8/h")
    unit = found[2] or "h"
    if unit not in _HOURS:
        raise PriceError(f"--gpu {part!r}: {unit!r} is no unit of a price; use {', '.join(_HOURS)}")
    value = float(found[1]) / _HOURS[unit]
    if not _sound(value):
        raise PriceError(f"--gpu {part!r}: the price must be at least 0 and below 1e6 per hour")
    return value


def _sound(value: float) -> bool:
    return math.isfinite(value) and 0 <= value < 1e6
