"""A node in the drill: the agent's end of the protocol with its disk and clock, and its Pods as physical facts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from drill_plan import GPUS, Violation

from engine.protocol import messages as m
from engine.protocol.agent import AgentMachine, KillPods
from engine.resources import GpuSpec, NodeSpec
from engine.tasks import SECOND, FailureCause, Micros

if TYPE_CHECKING:
    from drill import Drill


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
