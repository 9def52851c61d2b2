"""The tiny text-to-image model that comes with the package: who drew its world, how it was trained, where its files are.

Importing this package costs nothing: torch is imported by the submodules that train or judge.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR = Path(__file__).with_name("model")
JUDGE_DIR = Path(__file__).with_name("judge_weights")
MODEL_ID = "tiny"

__all__ = ["JUDGE_DIR", "MODEL_DIR", "MODEL_ID"]
