"""A method inside real Pods that offers checkpoints while it runs on."""

from __future__ import annotations

import json
import time
from typing import Any

from executors.methods.base import MethodContext, MethodResult


class Offers:
    """Offers a checkpoint after every step, and dies or waits after the last of them if told so."""

    def load(self, model: Any, device: str) -> None:
        pass

    def run(self, parameters: Any, context: MethodContext) -> MethodResult:
        began = 0
        if context.checkpoint is not None:
            began = json.loads((context.checkpoint / "step.json").read_text())
        left = sorted(path.name for path in context.checkpoint.iterdir()) if context.checkpoint is not None else []
        folder = context.output_dir / "checkpoint"
        folder.mkdir()
        for step in range(began, parameters.steps):
            context.progress(step + 1, 100)
            (folder / "step.json").write_text(json.dumps(step + 1))
            context.offer_checkpoint(folder)
        while parameters.model_dump().get("hang"):
            time.sleep(0.01)
        if parameters.model_dump().get("dies"):
            raise RuntimeError("died after its last checkpoint")
        return MethodResult(metadata={"began": began, "unpacked": left})

    def close(self) -> None:
        pass
