"""A job's pictures between two steps as files: tensors in safetensors, the rest in JSON, what is made already as PNG.

Nothing in these files is code; what does not fit the job is refused when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from executors.batching.requests import KeptPicture, PictureRequest

_TENSORS, _FACTS = "pictures.safetensors", "pictures.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class KeptJob:
    """A job that stopped: pictures by their place, made or on their way."""

    seed: int
    kept: Mapping[int, KeptPicture] = field(default_factory=dict)
    made: Mapping[int, Any] = field(default_factory=dict)
    """PIL images."""


def write(folder: Path, job: KeptJob) -> None:
    """Write a job into an empty directory."""
    entries: dict[str, Any] = {}
    tensors = {}
    for place, kept in job.kept.items():
        entries[str(place)] = {"done": kept.done, "values": dict(kept.values)}
        tensors.update({f"{place}/{name}": tensor.contiguous() for name, tensor in kept.tensors.items()})
    for place, picture in job.made.items():
        picture.save(folder / f"{place}.png")
    save_file(tensors, str(folder / _TENSORS))
    facts = {"format": _FORMAT, "seed": job.seed, "kept": entries, "made": sorted(job.made)}
    (folder / _FACTS).write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")


def read_seed(folder: Path) -> int:
    """Return the job's seed, which may have been drawn; raises ValueError."""
    seed = _facts(folder).get("seed")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"kept job in {folder.name}: seed {seed!r} is none")
    return seed


def read(folder: Path, requests: Mapping[int, PictureRequest]) -> KeptJob:
    """Read what `write` wrote for the same requests by place; raises ValueError when it is another job's or not whole."""
    facts = _facts(folder)
    try:
        tensors = load_file(str(folder / _TENSORS))
        kept = {}
        for text, entry in facts["kept"].items():
            own = {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(f"{text}/")}
            kept[int(text)] = KeptPicture(requests[int(text)], int(entry["done"]), own, dict(entry["values"]))
        made = {}
        for place in facts["made"]:
            with Image.open(folder / f"{int(place)}.png") as picture:
                made[int(place)] = picture.convert("RGB")
        if {*kept, *made} != set(requests):
            raise ValueError(f"it holds pictures {sorted({*kept, *made})} of {len(requests)}")
        return KeptJob(int(facts["seed"]), kept, made)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"kept job in {folder.name} cannot be read: {type(error).__name__}: {error}") from error


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"kept job in {folder.name} cannot be read: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
        raise ValueError(f"kept job in {folder.name} has a format that is unknown, this version reads {_FORMAT}")
    return facts
