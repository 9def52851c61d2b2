"""The scheduler's end of the protocol: engine commands become messages to the nodes, their messages become engine events.

Sans-IO, like everything beside the engine: time is an argument, and the caller takes what is to be sent. Three duties:

- nothing is acknowledged to a node before the caller says that the events it became are durable (`durable`);
- a node's work is given up (`NodeLost`) only when the lease it may still believe in has surely run out;
- what was ordered before a node was lost or restarted never reaches its next incarnation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine import commands as c
from engine import events as e
from engine.protocol import messages as m
from engine.protocol.link import ExpectedAttempt, ExpectedPod, Link, Stage, create_order
from engine.protocol.outside import NodeStatus, Outstanding, PayloadRefused, Payloads, TermPayloads
from engine.protocol.reports import event_of
from engine.tasks import NEVER, SECOND, FailureCause, Micros

__all__ = ["Controller", "NodeStatus", "Outstanding", "PayloadRefused", "Payloads", "TermPayloads"]

LEASE_US: Micros = 10 * SECOND
MARGIN_US: Micros = 3 * SECOND
HEARTBEAT_US: Micros = 1 * SECOND
SWEEP_US: Micros = 200_000


@dataclass(frozen=True, slots=True)
class _Joining:
    node: str
    boot: int


@dataclass(frozen=True, slots=True)
class _Losing:
    node: str
    reason: str


class Controller:
    """The scheduler's end, for all nodes. `epoch` must grow with every start of the scheduler (the caller keeps it on disk)."""

    def __init__(
        self,
        epoch: int,
        payloads: Payloads,
        *,
        lease_us: Micros = LEASE_US,
        margin_us: Micros = MARGIN_US,
        heartbeat_us: Micros = HEARTBEAT_US,
        sweep_us: Micros = SWEEP_US,
    ) -> None:
        self.epoch = epoch
        self.dropped = 0
        """Messages of unknown or older sessions."""
        self.repeated = 0
        """Reports of what had already ended, and of kinds unknown here."""
        self._payloads = payloads
        self._terms = payloads if isinstance(payloads, TermPayloads) else None
        self._lease_us, self._margin_us, self._heartbeat_us = lease_us, margin_us, heartbeat_us
        self._sweep_us = sweep_us
        self._next_sweep: Micros = NEVER
        # A session's number is never used twice, not even by the next life of the scheduler: what still travels from a session of
        # the last life must not pass for one of this.
        self._sessions = epoch << 32
        self._links: dict[str, Link] = {}
        self._peers: dict[str, Link] = {}
        self._pod_node: dict[int, Link] = {}
        self._dirty: dict[str, Link] = {}
        self._touched: dict[str, Link] = {}
        self._taken: list[tuple[Link, int, int]] = []
        self._events: list[e.Event | _Joining | _Losing] = []
        self._progress: dict[m.AttemptKey, tuple[Link, e.TaskProgressed]] = {}
        self._out: list[tuple[str, m.FromScheduler]] = []

    # --- inputs -----------------------------------------------------------------------------------------------------

    def restore(self, now: Micros, outstanding: Outstanding) -> None:
        """Take over from an earlier life: silent nodes are lost after lease and margin, the others are compared at their HELLO."""
        for name in outstanding.nodes:
            link = self._link(now, name)
            link.known = True
            link.heard_at = now
            link.lost_at = now + self._lease_us + self._margin_us
        commands: Sequence[Iterable[c.Command]] = (
            outstanding.creates,
            outstanding.starts,
            outstanding.stops,
            outstanding.deletes,
        )
        for group in commands:
            for command in group:
                self.perform(now, command)
        for pod in outstanding.started:
            owner = self._pod_node.get(pod)
            if owner is not None and pod in owner.pods:
                owner.pods[pod].started = True

    def perform(self, now: Micros, command: c.Command) -> None:
        """Order what the engine commands; the caller has made the command durable. Notify and ScaleNodes concern no node."""
        match command:
            case c.CreatePod():
                self._create(now, command)
            case c.StartTask():
                self._start(now, command)
            case c.DeletePod():
                link = self._pod_node.get(command.pod)
                pod = link.pods.get(command.pod) if link is not None else None
                if link is not None and pod is not None:
                    pod.delete = m.DeletePod(command.pod, command.grace_us)
                    self._order(link, pod.delete)
            case c.StopTask():
                link = self._links.get(command.node)
                key = (command.req_no, command.attempt, command.rank)
                attempt = link.attempts.get(key) if link is not None else None
                if link is not None and attempt is not None:
                    attempt.stop = m.Kill(*key, command.pod, command.grace_us, command.keep_checkpoint)
                    self._order(link, attempt.stop)
            case c.PrefetchModel():
                link = self._links.get(command.node)
                if link is not None and link.stage is Stage.JOINED:
                    try:
                        model = self._payloads.prefetch(command)
                        self._order(link, m.Prefetch({**model, "pin": True} if command.pin else model))
                    except PayloadRefused:
                        pass
            case c.ReleaseModel():
                link = self._links.get(command.node)
                if link is not None and link.stage is Stage.JOINED:
                    self._order(link, m.Release(command.model, command.drop))
            case c.ScaleNodes() | c.Notify():
                pass

    def receive(self, now: Micros, peer: str, message: m.FromNode) -> None:
        """Take a message; the caller has authenticated that `peer` may speak for the node it names."""
        if isinstance(message, m.Hello):
            self._hello(now, peer, message)
            return
        link = self._peers.get(peer)
        if link is None:
            self._out.append((peer, m.Rejoin(message.session, self.epoch)))
            return
        if message.session != link.session:
            self.dropped += 1
            return
        match message:
            case m.Reports():
                self._acknowledged(now, link, message.applied, message.limit)
                self._reported(link, message)
            case m.Heartbeat():
                self._heard(now, link, message)
            case m.Credit():
                self._acknowledged(now, link, message.applied, message.limit)
            case m.Progress():
                key = m.attempt_key(message)
                if key in link.attempts:
                    req_no, attempt, rank = key
                    progressed = e.TaskProgressed(
                        req_no,
                        attempt,
                        message.done,
                        message.total,
                        rank,
                        message.checkpoint,
                        message.note,
                        message.preview,
                    )
                    if message.checkpoint and message.checkpoint != link.attempts[key].checkpoint:
                        # What can be resumed must be known before the report that ends the attempt, maybe in this very batch.
                        link.attempts[key].checkpoint = message.checkpoint
                        self._events.append(progressed)
                        self._progress.pop(key, None)
                    else:
                        self._progress[key] = (link, progressed)
            case m.Drain():
                if link.stage is Stage.JOINED and not link.draining:
                    link.draining = True
                    self._events.append(e.NodeDrainRequested(link.name, leaving=True))
            case m.Bye():
                self._lose(link, "the node left")
            case m.Nack():
                self._nacked(link, message)

    def peer_gone(self, peer: str) -> None:
        """Forget a connection that is known to be closed; the node's lease goes on."""
        link = self._peers.pop(peer, None)
        if link is not None and link.peer == peer:
            link.peer = None

    def durable(self) -> None:
        """The events of the last `take_events` are in the journal: acknowledge the reports they came from."""
        for link, boot, upto in self._taken:
            if link.boot == boot and upto > link.durable:
                link.durable = upto
                self._send(link, m.DoneAck(link.session, self.epoch, upto))
        self._taken.clear()

    def tick(self, now: Micros) -> None:
        """Do what is due: leases that ran out, orders that wait too long for an acknowledgement."""
        if now < self._next_sweep:
            return
        self._next_sweep = now + self._sweep_us
        for link in self._links.values():
            if now >= link.lost_at:
                self._lose(link, "the node was silent until its lease had run out")
            elif now >= link.orders.resend_at:
                self._dirty[link.name] = link

    # --- outputs ----------------------------------------------------------------------------------------------------

    def take_events(self) -> list[e.Event]:
        """Return the events since the last call. Joining and loss take effect on the ledgers at this very moment."""
        waiting, self._events = self._events, []
        events: list[e.Event] = []
        for item in waiting:
            match item:
                case _Joining():
                    events.extend(self._join(item))
                case _Losing():
                    events.extend(self._lost(item))
                case _:
                    events.append(item)
        events.extend(progressed for key, (link, progressed) in self._progress.items() if key in link.attempts)
        self._progress.clear()
        for link in self._touched.values():
            link.taken = link.reports.applied
            self._taken.append((link, link.boot, link.taken))
        self._touched.clear()
        return events

    def take_outgoing(self, now: Micros) -> list[tuple[str, m.FromScheduler]]:
        """Return (peer, message) to send now."""
        if self._dirty:
            for link in self._dirty.values():
                if link.peer is None or link.stage is not Stage.JOINED:
                    continue
                for first, items in link.orders.take(now):
                    orders = m.Orders(link.session, self.epoch, link.last_n, first, items, link.durable)
                    self._out.append((link.peer, orders))
            self._dirty.clear()
        out, self._out = self._out, []
        return out

    def has_events(self) -> bool:
        """Tell whether `take_events` would return something."""
        return bool(self._events or self._progress or self._touched)

    def has_outgoing(self) -> bool:
        """Tell whether `take_outgoing` may return something."""
        return bool(self._out or self._dirty)

    def next_timeout(self) -> Micros:
        """Return when `tick` is to be called at the latest."""
        return self._next_sweep

    def statuses(self) -> tuple[NodeStatus, ...]:
        """Return every node ever seen in this life, for monitoring."""
        return tuple(
            NodeStatus(k.name, k.stage, k.heard_at, k.running, k.progress, k.draining, len(k.orders))
            for k in self._links.values()
        )

    # --- orders -----------------------------------------------------------------------------------------------------

    def _create(self, now: Micros, command: c.CreatePod) -> None:
        link = self._links.get(command.node)
        if link is None or not (link.known or link.stage is not Stage.ABSENT):
            self._events.append(e.PodStopped(command.pod, FailureCause.NODE_LOST, f"node {command.node} is not there"))
            return
        try:
            order = create_order(command, self._payloads.pod(command))
        except PayloadRefused as refused:
            self._events.append(e.PodStopped(command.pod, refused.cause, refused.detail))
            return
        link.pods[command.pod] = ExpectedPod(order)
        self._pod_node[command.pod] = link
        self._order(link, order)

    def _start(self, now: Micros, command: c.StartTask) -> None:
        key = (command.req_no, command.attempt, command.rank)
        link = self._links.get(command.node)
        if link is None or command.pod not in link.pods:
            # The Pod's end is already among the events, and ends this attempt as well.
            self.repeated += 1
            return
        try:
            parameters = self._payloads.task(command)
            terms = self._terms.terms(command) if self._terms is not None else {}
        except PayloadRefused as refused:
            self._events.append(e.TaskFailed(key[0], key[1], refused.cause, key[2], refused.detail))
            return
        order = m.Dispatch(*key, command.pod, parameters, command.checkpoint, terms)
        link.attempts[key] = ExpectedAttempt(order)
        self._order(link, order)

    def _order(self, link: Link, order: m.Order) -> None:
        """Put an order into the session's stream; without a joined session the ledger alone keeps it."""
        if link.stage is Stage.JOINED:
            link.orders.push(order)
            self._dirty[link.name] = link

    # --- sessions ---------------------------------------------------------------------------------------------------

    def _link(self, now: Micros, name: str) -> Link:
        link = self._links.get(name)
        if link is None:
            link = self._links[name] = Link(name)
            self._next_sweep = min(self._next_sweep, now + self._sweep_us)
        return link

    def _hello(self, now: Micros, peer: str, hello: m.Hello) -> None:
        proto = min(m.PROTO_MAX, hello.proto_max)
        if proto < max(m.PROTO_MIN, hello.proto_min):
            detail = f"this scheduler speaks protocol {m.PROTO_MIN}-{m.PROTO_MAX}, the agent {hello.proto_min}-{hello.proto_max}"
            self._out.append((peer, m.Nack(0, hello.n, m.NackReason.UNKNOWN, detail)))
            return
        link = self._link(now, hello.node.name)
        if link.doomed:
            # Its loss is not taken yet; the next HELLO finds the ledger settled.
            self.dropped += 1
            return
        above = max(link.fenced_boot, link.boot)
        if hello.boot <= link.fenced_boot or hello.boot < link.boot:
            self._out.append((peer, m.Fence(hello.boot, self.epoch, above, "this boot was given up")))
            return
        if hello.boot == link.boot and hello.phase < link.phase:
            self.dropped += 1
            return
        if hello.boot != link.boot or hello.phase > link.phase:
            if link.unexpected(hello):
                reason = "the node holds Pods that the scheduler does not know"
                self._out.append((peer, m.Fence(hello.boot, self.epoch, hello.boot, reason)))
                return
            self._open(link, hello, peer)
        elif peer != link.peer:
            self._bind(link, peer)
        link.heard_at = now
        link.lost_at = now + self._lease_us + self._margin_us
        link.last_n = max(link.last_n, hello.n)
        self._send(
            link,
            m.Welcome(
                proto, link.session, self.epoch, hello.boot, hello.phase, hello.n, self._lease_us, self._heartbeat_us
            ),
        )
        self._dirty[link.name] = link

    def _open(self, link: Link, hello: m.Hello, peer: str) -> None:
        self._sessions += 1
        link.open(hello, peer, self._sessions)
        self._bind(link, peer)
        if link.stage is Stage.JOINED:
            self._events.extend(self._reorder(link))
        elif link.stage is Stage.CARRYING:
            self._maybe_announce(link)

    def _bind(self, link: Link, peer: str) -> None:
        if link.peer is not None:
            self._peers.pop(link.peer, None)
        for other in [p for p, owner in self._peers.items() if owner is link]:
            del self._peers[other]
        link.peer = peer
        self._peers[peer] = link

    def _maybe_announce(self, link: Link) -> None:
        if link.stage is Stage.CARRYING and link.reports.applied >= link.carried_until:
            link.announce()
            self._events.append(_Joining(link.name, link.boot))

    def _join(self, joining: _Joining) -> list[e.Event]:
        link = self._links[joining.node]
        if link.boot != joining.boot or link.stage is not Stage.ANNOUNCED or link.spec is None:
            return []
        before = tuple(link.pods)
        events: list[e.Event] = [e.NodeJoined(link.spec, link.join())]
        for pod in before:
            if pod not in link.pods:
                self._pod_node.pop(pod, None)
        link.draining = False
        events.extend(self._reorder(link))
        self._dirty[link.name] = link
        return events

    def _reorder(self, link: Link) -> list[e.Event]:
        ends = list(link.reorder())
        for end in ends:
            if isinstance(end, e.PodStopped):
                self._pod_node.pop(end.pod, None)
        return ends

    def _lose(self, link: Link, reason: str) -> None:
        if link.peer is not None:
            self._peers.pop(link.peer, None)
        link.close()
        link.doomed = True
        self._events.append(_Losing(link.name, reason))

    def _lost(self, losing: _Losing) -> list[e.Event]:
        link = self._links[losing.node]
        for pod in link.pods:
            self._pod_node.pop(pod, None)
        link.forget_all()
        link.doomed = False
        if not link.known:
            return []
        link.known = False
        return [e.NodeLost(link.name, losing.reason)]

    # --- inside a session -------------------------------------------------------------------------------------------

    def _send(self, link: Link, message: m.FromScheduler) -> None:
        if link.peer is not None:
            self._out.append((link.peer, message))

    def _heard(self, now: Micros, link: Link, beat: m.Heartbeat) -> None:
        link.heard_at = now
        link.lost_at = now + self._lease_us + self._margin_us
        link.last_n = max(link.last_n, beat.n)
        link.running, link.progress = beat.running, beat.progress
        if link.stale:
            link.stale = False
            link.orders.rewind()
        self._acknowledged(now, link, beat.applied, beat.limit)
        self._send(link, m.HeartbeatAck(link.session, self.epoch, beat.n, link.durable))

    def _acknowledged(self, now: Micros, link: Link, applied: int, limit: int) -> None:
        link.orders.acknowledge(now, applied)
        link.orders.grant(limit)
        if link.orders.ready():
            self._dirty[link.name] = link

    def _nacked(self, link: Link, nack: m.Nack) -> None:
        if nack.reason == m.NackReason.STALE:
            link.stale = True
            return
        order = link.orders.get(nack.number)
        detail = f"the agent of node {link.name} refused the order: {nack.reason} {nack.detail}"
        match order:
            case m.Dispatch():
                key = m.attempt_key(order)
                if link.attempts.pop(key, None) is not None:
                    self._events.append(e.TaskFailed(key[0], key[1], FailureCause.BAD_INPUT, key[2], detail))
            case m.CreatePod():
                if link.forget_pod(order.pod):
                    self._pod_node.pop(order.pod, None)
                    self._events.append(e.PodStopped(order.pod, FailureCause.BAD_INPUT, detail))
            case _:
                self.dropped += 1

    def _reported(self, link: Link, message: m.Reports) -> None:
        fresh = link.reports.fresh(message.first, message.items)
        if not fresh:
            if message.first <= link.durable:
                self._send(link, m.DoneAck(link.session, self.epoch, link.durable))
            return
        self._touched[link.name] = link
        number = link.reports.applied - len(fresh)
        for item in fresh:
            number += 1
            event = event_of(link, item)
            if event is None:
                self.repeated += 1
            else:
                self._events.append(event)
                if isinstance(event, e.PodStopped):
                    self._pod_node.pop(event.pod, None)
            if number == link.carried_until:
                self._maybe_announce(link)
