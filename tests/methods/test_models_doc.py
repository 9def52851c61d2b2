"""The documentation of the methods lists every parameter with its bounds, as the classes have them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from executors.methods.parameters import PARAMETERS

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"


def bounds(entry: dict[str, Any]) -> str:
    """What a JSON schema allows, in a few words."""
    choices = entry.get("anyOf", [entry])
    said: list[str] = []
    for choice in choices:
        match choice:
            case {"type": "null"}:
                continue
            case {"enum": values}:
                said.append(" ".join(f"`{value}`" for value in values))
            case {"const": value}:
                said.append(f"`{value}`")
            case {"type": "array"}:
                said.append(f"list of {choice.get('minItems', 0)} to {choice['maxItems']}")
            case {"type": "string", "pattern": pattern} if "maxLength" not in choice:
                said.append("a file's id" if "64" in pattern else "text")
            case {"type": "string"}:
                said.append(f"text, {choice.get('minLength', 0)} to {choice['maxLength']}")
            case {"type": "boolean"}:
                said.append("yes or no")
            case _:
                low = f"> {choice['exclusiveMinimum']}" if "exclusiveMinimum" in choice else f"{choice['minimum']}"
                high = f" to {choice['maximum']}" if "maximum" in choice else " or more"
                multiple = f", by {choice['multipleOf']}" if "multipleOf" in choice else ""
                said.append(f"{low}{high}{multiple}")
    return " or ".join(said)


def table(method: str) -> str:
    schema = PARAMETERS[method].model_json_schema()
    lines = ["| parameter | allowed | default | meaning |", "|---|---|---|---|"]
    for name, entry in schema["properties"].items():
        default = "required" if name in schema.get("required", []) else f"`{entry['default']!r}`"
        default = default.replace("`None`", "absent")
        lines.append(f"| `{name}` | {bounds(entry)} | {default} | {entry['description']} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("method", sorted(PARAMETERS))
def test_the_table_of_a_method_is_what_its_class_says(method: str) -> None:
    pattern = re.compile(rf"(<!-- parameters: {method} -->\n)(.*?)(<!-- end -->)", re.DOTALL)
    if os.environ.get("REWRITE_DOCS"):
        DOCUMENT.write_text(pattern.sub(lambda found: found[1] + table(method) + found[3], DOCUMENT.read_text()))
    found = pattern.search(DOCUMENT.read_text())
    assert found is not None
    assert found[2] == table(method), "run the tests once with REWRITE_DOCS=1"
