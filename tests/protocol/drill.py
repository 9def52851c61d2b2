"""A whole control plane under one seeded clock: the real engine, both ends of the protocol, and a world that breaks things.

Two phases: faults, with every safety rule checked at every step; then no faults, and everything that was accepted must come to an
end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import simpy
from drill_agent import SimAgent
from drill_plan import FAULTY_US, LIMITS, NODES, QUIET_CAP_US, TASKS, Counts, Dice, Fault, Plan, Violation
from drill_scheduler import SimScheduler

from engine import commands as c
from engine import events as e
from engine import profiles
from engine.journal import Record
from engine.protocol import messages as m
from engine.protocol.agent import Life
from engine.replay import recover
from engine.resources import Demand
from engine.tasks import SECOND, TERMINAL_STATES, Micros, TaskSpec, TaskState, TaskType


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
