"""Reads profiles: the ones that come with the engine by name, others from TOML text."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any

from engine.levels.ordering import ORDERINGS, Ordering
from engine.levels.scorers import SCORERS
from engine.profile import Profile
from engine.tasks import SECOND

NAMES = ("fifo", "kube-default", "aigc")

# TOML section -> key -> (field of Profile, kind); times are written in seconds and kept in microseconds.
_FIELDS: dict[str, dict[str, tuple[str, str]]] = {
    "admission": {"reject_impossible": ("reject_impossible", "bool")},
    "placement": {
        "group_affinity": ("group_affinity", "bool"),
        "cached_model_bonus": ("cached_model_bonus", "int"),
    },
    "binding": {
        "warm_reuse": ("warm_reuse", "bool"),
        "spread_slots": ("spread_slots", "bool"),
        "predicted_memory": ("predicted_memory", "bool"),
        "warm_first_s": ("warm_first_us", "seconds"),
        "reclaim_idle": ("reclaim_idle", "bool"),
    },
    "preemption": {
        "enabled": ("preempt", "bool"),
        "urgent_weight": ("urgent_weight", "int"),
        "patience_s": ("preempt_patience_us", "seconds"),
        "reload_s": ("reload_us", "seconds"),
        "min_run_s": ("min_run_us", "seconds"),
    },
    "elasticity": {
        "keep_deployed": ("keep_deployed", "bool"),
        "scale_after_s": ("scale_after_us", "seconds"),
        "scale_nodes_max": ("scale_nodes_max", "int"),
    },
}
_ORDERING_FIELDS: dict[str, tuple[str, str]] = {
    "fair_tenants": ("fair_tenants", "bool"),
    "fair_groups": ("fair_groups", "bool"),
    "age_s": ("age_us", "seconds"),
    "aged_every": ("aged_every", "int"),
    "priority_step_s": ("priority_step_us", "seconds"),
    "shortest_first": ("shortest_first", "bool"),
}


class InvalidProfile(ValueError):
    """A profile cannot be read; says which key and what would be right."""


def load(name_or_toml: str) -> Profile:
    """Return the profile of that name (fifo, kube-default, aigc), or the one that a TOML text describes."""
    text = name_or_toml
    if name_or_toml in NAMES:
        text = resources.files(__package__).joinpath(f"{name_or_toml}.toml").read_text(encoding="utf-8")
    elif "=" not in name_or_toml:
        raise InvalidProfile(
            f"there is no profile {name_or_toml!r}; use one of {', '.join(NAMES)}, or the text of a TOML file"
        )
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidProfile(f"the profile is no TOML: {error}") from error
    return _profile(table)


def _profile(table: dict[str, Any]) -> Profile:
    values: dict[str, Any] = {"name": _value("name", table.pop("name", "unnamed"), "str")}
    ordering = table.pop("ordering", {"policy": "fifo"})
    values["ordering"] = _ordering(ordering)
    for section, content in table.items():
        known = _FIELDS.get(section)
        if known is None or not isinstance(content, dict):
            raise InvalidProfile(f"[{section}]: there is no such level; use ordering, {', '.join(_FIELDS)}")
        for key, raw in content.items():
            if section == "placement" and key == "scorers":
                values["scorers"] = _scorers(raw)
                continue
            if key not in known:
                raise InvalidProfile(f"{section}.{key}: there is no such key; use {', '.join(known)}")
            field, kind = known[key]
            values[field] = _value(f"{section}.{key}", raw, kind)
    return Profile(**values)


def _ordering(table: dict[str, Any]) -> Ordering:
    policy = table.get("policy")
    if policy not in ORDERINGS:
        raise InvalidProfile(f"ordering.policy: {policy!r} is unknown; use {', '.join(ORDERINGS)}")
    made = ORDERINGS[policy]
    values: dict[str, Any] = {}
    for key, raw in table.items():
        if key == "policy":
            continue
        field, kind = _ORDERING_FIELDS.get(key, ("", ""))
        if not field or field not in made.__dataclass_fields__:
            raise InvalidProfile(f"ordering.{key}: the policy {policy!r} has no such key")
        values[field] = _value(f"ordering.{key}", raw, kind)
    return made(**values)


def _scorers(raw: object) -> tuple[tuple[str, int], ...]:
    if not isinstance(raw, dict):
        raise InvalidProfile("placement.scorers: use a table of names and whole weights, as { best_fit = 1 }")
    for name in raw:
        if name not in SCORERS:
            raise InvalidProfile(f"placement.scorers.{name}: there is no such scorer; use {', '.join(SCORERS)}")
    return tuple((name, _value(f"placement.scorers.{name}", weight, "int")) for name, weight in raw.items())


def _value(key: str, raw: object, kind: str) -> Any:
    if kind == "bool" and isinstance(raw, bool):
        return raw
    if kind == "str" and isinstance(raw, str):
        return raw
    if kind == "int" and isinstance(raw, int) and not isinstance(raw, bool) and raw >= 0:
        return raw
    if kind == "seconds" and isinstance(raw, int | float) and not isinstance(raw, bool) and raw >= 0:
        return round(raw * SECOND)
    wanted = {
        "bool": "true or false",
        "str": "a text",
        "int": "a whole number of at least 0",
        "seconds": "seconds, at least 0",
    }[kind]
    raise InvalidProfile(f"{key}: {raw!r} is wrong; use {wanted}")
