"""The two state machines, rule by rule, without any channel between them."""

from __future__ import annotations

from typing import Any

import pytest

from engine import commands as c
from engine import events as e
from engine.protocol import messages as m
from engine.protocol.agent import AgentMachine, KillPods, Life
from engine.protocol.controller import HEARTBEAT_US, LEASE_US, MARGIN_US, Controller, Outstanding, PayloadRefused
from engine.resources import Demand, GpuGrant, GpuSpec, NodeSpec
from engine.tasks import SECOND, FailureCause

SESSION = (1 << 32) + 1
"""The first session of epoch 1."""
SPEC = NodeSpec("n", (GpuSpec("g", "x", 1),))
CREATE = c.CreatePod(1, "n", "sleep", "", (GpuGrant("g", 1000, 1),), Demand())
START = c.StartTask("r", 1, 1, "n")


class Bodies:
    refuse: PayloadRefused | None = None

    def pod(self, command: c.CreatePod) -> dict[str, object]:
        return {"id": command.model}

    def task(self, command: c.StartTask) -> dict[str, object]:
        if self.refuse is not None:
            raise self.refuse
        return {"steps": 3}

    def prefetch(self, command: c.PrefetchModel) -> dict[str, object]:
        return {"id": command.model}


class Pair:
    """Both ends and a perfect channel that moves messages when told."""

    def __init__(self, boot: int = 1) -> None:
        self.now = 0
        self.bodies = Bodies()
        self.sm = Controller(1, self.bodies)
        self.agent = AgentMachine(SPEC, boot)
        self.effects: list[Any] = []
        self.events: list[e.Event] = []

    def exchange(self, rounds: int = 4) -> None:
        for _ in range(rounds):
            self.agent.tick(self.now)
            for up in self.agent.take_outgoing(self.now):
                self.sm.receive(self.now, "p", up)
            self.effects.extend(self.agent.take_effects())
            self.sm.tick(self.now)
            for _, down in self.sm.take_outgoing(self.now):
                self.agent.receive(self.now, down)
            self.effects.extend(self.agent.take_effects())

    def step(self, *commands: c.Command) -> list[e.Event]:
        """Do as the driver does: take, journal, perform."""
        taken = self.sm.take_events()
        self.events.extend(taken)
        self.sm.durable()
        for command in commands:
            self.sm.perform(self.now, command)
        self.exchange()
        return taken

    def joined(self) -> Pair:
        self.exchange()
        assert [type(event) for event in self.step()] == [e.NodeJoined]
        return self

    def running(self) -> Pair:
        self.joined().step(CREATE)
        self.agent.report(self.now, m.PodUp(1))
        self.exchange()
        self.step(START)
        self.agent.report(self.now, m.Started("r", 1))
        self.exchange()
        self.step()
        return self

    def silence(self, us: int, by: int = SECOND) -> None:
        """Let time pass while nothing gets through."""
        end = self.now + us
        while self.now < end:
            self.now += by
            self.agent.tick(self.now)
            self.agent.take_outgoing(self.now)
            self.sm.tick(self.now)
            self.sm.take_outgoing(self.now)


def test_an_attempt_goes_all_the_way() -> None:
    pair = Pair().running()
    pair.agent.report(pair.now, m.Done("r", 1, 0, "result", 5))
    pair.exchange()
    assert pair.step() == [e.TaskFinished("r", 1, 0, "result", 5)]
    assert [type(effect) for effect in pair.effects] == [m.CreatePod, m.Dispatch]
    assert pair.effects[1].parameters == {"steps": 3}


def test_a_result_is_kept_until_the_journal_has_it() -> None:
    pair = Pair().running()
    pair.agent.report(pair.now, m.Done("r", 1))
    kept = pair.agent.take_spool()
    assert kept is not None
    assert kept.keep == (m.Done("r", 1),)
    pair.exchange()
    assert pair.agent.unacknowledged == 1, "heard is not durable"
    pair.sm.take_events()
    pair.exchange()
    assert pair.agent.unacknowledged == 1, "taken is not durable"
    pair.sm.durable()
    pair.exchange()
    assert pair.agent.unacknowledged == 0
    gone = pair.agent.take_spool()
    assert gone is not None
    assert gone.forget == (("r", 1, 0),)


def test_the_agent_kills_its_pods_when_the_lease_runs_out() -> None:
    pair = Pair().running()
    pair.silence(LEASE_US + SECOND)
    assert any(isinstance(effect, KillPods) for effect in pair.agent.take_effects())
    assert pair.agent.life is Life.FENCING
    boot = pair.agent.boot
    pair.agent.report(pair.now, m.PodDown(1, "pod_lost"))
    assert pair.agent.life is Life.SEEKING
    assert pair.agent.boot == boot + 1


def test_the_scheduler_gives_a_node_up_only_after_lease_and_margin() -> None:
    pair = Pair().running()
    pair.silence(LEASE_US + MARGIN_US - SECOND)
    assert pair.sm.take_events() == []
    pair.silence(2 * SECOND)
    assert [type(event) for event in pair.sm.take_events()] == [e.NodeLost]


def test_an_acknowledgement_that_waited_in_a_frozen_agent_renews_nothing() -> None:
    pair = Pair().running()
    pair.now += HEARTBEAT_US
    pair.agent.tick(pair.now)
    (beat,) = [message for message in pair.agent.take_outgoing(pair.now) if isinstance(message, m.Heartbeat)]
    pair.now += LEASE_US
    pair.agent.receive(pair.now, m.HeartbeatAck(SESSION, 1, beat.n, 0))
    assert pair.agent.life is Life.FENCING


def test_orders_that_ride_on_an_expired_heartbeat_are_refused_and_come_again() -> None:
    pair = Pair().joined()
    pair.agent.receive(pair.now, m.Orders(SESSION, 1, 999, 1, (m.CreatePod(1, "sleep"),)))
    assert pair.agent.take_effects() == []
    (nack,) = [message for message in pair.agent.take_outgoing(pair.now) if isinstance(message, m.Nack)]
    assert nack.reason == m.NackReason.STALE
    pair.sm.perform(pair.now, CREATE)
    pair.sm.take_outgoing(pair.now)
    pair.sm.receive(pair.now, "p", nack)
    pair.now += HEARTBEAT_US
    pair.exchange()
    assert [type(effect) for effect in pair.effects] == [m.CreatePod]


@pytest.mark.parametrize("session, epoch", [(SESSION - 1, 1), (SESSION + 1, 1), (SESSION, 0), (SESSION, 2)])
def test_orders_of_another_session_or_epoch_are_dropped(session: int, epoch: int) -> None:
    pair = Pair().joined()
    pair.agent.receive(pair.now, m.Orders(session, epoch, 1, 1, (m.CreatePod(1, "sleep"),)))
    assert pair.agent.take_effects() == []
    assert pair.agent.dropped == 1


def test_a_doubled_order_is_carried_out_once() -> None:
    pair = Pair().joined()
    pair.sm.perform(pair.now, CREATE)
    ((_, orders),) = pair.sm.take_outgoing(pair.now)
    for _ in range(2):
        pair.agent.receive(pair.now, orders)
    assert len(pair.agent.take_effects()) == 1


def test_a_lost_order_is_sent_again() -> None:
    pair = Pair().joined()
    pair.sm.perform(pair.now, CREATE)
    assert pair.sm.take_outgoing(pair.now)
    for _ in range(2):
        pair.now += SECOND
        pair.exchange()
    assert [type(effect) for effect in pair.effects] == [m.CreatePod]


def test_a_restarted_agent_brings_its_spooled_results_before_it_joins() -> None:
    pair = Pair().running()
    pair.agent = AgentMachine(SPEC, 2, (m.Done("r", 1, 0, "kept"),))
    pair.exchange()
    assert [type(event) for event in pair.step()] == [e.TaskFinished, e.NodeJoined]
    assert pair.events[-1] == e.NodeJoined(SPEC, ())


def test_orders_for_a_restarted_agent_that_were_decided_before_it_joined_never_reach_it() -> None:
    pair = Pair().joined()
    pair.agent = AgentMachine(SPEC, 2)
    pair.exchange()
    pair.sm.perform(pair.now, CREATE)
    pair.step()
    pair.exchange()
    assert pair.effects == []


def test_orders_for_a_lost_node_that_were_decided_before_the_loss_was_taken_never_leave() -> None:
    pair = Pair().joined()
    pair.silence(LEASE_US + MARGIN_US + SECOND)
    pair.sm.perform(pair.now, CREATE)
    assert [type(event) for event in pair.sm.take_events()] == [e.NodeLost]
    pair.exchange(8)
    pair.step()
    pair.exchange(8)
    assert not any(isinstance(effect, m.CreatePod) for effect in pair.effects)


def test_an_older_boot_is_fenced() -> None:
    pair = Pair(boot=5).joined()
    pair.sm.receive(pair.now, "q", m.Hello(1, 1, SPEC, 4, 1, 1))
    assert [(peer, type(message)) for peer, message in pair.sm.take_outgoing(pair.now)] == [("q", m.Fence)]


def test_a_hello_of_an_older_phase_is_dropped() -> None:
    pair = Pair().joined()
    pair.agent.receive(pair.now, m.Rejoin(SESSION, 1))
    pair.exchange()
    before = pair.sm.dropped
    pair.sm.receive(pair.now, "p", m.Hello(1, 1, SPEC, 1, 1, 1))
    assert pair.sm.dropped == before + 1


def test_a_restarted_scheduler_orders_again_only_what_the_node_never_received() -> None:
    pair = Pair().running()
    second = c.CreatePod(2, "n", "sleep", "", (GpuGrant("h", 1000, 1),), Demand())
    pair.sm = Controller(2, pair.bodies)
    pair.sm.restore(pair.now, Outstanding(("n",), (CREATE, second), frozenset({1}), (START,)))
    pair.effects.clear()
    pair.now += HEARTBEAT_US
    pair.exchange()
    assert pair.step() == [e.NodeJoined(SPEC, (1, 2))]
    pair.exchange()
    assert [(type(effect), effect.pod) for effect in pair.effects] == [(m.CreatePod, 2)]


def test_a_session_of_the_last_life_does_not_pass_for_one_of_this() -> None:
    pair = Pair().joined()
    late = m.Reports(SESSION, 1, (), 1, 99)
    pair.sm = Controller(2, pair.bodies)
    pair.sm.restore(pair.now, Outstanding(("n",)))
    pair.now += HEARTBEAT_US
    pair.exchange()
    pair.step()
    pair.sm.perform(pair.now, CREATE)
    pair.sm.take_outgoing(pair.now)
    before = pair.sm.dropped
    pair.sm.receive(pair.now, "p", late)
    assert pair.sm.dropped == before + 1
    assert pair.sm.statuses()[0].unsent_orders == 1, "the order is still to be acknowledged"


def test_a_restarted_scheduler_waits_for_lease_and_margin_before_it_gives_silent_nodes_up() -> None:
    sm = Controller(2, Bodies())
    sm.restore(0, Outstanding(("n",)))
    sm.tick(LEASE_US + MARGIN_US - 1)
    assert sm.take_events() == []
    sm.tick(LEASE_US + 2 * MARGIN_US)
    assert [type(event) for event in sm.take_events()] == [e.NodeLost]


def test_a_node_whose_loss_is_not_taken_yet_is_not_welcomed_and_then_fenced() -> None:
    pair = Pair().running()
    pair.sm = Controller(2, pair.bodies)
    pair.sm.restore(pair.now, Outstanding(("n",), (CREATE,), frozenset({1}), (START,)))
    pair.sm.tick(pair.now + LEASE_US + 2 * MARGIN_US)
    hello = m.Hello(1, 1, SPEC, 1, 2, 9, (1,), (), (("r", 1, 0),))
    pair.sm.receive(pair.now, "p", hello)
    assert pair.sm.take_outgoing(pair.now) == []
    assert [type(event) for event in pair.sm.take_events()] == [e.NodeLost]
    pair.sm.receive(pair.now, "p", hello)
    assert [type(message) for _, message in pair.sm.take_outgoing(pair.now)] == [m.Fence]


def test_a_node_with_pods_nobody_knows_is_fenced() -> None:
    pair = Pair().running()
    pair.sm = Controller(2, pair.bodies)
    pair.effects.clear()
    pair.now += HEARTBEAT_US
    pair.exchange()
    assert any(isinstance(effect, KillPods) for effect in pair.effects)


def test_a_body_that_is_refused_fails_the_attempt_and_is_not_sent() -> None:
    pair = Pair().joined()
    pair.step(CREATE)
    pair.bodies.refuse = PayloadRefused(FailureCause.MODEL_MISSING, "no such model")
    pair.sm.perform(pair.now, START)
    assert pair.step() == [e.TaskFailed("r", 1, FailureCause.MODEL_MISSING, 0, "no such model")]
    assert not any(isinstance(effect, m.Dispatch) for effect in pair.effects)


def test_a_refused_order_fails_what_it_was_for() -> None:
    pair = Pair().joined()
    pair.sm.perform(pair.now, CREATE)
    pair.sm.take_outgoing(pair.now)
    pair.sm.receive(pair.now, "p", m.Nack(SESSION, 1, m.NackReason.UNKNOWN, "too new"))
    (stopped,) = pair.step()
    assert isinstance(stopped, e.PodStopped)
    assert "too new" in stopped.detail


def test_a_message_of_an_unknown_connection_is_answered_by_rejoin() -> None:
    sm = Controller(3, Bodies())
    sm.receive(0, "stranger", m.Heartbeat(9, 1, 0, 0))
    assert sm.take_outgoing(0) == [("stranger", m.Rejoin(9, 3))]


def test_ends_of_different_versions_that_share_none_tell_so() -> None:
    sm = Controller(1, Bodies())
    sm.receive(0, "p", m.Hello(7, 9, SPEC, 1, 1, 1))
    ((_, nack),) = sm.take_outgoing(0)
    assert isinstance(nack, m.Nack)
    assert "7-9" in nack.detail
    agent = AgentMachine(SPEC, 1)
    agent.receive(0, nack)
    assert "7-9" in agent.refusal


def test_progress_is_passed_on_at_most_twice_a_second_and_the_last_is_never_lost() -> None:
    pair = Pair().running()
    for done in range(10):
        pair.agent.progress(pair.now, m.Progress(0, "r", 1, 0, done, 10))
    sent = [message.done for message in pair.agent.take_outgoing(pair.now) if isinstance(message, m.Progress)]
    assert sent == [0]
    pair.agent.report(pair.now, m.Done("r", 1))
    sent = [message.done for message in pair.agent.take_outgoing(pair.now) if isinstance(message, m.Progress)]
    assert sent == [9]


def test_a_node_that_leaves_drains_deletes_its_idle_pods_and_says_bye() -> None:
    pair = Pair().running()
    pair.agent.leave(pair.now)
    pair.exchange()
    assert pair.step() == [e.NodeDrainRequested("n", leaving=True)]
    pair.agent.report(pair.now, m.Done("r", 1))
    for _ in range(3):
        pair.now += HEARTBEAT_US
        pair.exchange()
        pair.step()
    assert pair.effects[-1] == m.DeletePod(1)
    pair.agent.report(pair.now, m.PodDown(1, "pod_lost"))
    pair.exchange()
    pair.step()
    pair.exchange()
    assert pair.agent.life is Life.LEFT
    assert [type(event) for event in pair.step()] == [e.NodeLost]


def test_a_node_that_left_and_comes_back_joins_and_that_ends_its_own_drain() -> None:
    pair = Pair().joined()
    pair.agent.leave(pair.now)
    pair.exchange()
    pair.step()
    pair.agent = AgentMachine(SPEC, 2)
    pair.exchange()
    pair.step()
    pair.now += 2 * SECOND
    pair.exchange()
    pair.step()
    assert [type(event) for event in pair.events][-2:] == [e.NodeLost, e.NodeJoined]


def test_a_pod_takes_no_more_attempts_than_its_slots_and_one_ahead() -> None:
    pair = Pair().joined()
    pair.step(CREATE)
    pair.agent.report(pair.now, m.PodUp(1))
    pair.exchange()
    pair.step(*(c.StartTask(f"r{number}", 1, 1, "n") for number in range(3)))
    assert sum(isinstance(effect, m.Dispatch) for effect in pair.effects) == 2
    (failed,) = [event for event in pair.step() if isinstance(event, e.TaskFailed)]
    assert failed.req_no == "r2"
