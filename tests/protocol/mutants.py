"""Faults put into the protocol on purpose: if the drill lets one live, the drill is no good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from engine.protocol import messages as m
from engine.protocol.agent import AgentMachine, Life
from engine.protocol.controller import Controller
from engine.protocol.link import Link, Stage
from engine.protocol.streams import Receiver
from engine.tasks import NEVER

Patch = Callable[[Any], None]


def acknowledge_before_the_journal(patch: Any) -> None:
    """The scheduler acknowledges reports when it hears them."""
    reported = Controller._reported

    def early(self: Controller, link: Link, message: m.Reports) -> None:
        reported(self, link, message)
        link.durable = link.reports.applied
        self._send(link, m.DoneAck(link.session, self.epoch, link.durable))

    patch.setattr(Controller, "_reported", early)


def never_fence(patch: Any) -> None:
    """The agent goes on when its lease has run out."""

    def careless(self: AgentMachine, now: int) -> None:
        if now >= self.lease_until:
            self.lease_until = NEVER

    patch.setattr(AgentMachine, "_judge_lease", careless)


def judge_the_lease_at_heartbeats_only(patch: Any) -> None:
    """The agent renews an expired lease when an old acknowledgement arrives first."""
    tick = AgentMachine.tick
    judge = AgentMachine._judge_lease

    def late(self: AgentMachine, now: int) -> None:
        judge(self, now)
        tick(self, now)

    def renew(self: AgentMachine, n: int) -> None:
        self.lease_until = self._sent_at.get(n, 0) + 4 * self._lease_us

    patch.setattr(AgentMachine, "_judge_lease", lambda self, now: None)
    patch.setattr(AgentMachine, "tick", late)
    patch.setattr(AgentMachine, "_renew", renew)


def give_nodes_up_too_early(patch: Any) -> None:
    """The scheduler does not wait for the lease to run out."""
    init = Controller.__init__

    def hasty(self: Controller, *args: Any, **named: Any) -> None:
        init(self, *args, **named)
        self._margin_us = -self._lease_us * 7 // 10

    patch.setattr(Controller, "__init__", hasty)


def count_the_lease_from_receipt(patch: Any) -> None:
    """The agent counts its lease from when the acknowledgement came, not from when the heartbeat went."""

    def renew(self: AgentMachine, n: int) -> None:
        self.lease_until = max(
            self.lease_until if self.lease_until != NEVER else 0, self._next_beat + 8 * self._lease_us
        )

    patch.setattr(AgentMachine, "_renew", renew)


def accept_any_session(patch: Any) -> None:
    """The agent carries out orders of older sessions."""
    receive = AgentMachine.receive

    def gullible(self: AgentMachine, now: int, message: Any) -> None:
        if isinstance(message, m.Orders) and self.life is not Life.FENCING and message.session != self._session:
            for order in message.items:
                self._carry_out(0, order)
            return
        receive(self, now, message)

    patch.setattr(AgentMachine, "receive", gullible)


def apply_over_gaps(patch: Any) -> None:
    """A receiver applies what it gets, in whatever order."""

    def sloppy(self: Receiver, first: int, items: tuple[Any, ...]) -> tuple[Any, ...]:
        if first + len(items) - 1 <= self.applied:
            return ()
        new = items[max(0, self.applied + 1 - first) :]
        self.applied = first + len(items) - 1
        return new

    patch.setattr(Receiver, "fresh", sloppy)


def believe_a_new_boot(patch: Any) -> None:
    """The scheduler takes a restarted agent for one that still holds its Pods."""
    opened = Link.open

    def trusting(self: Link, hello: m.Hello, peer: str, session: int) -> None:
        opened(self, hello, peer, session)
        self.fresh = False

    def announce(self: Link) -> None:
        self.stage = Stage.ANNOUNCED
        self.joined_pods = tuple(self.pods)

    patch.setattr(Link, "open", trusting)
    patch.setattr(Link, "announce", announce)


def keep_orders_of_lost_nodes(patch: Any) -> None:
    """Orders decided before a loss was taken reach the node's next incarnation."""
    patch.setattr(Link, "forget_all", lambda self: None)


def forget_after_a_restart(patch: Any) -> None:
    """A restarted scheduler does not compare what was ordered with what the nodes hold."""
    patch.setattr(Link, "reorder", lambda self: iter(()))


def drop_results_in_a_crash(patch: Any) -> None:
    """The scheduler acknowledges a stretch as durable up to its end, whatever of it was applied."""
    reported = Controller._reported

    def generous(self: Controller, link: Link, message: m.Reports) -> None:
        reported(self, link, message)
        upto = message.first + len(message.items) - 1
        if upto > link.reports.applied:
            link.reports.applied = upto

    patch.setattr(Controller, "_reported", generous)


def never_resend(patch: Any) -> None:
    """Lost orders and reports stay lost."""
    from engine.protocol.streams import Sender

    take = Sender.take

    def once(self: Any, now: int) -> Any:
        self.resend_at = NEVER
        return take(self, now)

    patch.setattr(Sender, "take", once)
    patch.setattr(Sender, "rewind", lambda self: None)


def acknowledge_what_was_heard_meanwhile(patch: Any) -> None:
    """When the journal has a step, reports that came in after the step was taken are acknowledged as well."""

    def generous(self: Controller) -> None:
        for link in self._links.values():
            if link.session and link.reports.applied > link.durable:
                link.durable = link.reports.applied
                self._send(link, m.DoneAck(link.session, self.epoch, link.durable))
        self._taken.clear()

    patch.setattr(Controller, "durable", generous)


def forget_which_pods_had_started(patch: Any) -> None:
    """A restarted scheduler takes every Pod for one that is still being created."""
    restore = Controller.restore

    def blank(self: Controller, now: int, outstanding: Any) -> None:
        restore(self, now, replace(outstanding, started=frozenset()))

    patch.setattr(Controller, "restore", blank)


def come_back_before_the_pods_are_gone(patch: Any) -> None:
    """A fenced agent says HELLO while its Pods are still dying."""
    after = AgentMachine._after_pods_changed

    def early(self: AgentMachine, now: int) -> None:
        if self.life is Life.FENCING:
            self.pods.clear()
        after(self, now)

    patch.setattr(AgentMachine, "_after_pods_changed", early)


def obey_while_seeking(patch: Any) -> None:
    """An agent carries out orders of its last session after it said HELLO."""
    receive = AgentMachine.receive

    def obedient(self: AgentMachine, now: int, message: Any) -> None:
        if self.life is Life.SEEKING and isinstance(message, m.Orders) and message.session == self._session:
            self._judge_lease(now)
            self._ordered(now, message)
            return
        receive(self, now, message)

    patch.setattr(AgentMachine, "receive", obedient)


def dispatch_again_whatever_the_node_says(patch: Any) -> None:
    """After a HELLO everything in the ledger is ordered again, and the agent does not look whether it has it."""
    reorder = Link.reorder

    def all_again(self: Link) -> Any:
        if self.hello is not None:
            self.hello = replace(self.hello, running=(), spooled=())
        return reorder(self)

    def credulous(self: AgentMachine, order: m.Dispatch) -> None:
        self.attempts[m.attempt_key(order)] = order.pod
        self._taken[order.pod] = self._taken.get(order.pod, 0) + 1
        self._effects.append(order)

    patch.setattr(Link, "reorder", all_again)
    patch.setattr(AgentMachine, "_dispatch", credulous)


def come_back_under_the_same_boot(patch: Any) -> None:
    """A fenced agent does not tell that it started over."""
    reborn = AgentMachine._reborn

    def unchanged(self: AgentMachine, now: int) -> None:
        boot = self.boot
        reborn(self, now)
        self.boot = boot

    patch.setattr(AgentMachine, "_reborn", unchanged)


def number_sessions_anew_in_each_life(patch: Any) -> None:
    """A restarted scheduler gives a number to a session that its last life gave to another."""
    init = Controller.__init__

    def from_zero(self: Controller, *args: Any, **named: Any) -> None:
        init(self, *args, **named)
        self._sessions = 0

    patch.setattr(Controller, "__init__", from_zero)


MUTANTS: tuple[Patch, ...] = (
    acknowledge_before_the_journal,
    never_fence,
    judge_the_lease_at_heartbeats_only,
    give_nodes_up_too_early,
    count_the_lease_from_receipt,
    accept_any_session,
    apply_over_gaps,
    believe_a_new_boot,
    keep_orders_of_lost_nodes,
    forget_after_a_restart,
    drop_results_in_a_crash,
    never_resend,
    acknowledge_what_was_heard_meanwhile,
    forget_which_pods_had_started,
    come_back_before_the_pods_are_gone,
    obey_while_seeking,
    dispatch_again_whatever_the_node_says,
    come_back_under_the_same_boot,
    number_sessions_anew_in_each_life,
)
