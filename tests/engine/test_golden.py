"""Golden scenarios: each file is a story, events on the left margin, what the engine ordered indented below.

``GOLDEN_REWRITE=1 pytest tests/engine/test_golden.py`` writes the orders anew; read the difference before committing it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine import events as ev
from engine import invariants, profiles
from engine.commands import Command, CreatePod, DeletePod, Notify, PrefetchModel, ScaleNodes, StartTask, StopTask
from engine.resources import Demand, GpuSpec, NodeSpec
from engine.scheduler import Engine
from engine.tasks import SECOND, Affinity, Estimate, FailureCause, Quantiles, TaskSpec, TaskType

STORIES = sorted((Path(__file__).parent / "golden").glob("*.txt"))


def event(words: list[str]) -> ev.Event:
    """Read an event: a verb, names, and key=value pairs."""
    verb, *rest = words
    names = [word for word in rest if "=" not in word]
    more = dict(word.split("=", 1) for word in rest if "=" in word)
    number = {key: int(value) for key, value in more.items() if value.lstrip("-").isdigit()}
    match verb:
        case "join":
            gpus = tuple(
                GpuSpec(f"g{i}", more.get("model", "a100"), number.get("memory", 80))
                for i in range(number.get("gpus", 1))
            )
            return ev.NodeJoined(NodeSpec(names[0], gpus, cpu_milli=number.get("cpu", 0)))
        case "report":
            return ev.NodeReported(
                names[0], tuple(GpuSpec(g.rstrip("!"), "a100", 80, not g.endswith("!")) for g in names[1:])
            )
        case "lose":
            return ev.NodeLost(names[0], "silent")
        case "drain":
            return ev.NodeDrainRequested(names[0])
        case "uncordon":
            return ev.NodeUncordoned(names[0])
        case "submit":
            spec = TaskSpec(
                names[0],
                more.get("tenant", "a"),
                more.get("group", ""),
                TaskType(more.get("type", "GC")),
                more.get("method", "sleep"),
                more.get("model", ""),
                priority=number.get("priority", 0),
                demand=Demand(number.get("gpus", 1), number.get("share", 1000), number.get("memory", 0)),
                slots=number.get("slots", 1),
                members=number.get("members", 1),
                affinity=Affinity(more.get("affinity", "preferred")),
                start_deadline=number["deadline_s"] * SECOND if "deadline_s" in number else None,
                run_limit_us=number["limit_s"] * SECOND if "limit_s" in number else None,
                max_attempts=number.get("attempts", 3),
            )
            us = number.get("predicted_s", 0) * SECOND
            return ev.TaskSubmitted(spec, Estimate((("*", Quantiles(us, us, us, us)),)) if us else None)
        case "cancel":
            return ev.TaskCancelRequested(names[0])
        case "revive":
            return ev.TaskRevived(names[0])
        case "pod-started":
            return ev.PodStarted(int(names[0]))
        case "pod-stopped":
            return ev.PodStopped(int(names[0]), FailureCause(more.get("cause", "pod_lost")))
        case "started":
            return ev.TaskStarted(names[0], int(names[1]), number.get("rank", 0))
        case "finished":
            return ev.TaskFinished(names[0], int(names[1]), number.get("rank", 0), more.get("result", "file"))
        case "failed":
            return ev.TaskFailed(names[0], int(names[1]), FailureCause(more["cause"]), number.get("rank", 0))
        case "stopped":
            return ev.TaskStopped(names[0], int(names[1]), number.get("rank", 0), more.get("checkpoint", ""))
    raise ValueError(f"there is no event {verb!r}")


def order(c: Command) -> str:
    """Write an order in one line."""
    match c:
        case CreatePod():
            on = " ".join(f"{g.uuid}:{g.share}" for g in c.grants)
            whom = f" for {c.req_no}#{c.attempt} rank {c.rank}" if c.req_no else ""
            return f"create Pod {c.pod} on {c.node} [{on}] {c.method}/{c.model} slots {c.slots}{whom}"
        case DeletePod():
            return f"delete Pod {c.pod}: {c.reason}"
        case StartTask():
            checkpoint = f" from {c.checkpoint}" if c.checkpoint else ""
            return f"start {c.req_no}#{c.attempt} rank {c.rank} in Pod {c.pod} on {c.node}{checkpoint}"
        case StopTask():
            return f"stop {c.req_no}#{c.attempt} rank {c.rank} in Pod {c.pod}: {c.reason}"
        case PrefetchModel():
            return f"prefetch {c.model} on {c.node}"
        case ScaleNodes():
            return f"scale to {c.nodes} nodes: {c.reason}"
        case Notify():
            until = f" until {c.until / SECOND:g}s" if c.until else ""
            return f"tell {c.req_no} is {c.state} {c.reason} {c.detail} {c.result} {c.node}{until}".replace(
                "  ", " "
            ).rstrip()
    raise AssertionError(c)


def play(story: str) -> str:
    """Play a story and return it with what the engine orders."""
    engine: Engine | None = None
    written: list[str] = []
    now = 0
    for line in story.splitlines():
        if line.startswith("    "):
            continue
        written.append(line.rstrip())
        words = line.split("#")[0].split()
        if not words:
            continue
        if words[0] == "profile":
            engine = Engine(profiles.load(words[1]))
            continue
        assert engine is not None, "a story begins with: profile NAME"
        now = round(float(words[0].removesuffix("s")) * SECOND)
        parts = " ".join(words[1:]).split(" & ")
        commands = engine.step(now, [event(part.split()) for part in parts if part.split()])
        invariants.check(engine.state)
        written += [f"    {' '.join(order(c).split())}" for c in commands]
    return "\n".join(written) + "\n"


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_the_engine_orders_what_the_story_says(path: Path) -> None:
    story = path.read_text(encoding="utf-8")
    played = play(story)
    if os.environ.get("GOLDEN_REWRITE") == "1":
        path.write_text(played, encoding="utf-8")
    assert played == story


def test_there_are_stories() -> None:
    assert len(STORIES) >= 6
