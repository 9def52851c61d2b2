"""Which weight files may be loaded at all: safetensors whose every claim about itself is true, and nothing that could run code.

Read without torch, so that whoever fetches a file can refuse it before any Pod sees it. A header is checked in full before a single
tensor is touched: its length against the file's, each tensor's bytes against its type and shape, and that tensors lie side by side
without gaps or overlaps. Pickle (`.bin`, `.pt`, `.ckpt`) is never read, whatever it is named.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from executors.methods.base import ModelMissing

MAX_HEADER_BYTES: Final = 16 << 20
"""Real models have headers of some hundred kilobytes; a header is parsed in memory, so a huge one is an attack."""
MAX_TENSORS: Final = 100_000
MAX_DIMENSIONS: Final = 8
FORBIDDEN_SUFFIXES: Final = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack", ".py", ".so"}
)
"""Formats that can run code when they are read, or that nothing here reads."""
FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
_BITS: Final = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_LENGTH_BYTES: Final = 8
_AT_ONCE: Final = 1 << 22
"""Numbers that are looked at together."""
_Pairs = list[tuple[str, Any]]


class WeightsRefused(ModelMissing):
    """A model's file that is not loaded; says which file, what is wrong with it and what would be right."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as a header describes it; `begin` and `end` count from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """What a safetensors file holds."""

    path: Path
    size_bytes: int
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


def check_name(name: str, where: str = "model") -> None:
    """Refuse a file name that is a path, hides itself, or names a format that can run code; raises WeightsRefused."""
    if not _FILE_NAME.fullmatch(name) or ".." in name:
        raise WeightsRefused(f"{where}: {name[:80]!r} is no plain file name; use letters, digits, '.', '_' and '-'")
    suffix = Path(name).suffix.lower()
    if suffix in FORBIDDEN_SUFFIXES:
        raise WeightsRefused(
            f"{where}: {name!r} is a {suffix} file, which may run code when it is read; save the weights as safetensors"
        )


def inspect(path: Path) -> WeightsFile:
    """Check a safetensors file's header against the file, without reading its weights; raises WeightsRefused."""
    descriptor = _open(path)
    try:
        size = os.fstat(descriptor).st_size
        head = os.read(descriptor, _LENGTH_BYTES)
        if len(head) < _LENGTH_BYTES:
            raise _refused(path, f"it has {size} bytes, too few for a header")
        length = int.from_bytes(head, "little")
        if length > MAX_HEADER_BYTES:
            raise _refused(path, f"its header claims {length} bytes, the limit is {MAX_HEADER_BYTES}")
        if length > size - _LENGTH_BYTES:
            raise _refused(
                path, f"its header claims {length} bytes, the file has {size}: it is cut off or no safetensors"
            )
        text = _read_exactly(descriptor, length, path)
    finally:
        os.close(descriptor)
    header = _parse(path, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refused(path, "its __metadata__ is no set of texts")
    if len(header) > MAX_TENSORS:
        raise _refused(path, f"it claims {len(header)} tensors, the limit is {MAX_TENSORS}")
    start = _LENGTH_BYTES + length
    tensors = sorted((_tensor(path, name, value, start) for name, value in header.items()), key=_place)
    _check_layout(path, tensors, start, size)
    return WeightsFile(path, size, tuple(tensors), metadata)


def check_finite(weights: WeightsFile) -> None:
    """Refuse weights of which any number is NaN or infinite; reads the whole file through a memory map."""
    if weights.size_bytes == 0 or not weights.tensors:
        return
    descriptor = _open(weights.path)
    try:
        mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise _refused(weights.path, f"it cannot be mapped ({error})") from error
    finally:
        os.close(descriptor)
    try:
        if len(mapped) != weights.size_bytes:
            raise _refused(weights.path, "it changed while it was checked")
        for tensor in weights.tensors:
            if tensor.dtype in FLOATS and not all(_finite(tensor.dtype, part) for part in _parts(mapped, tensor)):
                raise _refused(weights.path, f"its tensor {tensor.name!r} holds numbers that are not finite")
    finally:
        mapped.close()


def check_floats(weights: WeightsFile) -> None:
    """Refuse a file that holds anything but floating-point weights, or none at all, as an adapter must not."""
    if not weights.tensors:
        raise _refused(weights.path, "it holds no weights")
    for tensor in weights.tensors:
        if tensor.dtype not in FLOATS:
            raise _refused(
                weights.path, f"its tensor {tensor.name!r} is {tensor.dtype}; weights are floating-point numbers"
            )


def check_directory(folder: Path, *, finite: bool = False, within: Path | None = None) -> tuple[WeightsFile, ...]:
    """Check every weight file below a directory; raises WeightsRefused.

    Links may lead to files inside `within` (the directory itself by default), as model hubs lay their caches out, not elsewhere.
    """
    root = (within or folder).resolve()
    found: list[WeightsFile] = []
    for path in sorted(folder.rglob("*")):
        real = path.resolve()
        if not real.is_relative_to(root):
            raise _refused(path, f"it is a link that leads out of {root}")
        if path.suffix.lower() == ".safetensors":
            weights = inspect(real)
            if finite:
                check_finite(weights)
            found.append(weights)
    return tuple(found)


def _open(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _refused(path, f"it cannot be opened ({error.strerror}; links are not followed)") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _refused(path, "it is no regular file")
    return descriptor


def _read_exactly(descriptor: int, length: int, path: Path) -> bytes:
    parts: list[bytes] = []
    while length:
        part = os.read(descriptor, length)
        if not part:
            raise _refused(path, "it ends within its header")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: _Pairs) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a name appears twice")
        return made

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"its header cannot be read ({error})") from error
    if not isinstance(header, dict):
        raise _refused(path, "its header is no set of tensors")
    return header


def _tensor(path: Path, name: str, value: Any, start: int) -> TensorInfo:
    what = f"its tensor {name[:120]!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _refused(path, f"{what} lacks its dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _refused(path, f"{what} has the unknown dtype {str(dtype)[:40]!r}")
    if not _whole(shape) or len(shape) > MAX_DIMENSIONS:
        raise _refused(path, f"{what} has the shape {str(shape)[:80]}, which is none")
    if not _whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _refused(path, f"{what} has the offsets {str(offsets)[:80]}, which are no stretch")
    size = math.prod(shape) * _BITS[dtype] // 8
    if size != offsets[1] - offsets[0]:
        raise _refused(path, f"{what} takes {offsets[1] - offsets[0]} bytes, its shape and dtype ask for {size}")
    return TensorInfo(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(each) is int and 0 <= each < 1 << 48 for each in values)


def _place(tensor: TensorInfo) -> tuple[int, int]:
    return tensor.begin, tensor.end


def _check_layout(path: Path, tensors: list[TensorInfo], start: int, size: int) -> None:
    at = start
    for tensor in tensors:
        if tensor.end > size:
            raise _refused(path, f"its tensor {tensor.name!r} ends at {tensor.end}, the file at {size}: it is cut off")
        if tensor.begin < at:
            raise _refused(path, f"its tensor {tensor.name!r} overlaps another")
        if tensor.begin > at:
            raise _refused(path, f"{tensor.begin - at} bytes before its tensor {tensor.name!r} belong to nothing")
        at = tensor.end
    if at != size:
        raise _refused(path, f"the last {size - at} bytes belong to no tensor")


def _parts(mapped: mmap.mmap, tensor: TensorInfo) -> Iterator[np.ndarray[Any, Any]]:
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}
    kind = np.dtype(kinds[tensor.dtype])
    step = _AT_ONCE * kind.itemsize
    for begin in range(tensor.begin, tensor.end, step):
        count = (min(tensor.end, begin + step) - begin) // kind.itemsize
        # A copy, so that nothing points into the map when it is closed.
        yield np.frombuffer(mapped[begin : begin + count * kind.itemsize], dtype=kind)


def _finite(dtype: str, numbers: np.ndarray[Any, Any]) -> bool:
    match dtype:
        case "BF16":
            return not bool(np.any((numbers & 0x7F80) == 0x7F80))
        case "F8_E4M3":
            return not bool(np.any((numbers & 0x7F) == 0x7F))
        case "F8_E5M2":
            return not bool(np.any((numbers & 0x7C) == 0x7C))
        case _:
            return bool(np.isfinite(numbers).all())


def _refused(path: Path, reason: str) -> WeightsRefused:
    return WeightsRefused(f"weights {path.name!r}: {reason}; store the model again from its source")
