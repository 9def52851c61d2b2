"""An adversarial world drives the engine: reports are lost, late and doubled, nodes go and come back, customers change their minds.

After every step the invariants hold and the state recovered from a snapshot and the journal equals the live one; in the end the
world calms down, and every accepted task must become terminal.
"""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine import events as ev
from engine import invariants, profiles
from engine.commands import CreatePod, DeletePod, Notify, StartTask, StopTask
from engine.fit import possible
from engine.journal import MemoryJournal
from engine.limits import Limits
from engine.replay import recover, replay
from engine.resources import Demand, GpuSpec, NodeSpec, ResidentModel, Tier
from engine.scheduler import Engine
from engine.tasks import (
    SECOND,
    TERMINAL_STATES,
    Affinity,
    Estimate,
    FailureCause,
    PodState,
    Quantiles,
    TaskSpec,
    TaskState,
    TaskType,
)

LIMITS = Limits(remembered=40, groups=3, idle_ttl_us=20 * SECOND, pending=40, claims=4, preemptions_per_task=2)
NODES = tuple(
    NodeSpec(
        f"n{i}",
        tuple(GpuSpec(f"n{i}-g{j}", "a" if i % 2 else "b", 16) for j in range(1 + i % 3)),
        cpu_milli=4000,
        memory_bytes=100,
        extra=(("license", 1),) if i == 0 else (),
    )
    for i in range(4)
)
DEMANDS = (
    Demand(),
    Demand(gpus=2),
    Demand(gpu_share=500, gpu_memory_bytes=8),
    Demand(gpu_share=300, gpu_memory_bytes=4, cpu_milli=1500),
    Demand(gpus=0, cpu_milli=2000),
    Demand(gpu_models=("a",), memory_bytes=60),
    Demand(gpus=1, extra=(("license", 1),)),
    Demand(gpu_share=500, gpu_memory_bytes=200),
)
PICK = st.integers(0, 1 << 16)
QUEUES = """
[quotas.q0]
guaranteed_gpus = 2
limit_gpus = 4
tenants = ["tenant0"]
[quotas.rest]
guaranteed_gpus = 3
[quotas.q1]
guaranteed_gpus = 1
weight = 2
parent = "rest"
tenants = ["tenant1"]
[quotas.q2]
parent = "rest"
tenants = ["*"]
[preemption]
min_run_s = 1
"""
IN_ORDER = (
    "easy",
    "conservative",
    "themis",
    '[ordering]\npolicy = "fifo"\n' + QUEUES,
    '[ordering]\npolicy = "sjf"\nbackfill = "easy"\n[binding]\nwarm_reuse = false\n' + QUEUES,
    '[ordering]\npolicy = "fair"\nage_s = 20\nbackfill = "conservative"\n[preemption]\nenabled = true\npatience_s = 1\n',
    '[ordering]\npolicy = "gittins"\npreemptive = true\nfair_tenants = true\n[preemption]\nreload_s = 0\nmin_run_s = 0\n',
    '[ordering]\npolicy = "las"\nqueues_gpu_s = [1, 3, 10]\nbackfill = "none"\n[preemption]\nmin_run_s = 0\n',
    '[ordering]\npolicy = "priority"\npreemptive = true\nage_s = 30\nbackfill = "easy"\n[preemption]\nmin_run_s = 0\n',
    '[ordering]\npolicy = "drf"\nbackfill = "easy"\n[binding]\nreclaim_idle = false\n',
    '[ordering]\npolicy = "srtf"\n[binding]\nwarm_reuse = false\n[preemption]\nreload_s = 0\nmin_run_s = 0\n',
)
"""Policies under which who may start depends on who comes before, and on what others hold."""


def is_together(spec: TaskSpec) -> bool:
    return spec.members > 1 and bool(spec.group) and spec.affinity in (Affinity.STRICT, Affinity.EXCLUSIVE)


class AdversarialWorld(RuleBasedStateMachine):
    """Keeps what it was ordered, and answers when and how it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1
        self.submitted = 0
        self.outbox: list[ev.Event] = []
        self.said: list[ev.Event] = []
        self.pods: dict[int, CreatePod] = {}
        self.started: dict[tuple[str, int, int], StartTask] = {}
        self.stopping: dict[tuple[str, int, int], StopTask] = {}
        self.up: dict[str, NodeSpec] = {}
        self.results: dict[str, int] = {}
        self.over: dict[str, TaskState] = {}
        self.acknowledged: set[str] = set()

    @initialize(profile=st.sampled_from(profiles.NAMES), nodes=st.integers(1, 4))
    def begin(self, profile: str, nodes: int) -> None:
        self.begin_with(profile, nodes)

    def begin_with(self, profile: str, nodes: int) -> None:
        self.profile = profiles.load(profile)
        self.engine = Engine(self.profile, LIMITS)
        self.journal = MemoryJournal()
        self.base = self.engine.snapshot()
        self.mark = 0
        for spec in NODES[:nodes]:
            self.up[spec.name] = spec
            self.outbox.append(ev.NodeJoined(spec))
        self.step(0)

    # --- customers and operators

    @rule(pick=PICK, count=st.integers(1, 4))
    def submit(self, pick: int, count: int) -> None:
        for i in range(count):
            n = pick + i * 7
            self.submitted += 1
            affinity = (Affinity.PREFERRED, Affinity.STRICT, Affinity.EXCLUSIVE, Affinity.NONE)[n // 3 % 4]
            demand = DEMANDS[n // 5 % len(DEMANDS)]
            estimate = None
            if n % 4 == 1:
                us = (1 + n % 9) * SECOND
                estimate = Estimate((("*", Quantiles(us, us, us, us)),), gpu_memory_bytes=n % 20)
            spec = TaskSpec(
                f"t{self.submitted}",
                f"tenant{n % 3}",
                ("", "g1", "g2", "g3", "g4")[n % 5],
                TaskType.GC,
                "sleep",
                ("", "m1", "m2")[n // 2 % 3],
                priority=(0, 0, 100, 150, 5)[n // 11 % 5],
                demand=demand,
                slots=1 + n // 13 % 3,
                members=(1, 1, 1, 1, 2, 3)[n // 17 % 6],
                affinity=affinity,
                start_deadline=self.now + 30 * SECOND if n % 7 == 0 else None,
                run_limit_us=15 * SECOND if n % 6 == 0 else None,
                max_attempts=1 + n % 4,
                declared_us=(n % 50) * SECOND // 10 or None,
                preemptible=n % 10 != 0,
                urgent_slots=n // 19 % 3,
            )
            self.outbox.append(ev.TaskSubmitted(spec, estimate))

    @precondition(lambda self: self.submitted)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        self.outbox.append(ev.TaskCancelRequested(f"t{1 + pick % self.submitted}"))

    @precondition(lambda self: self.submitted)
    @rule(pick=PICK)
    def revive(self, pick: int) -> None:
        dead = [t.req_no for t in self.engine.state.tasks.values() if t.state is TaskState.DEAD]
        if dead:
            req_no = dead[pick % len(dead)]
            self.over.pop(req_no, None)
            self.outbox.append(ev.TaskRevived(req_no))

    @precondition(lambda self: self.submitted)
    @rule(pick=PICK)
    def estimate(self, pick: int) -> None:
        us = (1 + pick % 100) * SECOND // 10
        estimate = Estimate((("*", Quantiles(us, us, us, us)),), gpu_memory_bytes=pick % 24)
        self.outbox.append(ev.TaskEstimated(f"t{1 + pick % self.submitted}", estimate))

    @rule(pick=PICK)
    def configure_tenant(self, pick: int) -> None:
        self.outbox.append(ev.TenantConfigured(f"tenant{pick % 3}", 1 + pick % 4, pick // 4 % 9, pick // 16 % 3))

    @rule(pick=PICK)
    def deploy(self, pick: int) -> None:
        if pick % 3:
            self.outbox.append(
                ev.ModelDeployed(f"m{pick % 2 + 1}", "sleep", DEMANDS[pick // 7 % 4], 1 + pick % 2, pick % 3)
            )
        else:
            self.outbox.append(ev.ModelUndeployed(f"m{pick % 2 + 1}", "sleep"))

    @rule(pick=PICK)
    def drain(self, pick: int) -> None:
        spec = NODES[pick % 4]
        gpu = spec.gpus[pick // 4 % len(spec.gpus)].uuid if pick // 16 % 2 else None
        kind = ev.NodeDrainRequested if pick // 32 % 2 else ev.NodeUncordoned
        self.outbox.append(kind(spec.name, gpu))

    # --- nodes

    @rule(pick=PICK)
    def lose_node(self, pick: int) -> None:
        spec = NODES[pick % 4]
        if self.up.pop(spec.name, None) is not None:
            self.forget_pods(spec.name)
        self.outbox.append(ev.NodeLost(spec.name))

    @rule(pick=PICK)
    def join_node(self, pick: int) -> None:
        spec = NODES[pick % 4]
        kept = []
        if spec.name in self.up and pick // 4 % 2:
            kept = [n for n, pod in self.pods.items() if pod.node == spec.name]
        else:
            self.forget_pods(spec.name)
        self.up[spec.name] = spec
        self.outbox.append(ev.NodeJoined(spec, (*kept, 9999) if pick // 8 % 5 == 0 else tuple(kept)))

    @rule(pick=PICK)
    def report_gpus(self, pick: int) -> None:
        spec = NODES[pick % 4]
        gpus = [
            GpuSpec(g.uuid, g.model, g.memory_bytes, healthy=bool(pick >> (8 + i) & 1))
            for i, g in enumerate(spec.gpus)
            if pick >> (4 + i) & 1
        ]
        if pick % 11 == 0:
            gpus.append(GpuSpec(f"{spec.name}-new", "a", 32))
        self.outbox.append(ev.NodeReported(spec.name, tuple(gpus)))

    @rule(pick=PICK)
    def report_models(self, pick: int) -> None:
        spec = NODES[pick % 4]
        held = tuple(
            ResidentModel(name, Tier.MEMORY if pick >> (2 * i) & 1 else Tier.DISK, i, bool(pick >> (2 * i + 1) & 1))
            for i, name in enumerate(("m", "x", "ad", "odd"))
            if pick >> (8 + i) & 1
        )
        self.outbox.append(ev.NodeReported(spec.name, spec.gpus, resident=held))
        if pick % 5 == 0:
            self.outbox.append(ev.ModelUnloadRequested(spec.name, ("m", "x")[pick // 5 % 2]))

    def forget_pods(self, node: str) -> None:
        gone = {n for n, pod in self.pods.items() if pod.node == node}
        for n in gone:
            del self.pods[n]
        self.started = {k: s for k, s in self.started.items() if s.pod not in gone}
        self.stopping = {k: s for k, s in self.stopping.items() if s.pod not in gone}

    # --- Pods and attempts

    @precondition(lambda self: self.pods)
    @rule(pick=PICK)
    def pod_starts(self, pick: int) -> None:
        self.outbox.append(ev.PodStarted(sorted(self.pods)[pick % len(self.pods)]))

    @precondition(lambda self: self.pods)
    @rule(pick=PICK, cause=st.sampled_from((FailureCause.POD_LOST, FailureCause.OUT_OF_MEMORY, FailureCause.CRASHED)))
    def pod_stops(self, pick: int, cause: FailureCause) -> None:
        number = sorted(self.pods)[pick % len(self.pods)]
        self.stop_pod(number, cause)

    def stop_pod(self, number: int, cause: FailureCause) -> None:
        del self.pods[number]
        self.started = {k: s for k, s in self.started.items() if s.pod != number}
        self.stopping = {k: s for k, s in self.stopping.items() if s.pod != number}
        self.outbox.append(ev.PodStopped(number, cause))

    @precondition(lambda self: self.started)
    @rule(pick=PICK, what=st.integers(0, 9))
    def attempt_reports(self, pick: int, what: int) -> None:
        key = sorted(self.started)[pick % len(self.started)]
        req_no, attempt, rank = key
        if what < 4:
            self.outbox.append(ev.TaskStarted(req_no, attempt, rank))
        elif what == 4:
            self.outbox.append(ev.TaskProgressed(req_no, attempt, pick % 7, 7, rank))
        elif what < 8:
            del self.started[key]
            self.outbox.append(ev.TaskFinished(req_no, attempt, rank, f"r{req_no}", pick % 3 * SECOND))
        else:
            del self.started[key]
            cause = list(FailureCause)[pick % len(FailureCause)]
            self.outbox.append(ev.TaskFailed(req_no, attempt, cause, rank, "broken", pick % 30))

    @precondition(lambda self: self.stopping)
    @rule(pick=PICK)
    def attempt_stops(self, pick: int) -> None:
        self.stop_attempt(sorted(self.stopping)[pick % len(self.stopping)], "c" if pick % 2 else "")

    def stop_attempt(self, key: tuple[str, int, int], checkpoint: str = "") -> None:
        del self.stopping[key]
        if self.started.pop(key, None) is not None:
            self.outbox.append(ev.TaskStopped(*key[:2], key[2], checkpoint))

    # --- the wire

    @precondition(lambda self: self.said)
    @rule(pick=PICK)
    def repeat(self, pick: int) -> None:
        self.outbox.append(self.said[pick % len(self.said)])

    @rule(wait=st.sampled_from((0, 1, SECOND, 3 * SECOND, 30 * SECOND)))
    def step(self, wait: int) -> None:
        self.now += wait
        events, self.outbox = self.outbox, []
        # A restart or loss of a node is never doubled on the wire: the lease protocol orders them.
        ordered = (ev.NodeJoined, ev.NodeLost, ev.TaskRevived, ev.PodStopped)
        self.said = [*self.said, *(e for e in events if not isinstance(e, ordered))][-50:]
        commands = self.engine.step(self.now, events)
        self.journal(self.now, events, commands)
        for command in commands:
            self.perform(command)

    def perform(self, command: object) -> None:
        match command:
            case CreatePod():
                assert command.pod not in self.pods
                assert command.node in self.up, "a Pod was ordered on a node that is not there"
                self.pods[command.pod] = command
            case DeletePod():
                assert command.reason
            case StartTask():
                assert command.req_no not in self.over
                if command.pod in self.pods:
                    assert not any(
                        s.req_no == command.req_no and s.attempt != command.attempt for s in self.started.values()
                    ), "the same task runs twice"
                    self.started[command.req_no, command.attempt, command.rank] = command
            case StopTask():
                self.stopping[command.req_no, command.attempt, command.rank] = command
            case Notify():
                self.told(command)
            case _:
                pass

    def told(self, notify: Notify) -> None:
        if notify.state is TaskState.PENDING and notify.req_no in self.over:
            return  # a request with a forgotten identity came in again
        if notify.state in TERMINAL_STATES:
            assert notify.req_no not in self.over or not self.remembered()
            self.over[notify.req_no] = notify.state

    def remembered(self) -> bool:
        return sum(self.engine.state.outcomes.values()) <= LIMITS.remembered

    # --- what must hold

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "engine"):
            return
        invariants.check(self.engine.state)
        for task in list(self.engine.state.tasks.values())[-3:]:
            reasons = self.engine.why(task.req_no)
            assert bool(reasons) == (task.state not in TERMINAL_STATES and task.state is not TaskState.RUNNING)

    @precondition(lambda self: hasattr(self, "engine"))
    @rule()
    def recover_and_go_on(self) -> None:
        """Go on with the recovered engine: it must decide as the live one would have."""
        live = self.engine.state.digest()
        recovered = recover(self.base, self.journal.records[self.mark :], self.profile)
        assert recovered.state.digest() == live
        self.engine = recovered
        self.base, self.mark = recovered.snapshot(), len(self.journal.records)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.quiesce()
        assert recover(None, self.journal.records, self.profile, LIMITS).state.digest() == self.engine.state.digest()
        report = replay(self.journal.records, self.profile, limits=LIMITS)
        assert report.same, str(report.difference)

    def quiesce(self) -> None:
        """Answer everything truly and at once, with every node up and no limits: all accepted tasks must end."""
        for spec in NODES:
            self.outbox.append(ev.NodeUncordoned(spec.name))
            self.outbox += [ev.NodeUncordoned(spec.name, g.uuid) for g in spec.gpus]
            self.forget_pods(spec.name)
            self.up[spec.name] = spec
            self.outbox.append(ev.NodeJoined(spec))
        self.outbox += [ev.TenantConfigured(f"tenant{i}") for i in range(3)]
        self.outbox += [ev.ModelUndeployed(f"m{i}", "sleep") for i in (1, 2)]
        for turn in range(400):
            self.step(5 * SECOND)
            if turn == 200:  # what became impossible when hardware was taken out is given up by its customers
                cluster = self.engine.state.cluster
                live = [t.spec for t in self.engine.state.live_tasks()]
                given_up = [s for s in live if not possible(cluster, s.demand, s.members, is_together(s))]
                self.outbox += [ev.TaskCancelRequested(s.req_no) for s in given_up]
            invariants.check(self.engine.state)
            state = self.engine.state
            for number, pod in list(state.pods.items()):
                if pod.state is PodState.CREATING:
                    self.outbox.append(ev.PodStarted(number))
                elif pod.state is PodState.STOPPING:
                    if number in self.pods:
                        self.stop_pod(number, FailureCause.POD_LOST)
                    else:
                        self.outbox.append(ev.PodStopped(number))
            for key in list(self.stopping):
                self.stop_attempt(key)
            for key in list(self.started):
                del self.started[key]
                self.outbox += [ev.TaskStarted(*key), ev.TaskFinished(*key, f"r{key[0]}")]
            if not self.outbox and not state.live_tasks():
                return
        waiting = [(t.req_no, str(t.state), self.engine.why(t.req_no)) for t in self.engine.state.live_tasks()]
        raise AssertionError(f"not over: {waiting}")


class OrderedWorld(AdversarialWorld):
    """The same, for profiles that place in exact order: reservations, queues, preemption by policy."""

    @initialize(profile=st.sampled_from(IN_ORDER), nodes=st.integers(1, 4))
    def begin(self, profile: str, nodes: int) -> None:
        self.begin_with(profile, nodes)


AdversarialWorld.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    report_multiple_bugs=False,
)
test_an_adversarial_world_never_breaks_the_engine = AdversarialWorld.TestCase
OrderedWorld.TestCase.settings = AdversarialWorld.TestCase.settings
test_placing_in_exact_order_never_breaks_either = OrderedWorld.TestCase
