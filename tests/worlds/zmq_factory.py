"""Builds the real world for the contract suite: sockets, CURVE, agents as processes of their own, `sleep` tasks in real Pods."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine import commands as c
from engine import profiles
from engine.events import Event, NodeJoined, NodeLost, TaskSubmitted
from engine.limits import Limits
from engine.ports import Journal, NoForecast, drive, no_journal
from engine.scheduler import Engine
from engine.tasks import SECOND, TaskSpec, TaskState
from executors import curve
from executors.zmq_world import ZmqWorld

LEASE_US = 2 * SECOND
MARGIN_US = SECOND
HEARTBEAT_US = SECOND // 5


class FeaturePayloads:
    """A `sleep` task's parameters are its features; `fail` holds for the first `fail_attempts` attempts."""

    def __init__(self) -> None:
        self.tasks: dict[str, TaskSpec] = {}

    def pod(self, command: c.CreatePod) -> dict[str, object]:
        return {}

    def task(self, command: c.StartTask) -> dict[str, object]:
        features: dict[str, object] = dict(self.tasks[command.req_no].features)
        if command.attempt > int(str(features.pop("fail_attempts", 1))):
            features.pop("fail", None)
        return features

    def prefetch(self, command: c.PrefetchModel) -> dict[str, object]:
        return {"id": command.model}


class AgentProcess:
    """One agent in its own process group.

    `kind` is ``pods`` (real Pod processes), ``file`` (the same, on the GPUs of `set_gpus`) or ``fake`` (Pods in memory).
    """

    def __init__(self, home: Path, endpoint: str, scheduler_public: str, name: str, gpus: int, kind: str) -> None:
        self.name = name
        self._arguments = [home, endpoint, scheduler_public, name, str(gpus), kind]
        self._log = (home / f"{name}.log").open("ab")
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        main = Path(__file__).with_name("agent_main.py")
        environment = {**os.environ, "PYTHONPATH": str(main.parents[2]), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(main), *map(str, self._arguments)],
            env=environment,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def tell(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def close(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.kill()
            self.process = None
        self._log.close()


@dataclass
class ZmqRig:
    """An engine that drives real agents, and what it said so far. The face is that of `sim_factory.SimRig`."""

    engine: Engine
    world: ZmqWorld
    payloads: FeaturePayloads
    agents: dict[str, AgentProcess]
    home: tempfile.TemporaryDirectory[str]
    notices: list[c.Notify] = field(default_factory=list)
    commands: list[c.Command] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    journal: Journal = no_journal
    real_time: bool = True

    def __post_init__(self) -> None:
        self._turns = drive(self.engine, self.world, self._record, NoForecast())
        self._restart: list[tuple[float, AgentProcess]] = []

    def post(self, event: Event) -> None:
        """Let an event from outside happen now."""
        if isinstance(event, TaskSubmitted):
            self.payloads.tasks[event.task.req_no] = event.task
        self.world.post(event)

    def submit(self, req_no: str, seconds: float = 1.0, **fields: object) -> TaskSpec:
        """Submit a `sleep` task; further fields are those of `TaskSpec`."""
        from sim_factory import sleep_task

        spec = sleep_task(req_no, seconds, **fields)
        self.post(TaskSubmitted(spec))
        return spec

    def pump(self, until: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Drive until a condition holds; AssertionError after that much time."""
        end = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < end, f"nothing came of it within {timeout_s} s\n{self._logs()}"
            wakeup = next(self._turns)
            if until():
                break
            latest = self.world.now() + SECOND // 10
            self.world.wait(latest if wakeup is None else min(wakeup, latest))
            for due, agent in [entry for entry in self._restart if time.monotonic() >= entry[0]]:
                self._restart.remove((due, agent))
                agent.start()

    def states(self, req_no: str) -> list[TaskState]:
        """Return every state that was told about a task, in order."""
        return [notice.state for notice in self.notices if notice.req_no == req_no]

    def last(self, req_no: str) -> TaskState | None:
        """Return the state that was told last."""
        states = self.states(req_no)
        return states[-1] if states else None

    def nodes(self) -> list[str]:
        """Return the nodes' names."""
        return list(self.agents)

    def lose_node(self, node: str, repair_after_s: float | None = None) -> None:
        """Kill an agent with kill -9, and start it again later if told."""
        self.agents[node].kill()
        if repair_after_s is not None:
            self._restart.append((time.monotonic() + repair_after_s, self.agents[node]))

    def crash_pods(self, node: str) -> None:
        """Have every Pod process of a node killed with kill -9."""
        self.agents[node].tell(signal.SIGUSR1)

    def close(self) -> None:
        """End the agents and the world; nothing stays behind."""
        for agent in self.agents.values():
            agent.close()
        self.world.close()
        self.home.cleanup()

    def _record(self, now: int, events: Sequence[Event], commands: Sequence[c.Command]) -> None:
        self.journal(now, events, commands)
        self.events.extend(events)
        self.commands.extend(commands)
        self.notices.extend(each for each in commands if isinstance(each, c.Notify))

    def _logs(self) -> str:
        logs = sorted(Path(self.home.name).glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)


def set_gpus(root: Path, node: str, uuids: Sequence[str], ill: Sequence[str] = ()) -> None:
    """Say which GPUs a node of the kind ``file`` has from now on."""
    gpus = [{"uuid": u, "model": "a100", "memory_bytes": 1 << 30, "healthy": u not in ill} for u in uuids]
    scratch = root / f"{node}.gpus.new"
    scratch.write_text(json.dumps({"gpus": gpus}))
    scratch.replace(root / f"{node}.gpus.json")


def make_zmq_rig(
    nodes: int = 1,
    gpus: int = 1,
    profile: str = "fifo",
    *,
    kind: str = "pods",
    journal: Journal = no_journal,
    payloads: FeaturePayloads | None = None,
) -> ZmqRig:
    """Build an engine, a world and its agents; returns when every node has joined."""
    home = tempfile.TemporaryDirectory(prefix="world-")
    root = Path(home.name)
    scheduler_keys = curve.load_or_generate(root / "scheduler.key")
    payloads = payloads or FeaturePayloads()
    world = ZmqWorld(
        "tcp://127.0.0.1:*",
        scheduler_keys,
        curve.Authorized(root / "authorized"),
        payloads,
        lease_us=LEASE_US,
        margin_us=MARGIN_US,
        heartbeat_us=HEARTBEAT_US,
    )
    agents: dict[str, AgentProcess] = {}
    limits = Limits(backoff_us=SECOND // 5, backoff_cap_us=SECOND, grace_us=SECOND)
    rig = ZmqRig(Engine(profiles.load(profile), limits), world, payloads, agents, home, journal=journal)
    try:
        for number in range(nodes):
            name = f"node-{number}"
            pair = curve.load_or_generate(root / f"{name}.key")
            curve.authorize(root / "authorized", name, pair.public)
            if kind == "file":
                set_gpus(root, name, [f"{name}-gpu-{index}" for index in range(gpus)])
            agents[name] = AgentProcess(root, world.endpoint, scheduler_keys.public, name, gpus, kind)
        rig.pump(lambda: sum(isinstance(event, NodeJoined) for event in rig.events) >= nodes)
    except BaseException:
        rig.close()
        raise
    return rig


__all__ = ["AgentProcess", "FeaturePayloads", "NodeLost", "ZmqRig", "make_zmq_rig", "set_gpus"]
