"""The sleep method: waits, stops, and fails on request."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from executors.methods import registry
from executors.methods.base import Cancelled
from executors.methods.parameters import SleepParameters


def test_sleep_reports_every_step(new_context: Callable[..., Any]) -> None:
    context = new_context()
    result = registry.create("sleep").run(SleepParameters(seconds=0.02, steps=4), context)
    assert [(done, total) for done, total, _ in context.seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert result.metadata["slept_s"] >= 0.02
    assert result.files == ()


def test_sleep_stops_between_two_steps(new_context: Callable[..., Any]) -> None:
    context = new_context(stop_at=2)
    with pytest.raises(Cancelled) as caught:
        registry.create("sleep").run(SleepParameters(seconds=0, steps=5), context)
    assert context.seen[-1][0] == 2
    assert caught.value.checkpoint is None


def test_sleep_stops_within_a_long_step(new_context: Callable[..., Any]) -> None:
    context = new_context(stop_at=0)
    with pytest.raises(Cancelled):
        registry.create("sleep").run(SleepParameters(seconds=3600, steps=1), context)


@pytest.mark.parametrize(("fail", "error"), [("oom", MemoryError), ("error", RuntimeError)])
def test_sleep_fails_after_half_its_steps(new_context: Callable[..., Any], fail: str, error: type[Exception]) -> None:
    context = new_context()
    with pytest.raises(error, match="as asked for"):
        registry.create("sleep").run(SleepParameters.model_validate({"seconds": 0, "steps": 4, "fail": fail}), context)
    assert context.seen[-1][0] == 2


def test_a_crash_kills_the_process() -> None:
    code = (
        "from executors.methods import registry\n"
        "from executors.methods.parameters import SleepParameters\n"
        "class Context:\n"
        "    def should_stop(self): return False\n"
        "    def progress(self, done, total, note=''): pass\n"
        "registry.create('sleep').run(SleepParameters(seconds=0, steps=2, fail='crash'), Context())\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert ended.returncode == -signal.SIGKILL


def test_an_unknown_method_cannot_be_created() -> None:
    with pytest.raises(ValueError, match="'dance' is unknown"):
        registry.create("dance")
