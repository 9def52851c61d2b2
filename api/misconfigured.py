"""Says what is wrong with a configuration: lines that name the field, what was given, and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

_SECTION_KINDS = frozenset({"model_type", "model_attributes_type", "dict_type"})
_SECRET = ("key", "secret", "token")


def described(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return one line for each wrong field of `model`; `prefix` stands before the fields' names."""
    return [_line(item, model, prefix) for item in error.errors(include_url=False)]


def misspelt(variables: Iterable[str], model: type[BaseModel], env_prefix: str) -> list[str]:
    """Return one line for each environment variable that sets nothing since its section and field are joined by one underscore."""
    meant = {
        f"{env_prefix}{section}_{field}".upper(): f"{env_prefix}{section}__{field}".upper()
        for section, info in model.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        for field in info.annotation.model_fields
    }
    return [f"  {name}: there is no such variable; did you mean {meant[name]}?" for name in variables if name in meant]


def _line(item: Mapping[str, Any], model: type[BaseModel], prefix: str) -> str:
    path = [str(part) for part in item["loc"]]
    field = ".".join([*([prefix] if prefix else []), *path]) or "configuration"
    if item["type"] == "extra_forbidden":
        return f"  {field}: there is no such field; {_instead(path, model)}"
    if item["type"] in _SECTION_KINDS:
        return f"  {field}: this is a section of fields; write [{field}] and its fields below it"
    text = str(item["msg"]).removeprefix("Value error, ")
    given = item.get("input")
    if isinstance(given, str | int | float) and path and not any(word in path[-1] for word in _SECRET):
        text += f" (given: {given!r})"
    return f"  {field}: {text}"


def _instead(path: list[str], model: type[BaseModel]) -> str:
    """Say which field was meant, or which there are."""
    section: Any = model
    for part in path[:-1]:
        section = _section_in(section, part)
        if section is None:
            return "see docs/configuration.md"
    known = list(section.model_fields)
    near = difflib.get_close_matches(path[-1], known, 1)
    return f"did you mean {near[0]}?" if near else "there are " + ", ".join(known)


def _section_in(section: type[BaseModel] | dict[str, Any], part: str) -> Any:
    if isinstance(section, dict):  # the sections of a table with free names, such as [methods.NAME]
        return section["each"]
    field = section.model_fields.get(part)
    if field is None:
        return None
    kind = field.annotation
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    each = get_args(kind)[-1:]
    return {"each": each[0]} if each and isinstance(each[0], type) and issubclass(each[0], BaseModel) else None
