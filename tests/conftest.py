"""Measures the engine's branch coverage where the engine is what is tested: tracing makes long simulations twice as slow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

TRACED = frozenset({"engine", "protocol", "worlds"})
"""Directories whose tests judge the engine and both ends of its protocol. Tests marked slow repeat what others have run through."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """Stop the tracer, where there is one, for a test that is not to be traced, its fixtures included."""
    folder = Path(item.path).relative_to(Path(__file__).parent).parts[0]
    about_the_engine = folder in TRACED or item.path.name.startswith("test_engine")
    traced = about_the_engine and item.get_closest_marker("slow") is None
    tracer = None if traced else _running_tracer()
    if tracer is None:
        return (yield)
    tracer.stop()
    try:
        return (yield)
    finally:
        tracer.start()


def _running_tracer():
    try:
        from coverage import Coverage
    except ImportError:
        return None
    return Coverage.current()
