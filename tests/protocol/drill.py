"""A whole control plane under one seeded clock: the real engine, both ends of the protocol, and a world that breaks things.

Every random choice is keyed by what it is about - (seed, site, identity) - and never by the order of the choices, so that leaving
a fault out changes nothing else. Two phases: faults, with every safety rule checked at every step; then no faults, and everything
that was accepted must come to an end.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import simpy

from api.sm.loop import outstanding_of
from engine import commands as c
from engine import events as e
from engine import invariants, profiles
from engine.journal import Record
from engine.limits import Limits
from engine.protocol import messages as m
from engine.protocol.agent import AgentMachine, KillPods, Life
from engine.protocol.controller import Controller
from engine.replay import recover
from engine.resources import Demand, GpuSpec, NodeSpec
from engine.scheduler import Engine
from engine.tasks import SECOND, TERMINAL_STATES, FailureCause, Micros, TaskSpec, TaskState, TaskType

NODES = 3
GPUS = 2
TASKS = 18
FAULTY_US = 60 * SECOND
QUIET_CAP_US = 600 * SECOND
LIMITS = Limits(backoff_us=SECOND, backoff_cap_us=8 * SECOND, idle_ttl_us=15 * SECOND, grace_us=2 * SECOND)


class Violation(AssertionError):
    """A rule that must always hold did not."""


class Dice:
    """Random numbers by identity."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def draw(self, *identity: object) -> float:
        """Return a number in [0, 1) that depends on the seed and the identity alone."""
        text = repr((self._seed, identity)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big") / 2**56

    def whole(self, low: int, high: int, *identity: object) -> int:
        """Return a whole number in [low, high]."""
        return low + int(self.draw(*identity) * (high - low + 1))


@dataclass(frozen=True)
class Fault:
    """Something that breaks at a time: ``scheduler`` or ``agent`` crash, ``freeze``, ``deaf`` (nothing reaches the node), ``mute``
    (nothing leaves it), ``cut`` (both), ``pods`` (every Pod of the node crashes)."""

    kind: str
    node: int
    at: Micros
    lasts_us: Micros


@dataclass(frozen=True)
class Plan:
    """Everything that is drawn per seed."""

    seed: int
    loss: float
    doubling: float
    delay_us: int
    window_crash: float
    faults: tuple[Fault, ...]

    @staticmethod
    def of(seed: int) -> Plan:
        """Draw a plan."""
        dice = Dice(seed)
        faults = []
        for number in range(dice.whole(0, 9, "faults")):
            kinds = ("scheduler", "agent", "freeze", "deaf", "mute", "cut", "pods")
            faults.append(
                Fault(
                    kinds[dice.whole(0, len(kinds) - 1, "kind", number)],
                    dice.whole(0, NODES - 1, "node", number),
                    dice.whole(1, FAULTY_US, "at", number),
                    dice.whole(SECOND // 5, 40 * SECOND, "lasts", number),
                )
            )
        return Plan(
            seed,
            loss=(0.0, 0.01, 0.05, 0.25)[dice.whole(0, 3, "loss")],
            doubling=(0.0, 0.02, 0.2)[dice.whole(0, 2, "doubling")],
            delay_us=(1_000, 20_000, 400_000, 3 * SECOND)[dice.whole(0, 3, "delay")],
            window_crash=(0.0, 0.02, 0.1)[dice.whole(0, 2, "window")],
            faults=tuple(sorted(faults, key=lambda f: f.at)),
        )


@dataclass
class Counts:
    """What a run did, to tell a real drill from an idle one."""

    messages: int = 0
    lost: int = 0
    doubled: int = 0
    scheduler_crashes: int = 0
    agent_crashes: int = 0
    nodes_lost: int = 0
    fences: int = 0
    finished: int = 0
    attempts: int = 0
    states: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class Drill:
    """One run of one plan."""

    def __init__(self, plan: Plan, tasks: int = TASKS) -> None:
        self.plan = plan
        self.dice = Dice(plan.seed)
        self.env = simpy.Environment()
        self.counts = Counts()
        self.calm = False
        self.disk: list[Record] = []
        self.epoch = 0
        self.inbox: dict[str, e.Event] = {}
        self.completed: set[m.AttemptKey] = set()
        self.ever_started: set[m.AttemptKey] = set()
        self.terminal: dict[str, TaskState] = {}
        self.accepted: set[str] = set()
        self._sent: dict[tuple[str, str], int] = defaultdict(int)
        self.scheduler: SimScheduler | None = None
        self.agents = [SimAgent(self, index) for index in range(NODES)]
        self.submitted = tasks
        self._lay_out()

    def run(self) -> Counts:
        """Run both phases; raises Violation."""
        self.start_scheduler()
        for agent in self.agents:
            agent.boot_up()
        self.env.run(until=FAULTY_US)
        self.calm = True
        for agent in self.agents:
            agent.mend()
        if self.scheduler is None:
            self.start_scheduler()
        end = FAULTY_US + QUIET_CAP_US
        while not self._all_over():
            if self.env.now >= end:
                raise Violation(f"not over after the faults ended: {self._open_ends()}")
            self.env.run(until=self.env.now + 5 * SECOND)
        self.env.run(until=self.env.now + 60 * SECOND)
        self._check_the_end()
        return self.counts

    # --- the clock --------------------------------------------------------------------------------------------------

    def after(self, delay_us: Micros, call: Callable[[], None]) -> None:
        """Call back later."""
        timeout = self.env.timeout(max(0, int(delay_us)))
        timeout.callbacks.append(lambda _: call())

    # --- workload and faults ------------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        dice = self.dice
        for number in range(self.submitted):
            req_no = f"r{number}"
            self.after(
                dice.whole(0, FAULTY_US * 2 // 3, "submit", req_no),
                lambda r=req_no: self.submit(r),  # type: ignore[misc]
            )
            if dice.draw("cancel?", req_no) < 0.2:
                self.after(
                    dice.whole(0, FAULTY_US, "cancel", req_no),
                    lambda r=req_no: self.enter(f"cancel {r}", e.TaskCancelRequested(r)),  # type: ignore[misc]
                )
        for fault in self.plan.faults:
            self.after(fault.at, lambda f=fault: self._strike(f))  # type: ignore[misc]

    def submit(self, req_no: str) -> None:
        """Submit a task; twice in a while."""
        members = 2 if self.dice.draw("gang?", req_no) < 0.15 else 1
        spec = TaskSpec(
            req_no, "t", "", TaskType.GC, "sleep", demand=Demand(gpus=1), members=members, max_attempts=8,
            priority=100 if self.dice.draw("urgent?", req_no) < 0.2 else 0,
        )  # fmt: skip
        self.enter(f"submit {req_no}", e.TaskSubmitted(spec))
        if self.dice.draw("again?", req_no) < 0.1:
            self.after(3 * SECOND, lambda: self.enter(f"submit {req_no}", e.TaskSubmitted(spec)))

    def enter(self, key: str, event: e.Event) -> None:
        """Put an event into the durable inbox; it stays there until it is in the journal."""
        if key.startswith("cancel") and key.split()[1] not in self.accepted:
            self.after(SECOND, lambda: self.enter(key, event))
            return
        self.inbox[key] = event
        if self.scheduler is not None:
            self.scheduler.ring()

    def _strike(self, fault: Fault) -> None:
        if self.calm:
            return
        agent = self.agents[fault.node]
        match fault.kind:
            case "scheduler":
                self.crash_scheduler(fault.lasts_us)
            case "agent":
                agent.crash(fault.lasts_us)
            case "freeze":
                agent.freeze(fault.lasts_us)
            case "pods":
                agent.host.crash_all()
            case _:
                agent.cut(fault.kind, fault.lasts_us)

    def crash_scheduler(self, down_us: Micros) -> None:
        """Kill the scheduler; what is not in the journal is gone."""
        if self.scheduler is None or self.calm:
            return
        self.counts.scheduler_crashes += 1
        self.scheduler.dead = True
        self.scheduler = None
        self.after(down_us, self.start_scheduler)

    def start_scheduler(self) -> None:
        """Start the scheduler from its disk."""
        if self.scheduler is None:
            self.epoch += 1
            self.scheduler = SimScheduler(self)

    # --- the network --------------------------------------------------------------------------------------------------

    def send(self, source: str, to: str, message: m.Message, deliver: Callable[[], None]) -> None:
        """Carry a message, or lose, double or delay it."""
        self.counts.messages += 1
        kind = type(message).__name__
        self._sent[(source + to, kind)] += 1
        identity = (source, to, kind, self._sent[(source + to, kind)])
        loss, doubling = (0.0, 0.0) if self.calm else (self.plan.loss, self.plan.doubling)
        if self.dice.draw("loss", *identity) < loss:
            self.counts.lost += 1
            return
        copies = 2 if self.dice.draw("double", *identity) < doubling else 1
        self.counts.doubled += copies - 1
        for copy in range(copies):
            most = 2_000 if self.calm else self.plan.delay_us
            self.after(200 + int(self.dice.draw("delay", copy, *identity) ** 4 * most), deliver)

    # --- rules --------------------------------------------------------------------------------------------------------

    def begun(self, agent: SimAgent, key: m.AttemptKey) -> None:
        """Check what must hold when a Pod begins to run an attempt."""
        self.counts.attempts += 1
        if key in self.ever_started:
            raise Violation(f"attempt {key} was run twice")
        self.ever_started.add(key)
        for other in self.agents:
            if other is agent or other.excused():
                continue
            for running in other.host.attempts:
                if running[0] == key[0] and running[1] != key[1]:
                    raise Violation(f"{key} began on {agent.name} while {running} still runs on {other.name}")

    def journaled(self, record: Record) -> None:
        """Check what a durable step says."""
        for event in record.events:
            if isinstance(event, e.TaskSubmitted):
                self.accepted.add(event.task.req_no)
            elif isinstance(event, e.NodeLost):
                self.counts.nodes_lost += 1
        for command in record.commands:
            if not isinstance(command, c.Notify) or command.state not in TERMINAL_STATES:
                continue
            if command.req_no in self.terminal:
                raise Violation(f"{command.req_no} ended twice: {self.terminal[command.req_no]}, then {command.state}")
            self.terminal[command.req_no] = command.state
            self.counts.states[command.state] += 1
            if command.state is TaskState.FINISHED:
                req_no, attempt = command.result.rsplit("/", 1)
                if req_no != command.req_no or (req_no, int(attempt), 0) not in self.completed:
                    raise Violation(f"{command.req_no} finished with {command.result}, which no Pod completed")

    def _all_over(self) -> bool:
        return self.scheduler is not None and len(self.terminal) == self.submitted and not self.inbox

    def _open_ends(self) -> str:
        if self.scheduler is None:
            return "the scheduler is down"
        tasks = [(t.req_no, t.state.value, t.attempt) for t in self.scheduler.engine.state.live_tasks()]
        nodes = [(s.name, s.stage.value) for s in self.scheduler.controller.statuses()]
        return f"tasks {tasks}, nodes {nodes}, agents {[(a.name, a.machine and a.machine.life) for a in self.agents]}"

    def _check_the_end(self) -> None:
        assert self.scheduler is not None
        state = self.scheduler.engine.state
        if recover(None, self.disk, profiles.load("fifo"), LIMITS).state.digest() != state.digest():
            raise Violation("the journal, applied again, gives another state")
        believed = sorted(state.pods)
        real = sorted(pod for agent in self.agents for pod in agent.host.pods)
        if believed != real:
            raise Violation(f"the engine believes in Pods {believed}, there are {real}")
        for agent in self.agents:
            if agent.machine is None or agent.machine.life is not Life.UP:
                raise Violation(f"{agent.name} is not in a session after the faults ended")
            if agent.machine.unacknowledged or agent.spool:
                raise Violation(f"{agent.name} still holds reports that nobody acknowledged")


class SimScheduler:
    """The scheduler's process: recovered from the disk, killed without warning."""

    def __init__(self, drill: Drill) -> None:
        self.drill = drill
        self.dead = False
        self.epoch = drill.epoch
        self.engine: Engine = recover(None, drill.disk, profiles.load("fifo"), LIMITS)
        self.controller = Controller(self.epoch, self, sweep_us=SECOND // 4)
        if drill.disk:
            self.controller.restore(drill.env.now, outstanding_of(self.engine.state))
        self._busy = False
        self._rung = False
        self._sweep_at: Micros | None = None
        self._wakeup: Micros | None = None
        self.ring()

    def pod(self, command: c.CreatePod) -> dict[str, object]:
        return {"id": command.model}

    def task(self, command: c.StartTask) -> dict[str, object]:
        return {}

    def prefetch(self, command: c.PrefetchModel) -> dict[str, object]:
        return {}

    def receive(self, peer: str, message: m.FromNode) -> None:
        """Take a message, as the I/O thread does while the engine may be in the middle of a step."""
        if self.dead:
            return
        self.controller.receive(self.drill.env.now, peer, message)
        self._send()
        if self.controller.has_events():
            self.ring()

    def ring(self) -> None:
        """Ask for a step."""
        if not self._rung and not self.dead:
            self._rung = True
            self.drill.after(100, self._step)

    def _step(self) -> None:
        if self.dead or self._busy:
            return
        self._rung = False
        self._busy = True
        now = self.drill.env.now
        self.controller.durable()
        events = [*self.drill.inbox.values(), *self.controller.take_events()]
        entered = list(self.drill.inbox)
        commands = list(self.engine.step(now, events))
        invariants.check(self.engine.state)
        step = len(self.drill.disk)
        wait = 500 + int(self.drill.dice.draw("fsync", self.epoch, step) ** 3 * 60_000)
        crash = 0.0 if self.drill.calm else self.drill.plan.window_crash
        if self.drill.dice.draw("before", self.epoch, step) < crash / 2:
            self.drill.after(wait // 2, lambda: None if self.dead else self.drill.crash_scheduler(SECOND))
        self.drill.after(wait, lambda: self._durable(now, events, entered, commands))

    def _durable(self, now: Micros, events: list[e.Event], entered: list[str], commands: list[c.Command]) -> None:
        if self.dead:
            return
        drill = self.drill
        if events or commands:
            record = Record(len(drill.disk) + 1, now, tuple(events), tuple(commands))
            drill.disk.append(record)
            drill.journaled(record)
        for key in entered:
            drill.inbox.pop(key, None)
        crash = 0.0 if drill.calm else drill.plan.window_crash
        cut = len(commands)
        if commands and drill.dice.draw("after", self.epoch, len(drill.disk)) < crash:
            cut = drill.dice.whole(0, len(commands), "cut", self.epoch, len(drill.disk))
        for index, command in enumerate(commands):
            if index == cut:
                drill.crash_scheduler(SECOND)
                return
            self.controller.perform(drill.env.now, command)
        self._busy = False
        self._send()
        if self._rung or self.controller.has_events() or drill.inbox:
            self._rung = False
            self.ring()
        wakeup = self.engine.wakeup_at
        if wakeup is not None and wakeup != self._wakeup:
            self._wakeup = wakeup
            drill.after(wakeup - drill.env.now, self._woken)
        self.drill.after(20_000, self._settle)

    def _woken(self) -> None:
        self._wakeup = None
        self.ring()

    def _settle(self) -> None:
        if not self.dead and not self._busy:
            self.controller.durable()
            self._send()

    def _send(self) -> None:
        drill = self.drill
        for peer, message in self.controller.take_outgoing(drill.env.now):
            if isinstance(message, m.Fence):
                drill.counts.fences += 1
            agent = drill.agents[int(peer.split("-")[1])]
            if not agent.deaf:
                drill.send("s", peer, message, lambda a=agent, g=message: a.hear(g))  # type: ignore[misc]
        due = self.controller.next_timeout()
        if due != self._sweep_at and due < 2**61:
            self._sweep_at = due
            drill.after(due - drill.env.now, self._sweep)

    def _sweep(self) -> None:
        if self.dead or self._sweep_at is None or self.drill.env.now < self._sweep_at:
            return
        self.controller.tick(self.drill.env.now)
        self._send()
        if self.controller.has_events():
            self.ring()


class SimHost:
    """Pods and attempts as physical facts, which live on while their agent is frozen."""

    def __init__(self, agent: SimAgent) -> None:
        self.agent = agent
        self.pods: dict[int, m.CreatePod] = {}
        self.attempts: dict[m.AttemptKey, int] = {}
        self.generation = 0

    def create(self, order: m.CreatePod) -> None:
        if order.pod in self.pods:
            raise Violation(f"pod {order.pod} was created twice")
        for gpu in order.gpus:
            for other in self.pods.values():
                if gpu in other.gpus:
                    raise Violation(f"{gpu} of {self.agent.name} is held by Pods {other.pod} and {order.pod} at once")
        self.pods[order.pod] = order
        load = self._whole(SECOND // 10, 3 * SECOND, "load", order.pod)
        self._after(load, lambda: order.pod in self.pods and self.agent.report(m.PodUp(order.pod, load)))

    def start(self, order: m.Dispatch) -> None:
        key = m.attempt_key(order)
        if order.pod not in self.pods:
            raise Violation(f"attempt {key} was started in Pod {order.pod}, which is not there")
        self.agent.drill.begun(self.agent, key)
        self.attempts[key] = order.pod
        self.agent.report(m.Started(*key))
        run = SECOND // 10 + int(self.agent.drill.dice.draw("run", key) ** 3 * 50 * SECOND)
        self._after(run, lambda: self._ended(key))

    def _ended(self, key: m.AttemptKey) -> None:
        pod = self.attempts.get(key)
        if pod is None:
            return
        fate = self.agent.drill.dice.draw("fate", key)
        if fate < 0.05:
            self.gone(pod, FailureCause.CRASHED)
            return
        del self.attempts[key]
        if fate < 0.1:
            self.agent.report(m.Failed(*key, cause="crashed"))
            return
        self.agent.drill.completed.add(key)
        self.agent.report(m.Progress(0, *key, 1, 1))
        self.agent.report(m.Done(*key, f"{key[0]}/{key[1]}", 1))

    def stop(self, order: m.Kill) -> None:
        key = m.attempt_key(order)

        def stopped() -> None:
            if self.attempts.pop(key, None) is not None:
                self.agent.report(m.Stopped(*key))

        self._after(self._whole(1_000, SECOND, "stop", key), stopped)

    def delete(self, pod: int) -> None:
        self._after(self._whole(1_000, SECOND, "delete", pod), lambda: self.gone(pod, FailureCause.POD_LOST))

    def kill_all(self) -> None:
        for pod in list(self.pods):
            self._after(self._whole(1_000, SECOND // 2, "kill", pod), lambda p=pod: self.gone(p, FailureCause.POD_LOST))  # type: ignore[misc]

    def crash_all(self) -> None:
        for pod in list(self.pods):
            self.gone(pod, FailureCause.CRASHED)

    def gone(self, pod: int, cause: FailureCause) -> None:
        if self.pods.pop(pod, None) is None:
            return
        for key in [key for key, owner in self.attempts.items() if owner == pod]:
            del self.attempts[key]
        self.agent.report(m.PodDown(pod, cause.value))

    def die_with_agent(self) -> None:
        self.generation += 1
        self.pods.clear()
        self.attempts.clear()

    def _after(self, delay_us: int, call: Callable[[], object]) -> None:
        generation = self.generation
        self.agent.drill.after(delay_us, lambda: call() if generation == self.generation else None)

    def _whole(self, low: int, high: int, *identity: object) -> int:
        return self.agent.drill.dice.whole(low, high, self.agent.name, *identity)


class SimAgent:
    """An agent's process with its disk: crashes, freezes, and a clock that runs at its own rate."""

    def __init__(self, drill: Drill, index: int) -> None:
        self.drill = drill
        self.name = f"node-{index}"
        self.machine: AgentMachine | None = None
        self.host = SimHost(self)
        self.frozen = False
        self.thawed_at: Micros = -SECOND
        self.deaf = False
        self.mute = False
        self.boot = index * 1000
        self.spool: dict[m.AttemptKey, m.TerminalReport] = {}
        self.spec = NodeSpec(self.name, tuple(GpuSpec(f"g{i}", "x", 1) for i in range(GPUS)))
        self._rate = 1 + (drill.dice.draw("rate", index) - 0.5) / 500
        self._waiting: list[Callable[[], None]] = []
        self._tick_at: Micros | None = None

    def clock(self) -> Micros:
        return int(self.drill.env.now * self._rate) + 7_000_000_000

    def boot_up(self) -> None:
        if self.machine is not None:
            return
        self.boot += 1
        self.machine = AgentMachine(self.spec, self.boot, tuple(self.spool.values()))
        self._tick_at = None
        self.act()

    def crash(self, down_us: Micros) -> None:
        if self.machine is None or self.frozen:
            return
        self.drill.counts.agent_crashes += 1
        self.machine = None
        self.host.die_with_agent()
        self.drill.after(down_us, self.boot_up)

    def freeze(self, lasts_us: Micros) -> None:
        if self.machine is None or self.frozen:
            return
        self.frozen = True
        self.drill.after(lasts_us, self.thaw)

    def excused(self) -> bool:
        """Tell whether it cannot have killed its Pods yet: a frozen process does nothing, and killing takes half a second."""
        return self.frozen or self.drill.env.now < self.thawed_at + SECOND // 2

    def thaw(self) -> None:
        if not self.frozen:
            return
        self.frozen = False
        self.thawed_at = self.drill.env.now
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call()
        self.act()

    def cut(self, kind: str, lasts_us: Micros) -> None:
        self.deaf = self.deaf or kind in ("deaf", "cut")
        self.mute = self.mute or kind in ("mute", "cut")
        self.drill.after(lasts_us, self.heal)

    def heal(self) -> None:
        self.deaf = self.mute = False

    def mend(self) -> None:
        self.heal()
        self.thaw()

    def hear(self, message: m.FromScheduler) -> None:
        self._when_awake(lambda machine: machine.receive(self.clock(), message))

    def report(self, item: m.Report | m.Progress) -> None:
        if isinstance(item, m.Progress):
            self._when_awake(lambda machine: machine.progress(self.clock(), item))
        else:
            self._when_awake(lambda machine: machine.report(self.clock(), item))

    def _when_awake(self, call: Callable[[AgentMachine], None]) -> None:
        if self.frozen:
            boot = self.machine
            self._waiting.append(lambda: call(boot) if boot is not None and boot is self.machine else None)
        elif self.machine is not None:
            call(self.machine)
            self.act()

    def act(self) -> None:
        """Do what the machine wants done, in the order the real loop has."""
        machine = self.machine
        if machine is None or self.frozen:
            return
        machine.tick(self.clock())
        for effect in machine.take_effects():
            match effect:
                case m.CreatePod():
                    self.host.create(effect)
                case m.Dispatch():
                    self.host.start(effect)
                case m.Kill():
                    self.host.stop(effect)
                case m.DeletePod():
                    self.host.delete(effect.pod)
                case KillPods():
                    self.host.kill_all()
                case m.Prefetch():
                    pass
        change = machine.take_spool()
        if change is not None:
            for report in change.keep:
                self.spool[m.attempt_key(report)] = report
            for key in change.forget:
                self.spool.pop(key, None)
        self.boot = max(self.boot, machine.boot)
        for message in machine.take_outgoing(self.clock()):
            if not self.mute:
                self.drill.send(self.name, "s", message, lambda g=message: self._arrive(g))  # type: ignore[misc]
        self._arm(machine)

    def _arrive(self, message: m.FromNode) -> None:
        if self.drill.scheduler is not None:
            self.drill.scheduler.receive(self.name, message)

    def _arm(self, machine: AgentMachine) -> None:
        due = machine.next_timeout()
        if due == self._tick_at or due > 2**61:
            return
        self._tick_at = due
        wait = int((due - self.clock()) / self._rate) + 1

        def ring() -> None:
            if self.machine is machine and self._tick_at == due:
                self._tick_at = None
                self.act()

        self.drill.after(wait, ring)


def run_seed(seed: int) -> Counts:
    """Run one seed; a Violation tells how to run it again."""
    try:
        return Drill(Plan.of(seed)).run()
    except Violation as violation:
        raise Violation(f"{violation}\nrun it again: python tests/protocol/drill.py {seed}") from violation


if __name__ == "__main__":
    import sys

    for given in sys.argv[1:]:
        print(Plan.of(int(given)))
        print(run_seed(int(given)))
