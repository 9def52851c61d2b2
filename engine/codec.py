"""The journal's one codec: events and commands as plain lists and dicts, and as bytes (JSON), under a version.

A dataclass becomes a dict of the fields that differ from their defaults, so that a field added later with a default neither breaks
old records nor grows them. Types are read from the annotations once per class.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from operator import attrgetter
from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

from engine.commands import Command
from engine.events import Event
from engine.resources import Demand

VERSION: Final = 1
MOST_KNOWN: Final = 4_096
"""Demands that are kept to be shared."""

Plain = Any
"""None, bool, int, float, str, list or dict of these."""


class CodecError(ValueError):
    """Bytes that are no record of this version; says where and what would be right."""


TYPES: Final[dict[str, type]] = {each.__name__: each for each in (*get_args(Event), *get_args(Command))}


def encode(item: Event | Command) -> bytes:
    """Encode one event or command."""
    return dumps([VERSION, *tagged(item)])


def decode(data: bytes) -> Event | Command:
    """Decode one event or command; raises CodecError."""
    plain = loads(data)
    if not isinstance(plain, list) or not plain:
        raise CodecError("the record is no list of version, type and fields")
    check_version(plain[0])
    return untagged(plain[1:])


def check_version(version: object) -> None:
    """Refuse what another version wrote."""
    if version != VERSION:
        raise CodecError(
            f"version {version!r} is unknown, this build reads version {VERSION}; use the build that wrote it"
        )


def dumps(plain: Plain) -> bytes:
    """Write plain data as compact JSON."""
    return json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode()


def loads(data: bytes) -> Plain:
    """Read JSON; raises CodecError."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CodecError(f"the record is no JSON: {error}") from error


def tagged(item: Event | Command) -> list[Plain]:
    """Return [type name, fields]."""
    return [type(item).__name__, to_plain(item)]


def untagged(plain: list[Plain]) -> Event | Command:
    """Return the event or command behind [type name, fields]."""
    if not isinstance(plain, list) or len(plain) != 2:
        raise CodecError("an item is no list of type and fields")
    name, body = plain
    found = TYPES.get(name) if isinstance(name, str) else None
    if found is None:
        raise CodecError(f"{name!r} is no event or command of version {VERSION}")
    made: Event | Command = from_plain(found, body)
    return made


def to_plain(value: Any) -> Plain:
    """Return a dataclass, tuple, enum or scalar as plain data."""
    kind = type(value)
    if kind in _AS_IT_IS:
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool | int | float):
        return value
    if kind is tuple or isinstance(value, tuple):
        return [each if type(each) in _AS_IT_IS else to_plain(each) for each in value]
    names, defaults, get = _WRITERS.get(kind) or _writers(kind)
    plain = {}
    for name, default, field in zip(names, defaults, get(value), strict=True):
        if field is not default and (default is MISSING or field != default):
            plain[name] = field if type(field) in _AS_IT_IS else to_plain(field)
    return plain


_AS_IT_IS = frozenset((NoneType, bool, int, float, str))
_Writer = tuple[tuple[str, ...], tuple[Any, ...], Callable[[Any], tuple[Any, ...]]]
"""Names, defaults, and what gets all values of a dataclass at once."""
_WRITERS: dict[type, _Writer] = {}


def _writers(kind: type) -> _Writer:
    found = _WRITERS.get(kind)
    if found is None:
        if not is_dataclass(kind):
            raise CodecError(f"{kind.__name__} cannot be written; use dataclasses, tuples, texts and numbers")
        names = tuple(f.name for f in fields(kind))
        get = attrgetter(*names) if len(names) > 1 else lambda value: tuple(getattr(value, name) for name in names)
        found = _WRITERS[kind] = (names, tuple(_default(f) for f in fields(kind)), get)
    return found


def _default(field: Any) -> Any:
    if field.default is not MISSING:
        return field.default
    if field.default_factory is not MISSING:
        return field.default_factory()
    return MISSING


Reader = Callable[[Plain, str], Any]
_READERS: dict[Any, Reader] = {}


def from_plain(kind: Any, plain: Plain, where: str = "") -> Any:
    """Return the value of a type from plain data; raises CodecError with the place of what is wrong."""
    reader = _READERS.get(kind)
    if reader is None:
        reader = _READERS[kind] = _reader(kind)
    return reader(plain, where or getattr(kind, "__name__", str(kind)))


def _reader(kind: Any) -> Reader:
    origin = get_origin(kind)
    if origin is tuple:
        return _tuple_reader(get_args(kind))
    if origin in (Union, UnionType):
        return _union_reader(get_args(kind))
    if is_dataclass(kind):
        return _dataclass_reader(kind)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return _enum_reader(kind)
    return _scalar_reader(kind)


def _scalar_reader(kind: Any) -> Reader:
    def read(plain: Plain, where: str) -> Any:
        if kind is float and type(plain) is int:
            return float(plain)
        if type(plain) is not kind:
            raise CodecError(f"{where}: {plain!r} is no {kind.__name__}")
        return plain

    return read


def _enum_reader(kind: type[StrEnum]) -> Reader:
    members = {str(each): each for each in kind}

    def read(plain: Plain, where: str) -> Any:
        found = members.get(plain) if type(plain) is str else None
        if found is None:
            raise CodecError(f"{where}: {plain!r} is none of {', '.join(kind)}")
        return found

    return read


def _tuple_reader(kinds: tuple[Any, ...]) -> Reader:
    many = len(kinds) == 2 and kinds[1] is Ellipsis
    ready = [_ready_types(each) for each in kinds]

    def read(plain: Plain, where: str) -> Any:
        if not isinstance(plain, list):
            raise CodecError(f"{where}: {plain!r} is no list")
        inside = f"{where}[]"
        if many:
            each_kind = kinds[0]
            return tuple([from_plain(each_kind, each, inside) for each in plain])
        if len(plain) != len(kinds):
            raise CodecError(f"{where}: {len(plain)} entries instead of {len(kinds)}")
        return tuple(
            [
                value if type(value) in types else from_plain(each, value, inside)
                for each, types, value in zip(kinds, ready, plain, strict=True)
            ]
        )

    return read


def _union_reader(kinds: tuple[Any, ...]) -> Reader:
    scalars = {each for each in kinds if each in (str, int, float, bool)}
    others = [each for each in kinds if each not in scalars and each is not NoneType]

    def read(plain: Plain, where: str) -> Any:
        if plain is None and NoneType in kinds:
            return None
        if type(plain) in scalars:
            return plain
        if len(others) == 1:
            return from_plain(others[0], plain, where)
        raise CodecError(f"{where}: {plain!r} fits none of the types allowed there")

    return read


def _dataclass_reader(kind: Any) -> Reader:
    hints = get_type_hints(kind)
    required = {f.name for f in fields(kind) if _default(f) is MISSING}
    ready: dict[str, tuple[type, ...]] = {name: _ready_types(hint) for name, hint in hints.items()}
    known: dict[str, Any] = {}
    shared = kind is Demand

    def read(plain: Plain, where: str) -> Any:
        if not isinstance(plain, dict):
            raise CodecError(f"{where}: {plain!r} is no set of fields")
        if shared:  # thousands of tasks ask for the same: one value serves them all
            key = repr(plain)
            if key not in known:
                if len(known) >= MOST_KNOWN:
                    known.clear()
                known[key] = read_anew(plain, where)
            return known[key]
        return read_anew(plain, where)

    def read_anew(plain: dict[str, Plain], where: str) -> Any:
        values = {}
        for name, value in plain.items():
            if name not in hints:
                raise CodecError(f"{where}.{name}: there is no such field in version {VERSION}")
            if type(value) in ready[name]:
                values[name] = value
            else:
                values[name] = from_plain(hints[name], value, f"{where}.{name}")
        lacking = required - values.keys()
        if lacking:
            raise CodecError(f"{where}: the field {min(lacking)} is missing")
        return kind(**values)

    return read


def _ready_types(hint: Any) -> tuple[type, ...]:
    """Return the types whose plain values are a field's values as they are: most fields, so they are spared a reader's call."""
    hints = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(each for each in hints if each in (str, int, float, bool, NoneType))
