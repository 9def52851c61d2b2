"""Where a trained model comes from: the hash of its base, the versions that made it, and the card that tells people."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CARD = "README.md"
_COUNTED = frozenset({".safetensors", ".json", ".txt", ".model"})
_LIBRARIES = ("torch", "diffusers", "transformers", "safetensors")
_CHUNK_BYTES = 1 << 20


def base_digest(folder: Path) -> str:
    """Return the SHA-256 over the names and contents of all files that a pipeline directory is loaded from."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _COUNTED and path.is_file()):
        digest = hashlib.sha256()
        with path.open("rb") as content:
            while chunk := content.read(_CHUNK_BYTES):
                digest.update(chunk)
        whole.update(f"{path.relative_to(folder).as_posix()}\0{digest.hexdigest()}\n".encode())
    return whole.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the numbers."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def card(facts: Mapping[str, Any], recipe: Mapping[str, Any], losses: Sequence[tuple[int, float]]) -> str:
    """Return a model card: front matter that model hubs read, then what was taught, how, and how to use it."""
    lora = facts["kind"] == "lora"
    front = {
        "base_model": facts["base_model"],
        "base_model_sha256": facts["base_model_sha256"],
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "instance_prompt": facts["prompt"],
        "tags": ["text-to-image", "dreambooth", *(["lora"] if lora else [])],
    }
    # JSON is YAML, so no text of a user can break out of its value.
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    kind = f"a LoRA of rank {facts['rank']}" if lora else "all weights"
    lines += [
        f"# {_plain(facts['instance_token'])} {_plain(facts['category'])}",
        "",
        f"DreamBooth ({kind}) of one subject on the base model `{_plain(facts['base_model'])}`, from "
        f"{facts['pictures']} pictures in {facts['steps']} steps.",
        f'Write "{_plain(facts["prompt"])}" in a prompt to draw the subject.',
        "",
        "The weights fit this base model alone: SHA-256 over its files",
        f"`{facts['base_model_sha256']}`. Its licence holds for them too.",
        "",
        "## Recipe",
        "",
        "| parameter | value |",
        "|---|---|",
        *(f"| `{key}` | {_cell(value)} |" for key, value in sorted(recipe.items())),
        "",
        "Made with " + ", ".join(f"{name} {number}" for name, number in facts["versions"].items()) + ".",
        "",
    ]
    if losses:
        lines += ["## Loss", "", "| step | loss |", "|---:|---:|"]
        lines += [f"| {step} | {loss:.5f} |" for step, loss in losses] + [""]
    return "\n".join(lines)


def curve(losses: Sequence[float], points: int = 100) -> list[tuple[int, float]]:
    """Return (step, mean loss up to it since the point before) at no more than so many steps, the last one included."""
    count = min(points, len(losses))
    ends = [round((index + 1) * len(losses) / count) for index in range(count)]
    starts = [0, *ends][:count]
    return [(end, sum(losses[start:end]) / (end - start)) for start, end in zip(starts, ends, strict=True)]


def _plain(text: Any) -> str:
    return str(text).replace("`", "'").replace("\n", " ")


def _cell(value: Any) -> str:
    text = _plain(json.dumps(value)).replace("|", "\\|")
    return f"`{text if len(text) <= 200 else text[:200] + ' ...'}`"
