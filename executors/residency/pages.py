"""The host-memory tier of a node: which models' files the kernel's page cache holds, and how to bring them there or let them go.

Pods read weights through memory maps, so a file in the page cache is a model in memory that every Pod of the node shares. The
kernel itself tells what it holds (`mincore`); nothing is guessed from what was read once.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

MOSTLY_PERMILLE: Final = 900
"""A model of which so much is in memory counts as there."""
_PAGE: Final = mmap.PAGESIZE
_PROT_READ: Final = 1
_MAP_SHARED: Final = 1
_FAILED: Final = ctypes.c_void_p(-1).value


def weight_files(directory: Path) -> Iterator[Path]:
    """Yield the weight files below a directory."""
    for path in sorted(directory.rglob("*.safetensors")):
        if path.is_file():
            yield path


def size_bytes(directory: Path) -> int:
    """Return how large a model's weights are."""
    return sum(path.stat().st_size for path in weight_files(directory))


def resident_bytes(path: Path) -> int:
    """Return how much of a file the page cache holds; 0 where the system does not tell."""
    libc = _libc()
    if libc is None:
        return 0
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        size = os.fstat(descriptor).st_size
        if not size:
            return 0
        address = libc.mmap(None, size, _PROT_READ, _MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address == _FAILED:
        return 0
    try:
        pages = -(-size // _PAGE)
        states = (ctypes.c_ubyte * pages)()
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), states) != 0:
            return 0
        # Only the lowest bit of each byte means something.
        held = bytes(states).translate(_LOWEST_BIT).count(1)
        return min(size, held * _PAGE)
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))


def in_memory(directory: Path) -> bool:
    """Tell whether nearly all of a model's weights are in memory."""
    total = held = 0
    for path in weight_files(directory):
        total += path.stat().st_size
        held += resident_bytes(path)
    return total > 0 and held * 1000 >= total * MOSTLY_PERMILLE


def bring(directory: Path) -> None:
    """Have the kernel read a model's weights into memory in the background."""
    for path in weight_files(directory):
        _advise(path, os.POSIX_FADV_WILLNEED)


def let_go(directory: Path) -> None:
    """Have the kernel forget a model's weights, but for what some process has mapped."""
    for path in weight_files(directory):
        _advise(path, os.POSIX_FADV_DONTNEED)


_LOWEST_BIT: Final = bytes(value & 1 for value in range(256))


def _advise(path: Path, advice: int) -> None:
    with path.open("rb") as weights:
        os.posix_fadvise(weights.fileno(), 0, 0, advice)


def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_long,
        ]
        _ = libc.mincore, libc.munmap
    except (OSError, AttributeError):
        return None
    return libc
