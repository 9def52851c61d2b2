"""What a request needs of a GPU, asked at the door: one that no GPU here can ever run is refused before it is queued.

Only models whose directory this machine has can be judged; for all others the Pod is the judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from api.support.jobs import Model
from executors.memory.footprint import Footprint, FootprintUnknown, read_footprint
from executors.memory.plan import TrainingNeeds, too_large, training_too_large
from executors.pod_models import BUILTIN_MODELS

HALF_BYTES = 2
_PLAIN_PX = 64
"""Side of the smallest picture that is made; a model too large for it is too large for all."""
_KNOWN = 64

FindModel = Callable[[str], Model | None]


class MemoryDoor:
    """Judges requests by the footprint of their base model and the largest GPU there is."""

    def __init__(self, find_model: FindModel, largest_card: Callable[[], int]) -> None:
        """`largest_card` returns the memory of the largest GPU in bytes, 0 while none is known."""
        self._find_model = find_model
        self._largest_card = largest_card
        self._footprints: dict[Path, Footprint | None] = {}

    def problem(self, model_id: str, parameters: Mapping[str, Any]) -> str:
        """Return why a picture can never be made here, as ``width, height: ...``; empty when it can, or nobody knows."""
        largest = self._largest_card()
        found = self._footprint(model_id) if largest else None
        if found is None:
            return ""
        width, height = (int(parameters.get(name) or _PLAIN_PX) for name in ("width", "height"))
        wrong = too_large(found, HALF_BYTES, width, height, largest, model_id)
        return f"width, height: {wrong}" if wrong else ""

    def training_problem(self, model_id: str, parameters: Mapping[str, Any]) -> str:
        """Return why a training can never run here, as ``size: ...``; empty when it can, or nobody knows."""
        largest = self._largest_card()
        found = self._footprint(model_id) if largest else None
        if found is None:
            return ""
        trained = ("unet", "text_encoder", "text_encoder_2") if parameters.get("text_encoder", True) else ("unet",)
        needs = TrainingNeeds(
            side_px=int(parameters.get("size") or found.native_px),
            rows=1,
            full=parameters.get("method") == "full",
            parts=trained,
            frugal=bool(parameters.get("gradient_checkpointing", False)),
        )
        wrong = training_too_large(found, HALF_BYTES, needs, largest, model_id)
        return f"size: {wrong}" if wrong else ""

    def features(self, model_id: str) -> tuple[tuple[str, str | int], ...]:
        """Return what predictions know a model by: its family and the size of its weights; nothing for the bundled one."""
        folder = self._folder(model_id)
        found = self._footprint(model_id)
        if found is None or folder in BUILTIN_MODELS.values():
            return ()
        weights = ("weights_bytes", found.weights_bytes(HALF_BYTES))
        return (("family", found.family), weights) if found.family else (weights,)

    def _footprint(self, model_id: str) -> Footprint | None:
        folder = self._folder(model_id)
        if folder is None:
            return None
        if folder not in self._footprints:
            if len(self._footprints) >= _KNOWN:
                self._footprints.clear()
            try:
                self._footprints[folder] = read_footprint(folder)
            except FootprintUnknown:
                self._footprints[folder] = None
        return self._footprints[folder]

    def _folder(self, model_id: str) -> Path | None:
        model = self._find_model(model_id)
        if model is not None and model.base and model.kind not in ("builtin", "local"):
            model = self._find_model(model.base)
        if model is None:
            return None
        if model.kind == "builtin":
            return BUILTIN_MODELS.get(model.model_id)
        path = model.metadata.get("path")
        return Path(path) if model.kind == "local" and isinstance(path, str) else None
