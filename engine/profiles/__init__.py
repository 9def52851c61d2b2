"""Reads profiles: the ones that come with the engine by name, others from TOML text."""

from __future__ import annotations

import tomllib
from dataclasses import MISSING, fields
from importlib import import_module, resources
from typing import Any

from engine.levels.ordering import Ordering, Policy
from engine.levels.orderings import ORDERINGS
from engine.levels.quotas import QueueSpec, Quotas
from engine.levels.scorers import SCORERS, scorer
from engine.profile import BACKFILLS, Profile
from engine.profiles.placement import READERS
from engine.resources import WHOLE_GPU
from engine.tasks import SECOND

_FIRST = ("fifo", "kube-default", "aigc")


def _names() -> tuple[str, ...]:
    found = {
        each.name.removesuffix(".toml") for each in resources.files(__package__).iterdir() if each.name[-5:] == ".toml"
    }
    return (*_FIRST, *sorted(found - set(_FIRST)))


NAMES = _names()
"""The profiles that come with the engine: the TOML files beside this one."""

# TOML section -> key -> (field of Profile, kind); times are written in seconds and kept in microseconds.
_FIELDS: dict[str, dict[str, tuple[str, str]]] = {
    "admission": {"reject_impossible": ("reject_impossible", "bool")},
    "placement": {
        "group_affinity": ("group_affinity", "bool"),
        "cached_model_bonus": ("cached_model_bonus", "int"),
        "prefetch_ahead": ("prefetch_ahead", "int"),
        "gpu_speed_weight": ("gpu_speed_weight", "int"),
        "compact_gangs": ("compact_gangs", "bool"),
    },
    "binding": {
        "warm_reuse": ("warm_reuse", "bool"),
        "spread_slots": ("spread_slots", "bool"),
        "predicted_memory": ("predicted_memory", "bool"),
        "warm_first_s": ("warm_first_us", "seconds"),
        "reclaim_idle": ("reclaim_idle", "bool"),
        "slot_slowdown_permille": ("slot_slowdown_permille", "int"),
        "widen_loads": ("widen_loads", "int"),
        "gather_s": ("gather_us", "seconds"),
        "serve_loads": ("serve_loads", "int"),
        "warm_first_loads": ("warm_first_loads", "int"),
    },
    "preemption": {
        "enabled": ("preempt", "bool"),
        "urgent_weight": ("urgent_weight", "int"),
        "patience_s": ("preempt_patience_us", "seconds"),
        "reload_s": ("reload_us", "seconds"),
        "min_run_s": ("min_run_us", "seconds"),
        "most_per_task": ("preemptions_per_task", "int"),
    },
    "elasticity": {
        "keep_deployed": ("keep_deployed", "bool"),
        "scale_after_s": ("scale_after_us", "seconds"),
        "scale_nodes_max": ("scale_nodes_max", "int"),
        "scale_level": ("scale_level", "int"),
        "scale_fill_permille": ("scale_fill_permille", "int"),
        "scale_headroom_permille": ("scale_headroom_permille", "int"),
        "clear_s": ("clear_us", "seconds"),
        "warm_ahead": ("warm_ahead", "bool"),
        "hold_permille": ("hold_permille", "int"),
    },
}
_QUEUE_FIELDS = {
    "guaranteed_gpus": ("guaranteed", "gpus"),
    "limit_gpus": ("limit", "gpus"),
    "weight": ("weight", "int"),
    "parent": ("parent", "str"),
    "tenants": ("tenants", "texts"),
}


class InvalidProfile(ValueError):
    """A profile cannot be read; says which key and what would be right."""


def load(name_or_toml: str, own_policies: bool = True) -> Profile:
    """Return the profile of that name (one of `NAMES`), or the one that a TOML text describes.

    A text may name an ordering of one's own as ``module:Class``, which imports that module: pass `own_policies=False` for
    texts that come from others.
    """
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
    return _profile(table, own_policies)


def _profile(table: dict[str, Any], own_policies: bool) -> Profile:
    values: dict[str, Any] = {"name": _value("name", table.pop("name", "unnamed"), "str")}
    values.update(_ordering(table.pop("ordering", {"policy": "fifo"}), own_policies))
    if "quotas" in table:
        values["quotas"] = _quotas(table.pop("quotas"))
    for section, content in table.items():
        known = _FIELDS.get(section)
        if known is None or not isinstance(content, dict):
            raise InvalidProfile(f"[{section}]: there is no such level; use ordering, quotas, {', '.join(_FIELDS)}")
        for key, raw in content.items():
            if section == "placement" and key == "scorers":
                values["scorers"] = _scorers(raw, own_policies)
                continue
            if section == "placement" and key in READERS:
                try:
                    values[key] = READERS[key](raw)
                except ValueError as error:
                    raise InvalidProfile(str(error)) from error
                continue
            if key not in known:
                raise InvalidProfile(f"{section}.{key}: there is no such key; use {', '.join(known)}")
            field, kind = known[key]
            values[field] = _value(f"{section}.{key}", raw, kind)
    return Profile(**values)


def _ordering(table: object, own_policies: bool) -> dict[str, Any]:
    """Read the section of the ordering: the policy with its own keys, and what others may do meanwhile."""
    if not isinstance(table, dict):
        raise InvalidProfile('[ordering]: use a table, as [ordering] and policy = "fifo" below it')
    found: dict[str, Any] = {}
    backfill = table.pop("backfill", "skip")
    if backfill not in BACKFILLS:
        raise InvalidProfile(f"ordering.backfill: {backfill!r} is unknown; use {', '.join(BACKFILLS)}")
    found["backfill"] = backfill
    if "backfill_depth" in table:
        found["backfill_depth"] = max(1, _value("ordering.backfill_depth", table.pop("backfill_depth"), "int"))
    found["ordering"] = _policy(table, own_policies)
    return found


def _policy(table: dict[str, Any], own_policies: bool) -> Ordering:
    name = table.pop("policy", None)
    made = ORDERINGS.get(name) if isinstance(name, str) else None
    if made is None and isinstance(name, str) and ":" in name and own_policies:
        made = _own_policy(name)
    if made is None:
        raise InvalidProfile(
            f"ordering.policy: {name!r} is unknown; use {', '.join(ORDERINGS)}, or your own as 'module:Class'"
        )
    known = {_key_of(each.name): each for each in fields(made)}
    values: dict[str, Any] = {}
    for key, raw in table.items():
        field = known.get(key)
        if field is None:
            raise InvalidProfile(f"ordering.{key}: the policy {name!r} has no such key; use {', '.join(known)}")
        values[field.name] = _value(f"ordering.{key}", raw, _kind_of(field.name, field.default))
    return made(**values)


def _own_policy(name: str) -> type[Policy]:
    """Import a policy that is not the engine's."""
    module, _, class_name = name.partition(":")
    try:
        made = getattr(import_module(module), class_name)
    except (ImportError, ValueError, AttributeError) as error:
        raise InvalidProfile(
            f"ordering.policy: {name!r} cannot be imported ({error}); the module must be on PYTHONPATH and hold the class"
        ) from error
    if not isinstance(made, type) or not issubclass(made, Policy):
        raise InvalidProfile(f"ordering.policy: {name!r} is no ordering; derive it from engine.levels.ordering.Policy")
    return made


def _key_of(field: str) -> str:
    return f"{field[:-3]}_s" if field.endswith("_us") else field


def _kind_of(field: str, default: object) -> str:
    if isinstance(default, tuple):
        return "many seconds"
    if field.endswith("_us"):
        return "seconds"
    if default is MISSING:
        return "any"
    return {bool: "bool", int: "int", str: "str"}.get(type(default), "any")


def _quotas(table: object) -> Quotas:
    if not isinstance(table, dict) or not table:
        raise InvalidProfile("[quotas]: use a table per queue, as [quotas.research] and guaranteed_gpus = 8 below it")
    queues = []
    for name, content in table.items():
        if not isinstance(content, dict):
            raise InvalidProfile(f"quotas.{name}: use a table, as [quotas.{name}] and guaranteed_gpus = 8 below it")
        values: dict[str, Any] = {}
        for key, raw in content.items():
            if key not in _QUEUE_FIELDS:
                raise InvalidProfile(f"quotas.{name}.{key}: there is no such key; use {', '.join(_QUEUE_FIELDS)}")
            field, kind = _QUEUE_FIELDS[key]
            values[field] = _value(f"quotas.{name}.{key}", raw, kind)
        queues.append(QueueSpec(name, **values))
    try:
        return Quotas(tuple(queues))
    except ValueError as error:
        raise InvalidProfile(str(error)) from error


def _scorers(raw: object, own_policies: bool) -> tuple[tuple[str, int], ...]:
    if not isinstance(raw, dict):
        raise InvalidProfile("placement.scorers: use a table of names and whole weights, as { best_fit = 1 }")
    for name in raw:
        if ":" in name and own_policies:
            try:
                scorer(name)
            except ValueError as error:
                raise InvalidProfile(str(error)) from error
        elif name not in SCORERS:
            raise InvalidProfile(f"placement.scorers.{name}: there is no such scorer; use {', '.join(SCORERS)}")
    return tuple((name, _value(f"placement.scorers.{name}", weight, "int")) for name, weight in raw.items())


def _value(key: str, raw: object, kind: str) -> Any:
    is_number = isinstance(raw, int | float) and not isinstance(raw, bool)
    match raw:
        case bool() if kind == "bool":
            return raw
        case str() if kind == "str":
            return raw
        case int() if kind == "int" and is_number and raw >= 0:
            return raw
        case int() | float() if kind == "seconds" and is_number and raw >= 0:
            return round(raw * SECOND)
        case int() | float() if kind == "gpus" and is_number and raw >= 0:
            return round(raw * WHOLE_GPU)
        case list() if kind == "texts" and all(isinstance(each, str) for each in raw):
            return tuple(raw)
        case list() if kind == "many seconds":
            return tuple(_value(key, each, "seconds") for each in raw)
        case _ if kind == "any":
            return raw
    wanted = {
        "bool": "true or false",
        "str": "a text",
        "int": "a whole number of at least 0",
        "seconds": "seconds, at least 0",
        "gpus": "a number of GPUs, at least 0",
        "texts": "a list of texts",
        "many seconds": "a list of seconds",
    }[kind]
    raise InvalidProfile(f"{key}: {raw!r} is wrong; use {wanted}")
