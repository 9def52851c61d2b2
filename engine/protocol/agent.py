"""The node's end of the protocol: turns messages into orders for the Pod host, and what the host reports into messages.

Sans-IO: the caller hands in the time (a clock that also counts while the machine sleeps), messages and reports, then takes what is
to be sent, carried out and spooled. The safety of the whole rests on one duty of this end: **when its lease runs out, it kills its
Pods before anything else** - only then may the scheduler give their work to others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from engine.protocol import messages as m
from engine.protocol.streams import Receiver, Sender
from engine.resources import NodeSpec
from engine.tasks import NEVER, Micros

HELLO_EVERY_US: Micros = 1_000_000
PROGRESS_EVERY_US: Micros = 500_000
ORDERS_AHEAD = 256
SENT_KEPT = 64


class Life(StrEnum):
    """Where the node's end stands."""

    SEEKING = "seeking"
    """Says HELLO until welcomed; Pods run on while the lease holds."""
    UP = "up"
    FENCING = "fencing"
    """Kills its Pods; the next HELLO has a new boot."""
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class KillPods:
    """Kill every Pod's processes at once: their work belongs to others from now on."""

    reason: str


Effect = m.CreatePod | m.DeletePod | m.Dispatch | m.Kill | m.Prefetch | m.Release | KillPods


@dataclass(frozen=True, slots=True)
class SpoolChange:
    """What the disk must hold so that a crash of the agent loses no result: `keep` is appended, `forget` dropped."""

    keep: tuple[m.TerminalReport, ...]
    forget: tuple[m.AttemptKey, ...]


class AgentMachine:
    """One node's end. Times are microseconds of the node's own clock; no clock needs to agree with the scheduler's.

    `boot` must grow with every start of the agent (the caller keeps it on disk); `spooled` are the reports the disk still holds.
    """

    def __init__(
        self, node: NodeSpec, boot: int, spooled: Sequence[m.TerminalReport] = (), *, slots_per_pod_ahead: int = 1
    ) -> None:
        self.node = node
        self.boot = boot
        self.life = Life.SEEKING
        self.leaving = False
        self.pods: dict[int, int] = {}
        """Living Pods and their slots."""
        self.attempts: dict[m.AttemptKey, int] = {}
        """Attempts that have not ended, and their Pods."""
        self.dropped = 0
        """Messages dropped because they belong to another session, epoch or boot."""
        self.refusal = ""
        """Why the scheduler refused the last HELLO, empty when it did not."""
        self.lease_until: Micros = NEVER
        self._ahead = slots_per_pod_ahead
        self._epoch = 0
        self._session = 0
        self._phase = 1
        self._n = 0
        self._sent_at: dict[int, Micros] = {}
        self._lease_us: Micros = 0
        self._heartbeat_us: Micros = HELLO_EVERY_US
        self._next_beat: Micros = 0
        self._reports: Sender[m.Report] = Sender()
        self._carried = 0
        self._orders = Receiver()
        self._credit_due = False
        self._taken: dict[int, int] = {}
        self._idle_since_beat: set[int] = set()
        self._hurried = False
        self._progress_count = 0
        self._progress: dict[m.AttemptKey, tuple[Micros, m.Progress | None]] = {}
        self._checkpoints: dict[m.AttemptKey, str] = {}
        self._out: list[m.FromNode] = []
        self._effects: list[Effect] = []
        self._keep: list[m.TerminalReport] = []
        self._forget: list[m.AttemptKey] = []
        for report in spooled:
            self._reports.push(report)
        self._carried = len(self._reports)

    # --- inputs -----------------------------------------------------------------------------------------------------

    def receive(self, now: Micros, message: m.FromScheduler) -> None:
        """Take a message. The lease is judged first: a message that waited in a frozen process renews nothing."""
        self._judge_lease(now)
        match message:
            case m.Welcome():
                self._welcomed(now, message)
            case m.Fence():
                self._fence_ordered(now, message)
            case m.Rejoin():
                if self.life is Life.UP and message.session == self._session and message.epoch >= self._epoch:
                    self._seek(now)
                else:
                    self.dropped += 1
            case m.Nack():
                self.refusal = f"{message.reason}: {message.detail}"
            case m.HeartbeatAck() | m.Orders() | m.DoneAck():
                if self.life is not Life.UP or message.session != self._session or message.epoch != self._epoch:
                    self.dropped += 1
                    return
                self._in_session(now, message)

    def report(self, now: Micros, item: m.Report) -> None:
        """Take what the Pod host or the DevicePlugin reports; it is sent until the scheduler has it in its journal."""
        self._judge_lease(now)
        match item:
            case m.PodUp():
                if item.pod not in self.pods:
                    return
            case m.PodDown():
                if self.pods.pop(item.pod, None) is None:
                    return
                for key in [key for key, pod in self.attempts.items() if pod == item.pod]:
                    self._flush_progress(key)
                    self._ended(key)
                self._taken.pop(item.pod, None)
            case m.Started():
                if m.attempt_key(item) not in self.attempts:
                    return
            case m.Done() | m.Failed() | m.Stopped():
                key = m.attempt_key(item)
                if key not in self.attempts:
                    return
                self._flush_progress(key)
                self._ended(key)
                self._keep.append(item)
            case m.Devices():
                self.node = replace(self.node, gpus=item.gpus)
            case m.UnknownItem():
                return
        if self.life is not Life.FENCING or isinstance(item, m.Done | m.Failed | m.Stopped):
            self._reports.push(item)
        self._after_pods_changed(now)

    def progress(self, now: Micros, item: m.Progress) -> None:
        """Take an attempt's progress: at most one in half a second is sent, and always the last and each new checkpoint."""
        self._judge_lease(now)
        key = m.attempt_key(item)
        if key not in self.attempts:
            return
        self._progress_count += 1
        due, _ = self._progress.get(key, (0, None))
        if not item.checkpoint:
            item = replace(item, checkpoint=self._checkpoints.get(key, ""))
        elif item.checkpoint != self._checkpoints.get(key):
            self._checkpoints[key] = item.checkpoint
            due = 0
        if now >= due and self.life is Life.UP:
            self._out.append(replace(item, session=self._session))
            self._progress[key] = (now + PROGRESS_EVERY_US, None)
        else:
            self._progress[key] = (due, item)

    def leave(self, now: Micros) -> None:
        """Begin to leave: the scheduler starts nothing new here, and when the last Pod is gone the node says BYE."""
        self._judge_lease(now)
        if self.leaving:
            return
        self.leaving = True
        if self.life is Life.UP:
            self._out.append(m.Drain(self._session))
            self._after_pods_changed(now)
        elif self.life is Life.SEEKING and not self.pods:
            self.life = Life.LEFT
            self.lease_until = NEVER

    def depart(self, now: Micros) -> None:
        """Leave as soon as the last Pod is gone, without waiting for acknowledgements: the spool keeps what is not acknowledged."""
        self.leave(now)
        self._hurried = True
        self._after_pods_changed(now)
        if self.life is Life.SEEKING and not self.pods:
            self.life = Life.LEFT
            self.lease_until = NEVER

    def tick(self, now: Micros) -> None:
        """Do what is due: first the lease, then HELLO or a heartbeat."""
        self._judge_lease(now)
        if self.life in (Life.SEEKING, Life.UP) and now >= self._next_beat:
            self._beat(now)

    # --- outputs ----------------------------------------------------------------------------------------------------

    def take_outgoing(self, now: Micros) -> list[m.FromNode]:
        """Return the messages to send now."""
        if self.life is Life.UP:
            for first, items in self._reports.take(now):
                self._out.append(m.Reports(self._session, first, items, self._orders.applied, self._limit()))
                self._credit_due = False
            if self._credit_due:
                self._out.append(m.Credit(self._session, self._orders.applied, self._limit()))
                self._credit_due = False
        out, self._out = self._out, []
        return out

    def take_effects(self) -> list[Effect]:
        """Return what the Pod host is to do, in this order."""
        effects, self._effects = self._effects, []
        return effects

    def take_spool(self) -> SpoolChange | None:
        """Return what changes on disk, None when nothing does."""
        if not self._keep and not self._forget:
            return None
        change = SpoolChange(tuple(self._keep), tuple(self._forget))
        self._keep, self._forget = [], []
        return change

    def next_timeout(self) -> Micros:
        """Return when `tick` and `take_outgoing` are to be called at the latest."""
        due = min(self.lease_until, self._reports.resend_at if self.life is Life.UP else NEVER)
        if self.life in (Life.SEEKING, Life.UP):
            due = min(due, self._next_beat)
        return due

    @property
    def unacknowledged(self) -> int:
        """Reports the scheduler has not yet in its journal."""
        return len(self._reports)

    # --- lease and session ------------------------------------------------------------------------------------------

    def _judge_lease(self, now: Micros) -> None:
        if now >= self.lease_until:
            self._fence(now, "the lease ran out: the scheduler was not heard for too long")

    def _fence(self, now: Micros, reason: str) -> None:
        """Kill every Pod; when they are gone, seek a session as a new incarnation."""
        self.lease_until = NEVER
        self.life = Life.FENCING
        for effect in self._effects:
            if isinstance(effect, m.CreatePod):
                self.pods.pop(effect.pod, None)
        self._effects = [KillPods(reason)]
        self._out.clear()
        self._after_pods_changed(now)

    def _after_pods_changed(self, now: Micros) -> None:
        if self.pods:
            return
        if self.life is Life.FENCING:
            self._reborn(now)
        elif self.leaving and self.life is Life.UP and (self._hurried or not self._reports):
            for first, items in self._reports.take(now):
                self._out.append(m.Reports(self._session, first, items, self._orders.applied, self._limit()))
            self.life = Life.LEFT
            self.lease_until = NEVER
            self._out.append(m.Bye(self._session))

    def _reborn(self, now: Micros) -> None:
        """Start over as a new incarnation; only results outlive the old one."""
        for key in list(self.attempts):
            self._ended(key)
        kept = [r for r in self._reports if isinstance(r, m.Done | m.Failed | m.Stopped)]
        self._reports = Sender()
        for report in kept:
            self._reports.push(report)
        self._carried = len(kept)
        self.boot += 1
        self._phase = 0
        if self.leaving:
            self.life = Life.LEFT
            return
        self._seek(now)

    def _seek(self, now: Micros) -> None:
        self.life = Life.SEEKING
        self._phase += 1
        self._next_beat = now
        self._out.clear()

    def _beat(self, now: Micros) -> None:
        self._n += 1
        self._sent_at[self._n] = now
        if len(self._sent_at) > SENT_KEPT:
            del self._sent_at[next(iter(self._sent_at))]
        if self.life is Life.SEEKING:
            self._next_beat = now + HELLO_EVERY_US
            self._out.append(self._hello())
            return
        self._next_beat = now + self._heartbeat_us
        for key, (due, held) in self._progress.items():
            if held is not None:
                self._out.append(replace(held, session=self._session))
                self._progress[key] = (due, None)
        if self.leaving:
            self._out.append(m.Drain(self._session))
            self._delete_idle_pods()
        free = sum(self.pods.values()) - len(self.attempts)
        self._out.append(
            m.Heartbeat(
                self._session,
                self._n,
                self._orders.applied,
                self._limit(),
                max(free, 0),
                len(self.attempts),
                self._progress_count,
            )
        )
        self._credit_due = False

    def _delete_idle_pods(self) -> None:
        """End the Pods that had no attempt for a whole heartbeat: one that was under way still arrives."""
        idle = {pod for pod in self.pods if not self._taken.get(pod)}
        for pod in sorted(idle & self._idle_since_beat):
            self._effects.append(m.DeletePod(pod))
        self._idle_since_beat = idle

    def _hello(self) -> m.Hello:
        ended_pods = tuple(r.pod for r in self._reports if isinstance(r, m.PodDown))
        ended = tuple(m.attempt_key(r) for r in self._reports if isinstance(r, m.Done | m.Failed | m.Stopped))
        return m.Hello(
            proto_min=m.PROTO_MIN,
            proto_max=m.PROTO_MAX,
            node=self.node,
            boot=self.boot,
            phase=self._phase,
            n=self._n,
            pods=tuple(self.pods),
            pods_ended=ended_pods,
            running=tuple(self.attempts),
            spooled=ended,
            first_report=self._reports.first,
            carried=self._carried,
        )

    def _welcomed(self, now: Micros, message: m.Welcome) -> None:
        if message.boot != self.boot or message.phase != self._phase or message.epoch < self._epoch:
            self.dropped += 1
            return
        if self.life is Life.SEEKING:
            sent = self._sent_at.get(message.n)
            fresh = sent is not None and now < sent + message.lease_us
            newer = (message.epoch, message.session) > (self._epoch, self._session)
            if not fresh or not newer or not m.PROTO_MIN <= message.proto <= m.PROTO_MAX:
                self.dropped += 1
                return
            self._epoch, self._session = message.epoch, message.session
            self._lease_us, self._heartbeat_us = message.lease_us, message.heartbeat_us
            self.life = Life.UP
            self.refusal = ""
            self._orders = Receiver()
            self._reports.rewind()
            self._credit_due = True
            self._next_beat = now
        elif self.life is not Life.UP or message.session != self._session or message.epoch != self._epoch:
            self.dropped += 1
            return
        self._renew(message.n)
        self._after_pods_changed(now)

    def _renew(self, n: int) -> None:
        """Count the lease from when heartbeat `n` was sent; an old acknowledgement never shortens it."""
        sent = self._sent_at.get(n)
        if sent is None:
            return
        until = sent + self._lease_us
        if self.lease_until == NEVER or until > self.lease_until:
            self.lease_until = until

    def _fence_ordered(self, now: Micros, message: m.Fence) -> None:
        if message.boot != self.boot or message.epoch < self._epoch or self.life is Life.FENCING:
            self.dropped += 1
            return
        self.boot = max(self.boot, message.above)
        self._fence(now, message.reason)

    # --- inside a session -------------------------------------------------------------------------------------------

    def _in_session(self, now: Micros, message: m.HeartbeatAck | m.Orders | m.DoneAck) -> None:
        match message:
            case m.HeartbeatAck():
                self._renew(message.n)
            case m.Orders():
                self._ordered(now, message)
        if self.life is Life.UP:
            self._durable(now, message.durable)

    def _durable(self, now: Micros, upto: int) -> None:
        gone = self._reports.acknowledge(now, upto)
        for report in gone:
            if isinstance(report, m.Done | m.Failed | m.Stopped):
                self._forget.append(m.attempt_key(report))
        self._carried = max(0, self._carried - len(gone))
        if gone and self.leaving:
            self._after_pods_changed(now)

    def _ordered(self, now: Micros, message: m.Orders) -> None:
        sent = self._sent_at.get(message.lease_ref)
        if sent is None or now >= sent + self._lease_us:
            self._out.append(m.Nack(self._session, message.first, m.NackReason.STALE))
            return
        self._credit_due = True
        number = self._orders.applied
        for order in self._orders.fresh(message.first, message.items):
            number += 1
            self._carry_out(number, order)

    def _carry_out(self, number: int, order: m.Order) -> None:
        match order:
            case m.CreatePod():
                if order.pod not in self.pods:
                    self.pods[order.pod] = order.slots
                    self._effects.append(order)
            case m.Dispatch():
                self._dispatch(order)
            case m.DeletePod():
                if order.pod in self.pods:
                    self._effects.append(order)
            case m.Kill():
                if m.attempt_key(order) in self.attempts:
                    self._effects.append(order)
            case m.Prefetch() | m.Release():
                self._effects.append(order)
            case m.UnknownItem():
                self._out.append(m.Nack(self._session, number, m.NackReason.UNKNOWN, order.detail))

    def _dispatch(self, order: m.Dispatch) -> None:
        key = m.attempt_key(order)
        if key in self.attempts:
            return
        slots = self.pods.get(order.pod)
        if slots is None:
            # The Pod died on its own; its PodDown is on the way and ends this attempt too.
            return
        taken = self._taken.get(order.pod, 0)
        if taken >= slots + self._ahead:
            detail = f"pod {order.pod} has {slots} slots and runs {taken} attempts"
            self._reports.push(m.Failed(order.req_no, order.attempt, order.rank, "pod_lost", detail))
            return
        self.attempts[key] = order.pod
        self._taken[order.pod] = taken + 1
        self._effects.append(order)

    def _limit(self) -> int:
        return self._orders.applied + ORDERS_AHEAD

    def _ended(self, key: m.AttemptKey) -> None:
        pod = self.attempts.pop(key, None)
        if pod is not None:
            self._taken[pod] -= 1
        self._progress.pop(key, None)
        self._checkpoints.pop(key, None)

    def _flush_progress(self, key: m.AttemptKey) -> None:
        _, held = self._progress.get(key, (0, None))
        if held is not None and self.life is Life.UP:
            self._out.append(replace(held, session=self._session))
