"""Prior pictures that were made before, on this node: many trainings share a base model and a category.

What is kept are latents, named by everything they depend on, so that a hit is bit for bit what would be made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

KEPT_FILES = 64
"""Priors that stay on a node, the least recently used go first."""


def key_of(facts: Mapping[str, Any]) -> str:
    """Return the name of the prior that these facts lead to."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()


def find(folder: Path | None, key: str) -> torch.Tensor | None:
    """Return the latents kept under a key; None when there are none that can be read."""
    if folder is None:
        return None
    path = folder / f"{key}.safetensors"
    try:
        latents: torch.Tensor = load_file(str(path))["latents"]
        os.utime(path)
    except FileNotFoundError:
        return None
    except (OSError, KeyError, SafetensorError) as error:
        print(f"prior {path} cannot be read and is made anew: {error}", file=sys.stderr, flush=True)
        path.unlink(missing_ok=True)
        return None
    return latents.clone()


def keep(folder: Path | None, key: str, latents: torch.Tensor) -> None:
    """Keep latents under a key, whole or not at all; a full disk costs the cache, not the training."""
    if folder is None:
        return
    partial = folder / f".{key}.{secrets.token_hex(4)}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"latents": latents.detach().cpu().contiguous()}, str(partial))
        partial.replace(folder / f"{key}.safetensors")
        _evict(folder)
    except (OSError, SafetensorError) as error:
        print(f"the prior could not be kept: {error}", file=sys.stderr, flush=True)
    finally:
        partial.unlink(missing_ok=True)


def _evict(folder: Path) -> None:
    kept = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    for path in kept[:-KEPT_FILES]:
        path.unlink(missing_ok=True)
