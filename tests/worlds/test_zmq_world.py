"""What only the real world has: keys, hostile connections, restarts of either end, a frozen agent, devices that come and go."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import zmq
from fake_pods import FakeDevices, FakePodHost
from zmq_factory import HEARTBEAT_US, LEASE_US, MARGIN_US, AgentProcess, make_zmq_rig

from engine import commands as c
from engine import events as e
from engine.protocol import messages as m
from engine.protocol.controller import Outstanding
from engine.resources import Demand, GpuGrant, GpuSpec
from engine.tasks import SECOND, TaskState
from executors import curve, wire
from executors.agent import AgentOptions, NodeAgent, run_agent
from executors.zmq_world import ZmqWorld

pytestmark = pytest.mark.e2e

CREATE = c.CreatePod(1, "node-0", "sleep", "", (GpuGrant("cpu-0", 1000, 1),), Demand())
START = c.StartTask("r", 1, 1, "node-0")


class Bodies:
    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def pod(self, command: c.CreatePod) -> dict[str, object]:
        return {}

    def task(self, command: c.StartTask) -> dict[str, object]:
        return {"seconds": self.seconds}

    def prefetch(self, command: c.PrefetchModel) -> dict[str, object]:
        return {"id": command.model}


class Site:
    """Keys and state of one scheduler and its nodes under a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.keys = curve.load_or_generate(root / "scheduler.key")
        self.authorize("node-0")

    def authorize(self, node: str) -> curve.KeyPair:
        pair = curve.load_or_generate(self.root / f"{node}.key")
        curve.authorize(self.root / "authorized", node, pair.public)
        return pair

    def world(self, bind: str = "tcp://127.0.0.1:*", seconds: float = 0.0, **named: object) -> ZmqWorld:
        allowed = curve.Authorized(self.root / "authorized")
        times = {"lease_us": LEASE_US, "margin_us": MARGIN_US, "heartbeat_us": HEARTBEAT_US}
        return ZmqWorld(bind, self.keys, allowed, Bodies(seconds), **times, **named)  # type: ignore[arg-type]

    def options(self, endpoint: str, keys: curve.KeyPair | None = None, node: str = "node-0") -> AgentOptions:
        pair = keys or curve.load(self.root / "node-0.key")
        return AgentOptions(endpoint, node, pair, self.keys.public, self.root / f"{node}.state", device_poll_s=0.1)

    @contextmanager
    def agent(
        self, options: AgentOptions, devices: FakeDevices | None = None
    ) -> Iterator[tuple[NodeAgent, FakePodHost]]:
        host = FakePodHost()
        agent = NodeAgent(options, devices or FakeDevices(), host)
        thread = threading.Thread(target=agent.run)
        thread.start()
        try:
            yield agent, host
        finally:
            agent.leave()
            agent.leave_now()
            thread.join(timeout=20)
            assert not thread.is_alive()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def until(world: ZmqWorld, met: Callable[[e.Event], bool], timeout_s: float = 20.0) -> list[e.Event]:
    """Drive the world until an event comes; return all events up to it."""
    seen: list[e.Event] = []
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        for event in world.take():
            seen.append(event)
            if met(event):
                world.wait(0)
                return seen
        world.wait(world.now() + SECOND // 20)
    raise AssertionError(f"it did not come within {timeout_s} s; there were {seen}")


def of(kind: type) -> Callable[[e.Event], bool]:
    return lambda event: isinstance(event, kind)


def test_a_key_that_is_not_authorized_gets_no_connection(site: Site) -> None:
    with site.world() as world:
        stranger = replace(site.options(world.endpoint, curve.generate()), state_dir=site.root / "stranger")
        with site.agent(stranger), site.agent(site.options(world.endpoint)):
            joined = until(world, of(e.NodeJoined))
            assert len(joined) == 1
            assert [status.name for status in world.nodes()] == ["node-0"]
            assert world.refused_connections > 0


def test_an_authorized_key_may_not_speak_for_another_node(site: Site) -> None:
    other = site.authorize("node-1")
    with site.world() as world, site.agent(site.options(world.endpoint, other)) as (agent, _):
        poll_until(lambda: "may not speak" in agent.machine.refusal)
        assert world.nodes() == ()


def test_a_node_is_let_in_as_soon_as_its_key_is_added(site: Site) -> None:
    late = curve.generate()
    with site.world() as world, site.agent(site.options(world.endpoint, late, "late")):
        poll_until(lambda: world.refused_connections > 0)
        curve.authorize(site.root / "authorized", "late", late.public)
        (joined,) = [event for event in until(world, of(e.NodeJoined)) if isinstance(event, e.NodeJoined)]
        assert joined.node.name == "late"


def test_a_node_whose_key_is_taken_away_is_lost_and_stays_out(site: Site) -> None:
    with site.world() as world, site.agent(site.options(world.endpoint)) as (agent, _):
        until(world, of(e.NodeJoined))
        (site.root / "authorized" / "node-0.pub").unlink()
        until(world, of(e.NodeLost))
        poll_until(lambda: "may not speak" in agent.machine.refusal)


def test_garbage_from_an_authenticated_peer_is_answered_and_hurts_nobody(site: Site) -> None:
    pair = curve.load(site.root / "node-0.key")
    with site.world() as world:
        with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
            peer.linger = 0
            peer.curve_publickey, peer.curve_secretkey = pair.public.encode(), pair.secret.encode()
            peer.curve_serverkey = site.keys.public.encode()
            peer.connect(world.endpoint)
            for data in (b"\xff\x00garbage", b"", b"\x91" * 3000, b"\x92\x63\x01", next(wire.encode(m.Fence(1, 1, 1)))):
                peer.send(data)
            peer.send_multipart([next(wire.encode(m.Heartbeat(5, 1, 0, 0))), b"tail"])
            replies = [receive(peer) for _ in range(6)]
        assert sum(isinstance(reply, m.Nack) for reply in replies) == 5
        assert m.Rejoin(5, 1) in replies
        assert world.refused_messages == 6
        with site.agent(site.options(world.endpoint)):
            until(world, of(e.NodeJoined))


def receive(peer: zmq.Socket[bytes]) -> m.Message:
    assert peer.poll(10_000), "no answer came"
    return wire.decode(peer.recv())


def poll_until(met: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    wait = threading.Event()
    while not met():
        assert time.monotonic() < end, f"it did not happen within {timeout_s} s"
        wait.wait(0.01)


def test_a_restarted_scheduler_finds_its_pods_running_and_gets_their_results(site: Site) -> None:
    world = site.world(seconds=1.0)
    endpoint = world.endpoint
    with site.agent(site.options(endpoint)) as (_, host):
        until(world, of(e.NodeJoined))
        world.perform(CREATE)
        until(world, of(e.PodStarted))
        world.perform(START)
        until(world, of(e.TaskStarted))
        before = world.now()
        world.close()
        again = Outstanding(("node-0",), (CREATE,), frozenset({1}), (START,))
        with site.world(endpoint, epoch=2, not_before=before, restore=again) as world:
            assert world.now() >= before
            seen = until(world, of(e.TaskFinished))
            joined = [event for event in seen if isinstance(event, e.NodeJoined)]
            assert [event.pods for event in joined] == [(1,)]
            assert host.created == [1]
            assert host.started == [("r", 1)]


def test_a_result_outlives_a_scheduler_that_is_down_and_an_agent_that_is_killed(site: Site) -> None:
    world = site.world(seconds=0.5)
    agent = AgentProcess(site.root, world.endpoint, site.keys.public, "node-0", 1, "fake")
    try:
        until(world, of(e.NodeJoined))
        world.perform(CREATE)
        until(world, of(e.PodStarted))
        world.perform(START)
        until(world, of(e.TaskStarted))
        endpoint = world.endpoint
        world.close()
        poll_until(lambda: (site.root / "node-0.state" / "spool").stat().st_size > 0)
        agent.kill()
        again = Outstanding(("node-0",), (CREATE,), frozenset({1}), (START,))
        with site.world(endpoint, epoch=2, restore=again) as world:
            agent.start()
            seen = until(world, of(e.NodeJoined))
            kinds = [type(event) for event in seen]
            assert kinds == [e.TaskFinished, e.NodeJoined]
            assert seen[-1].pods == ()  # type: ignore[union-attr]
            agent.close()
    finally:
        agent.close()


def test_a_frozen_agent_is_given_up_and_kills_its_pods_when_it_wakes() -> None:
    rig = make_zmq_rig(kind="fake")
    try:
        rig.submit("r", 60.0)
        rig.pump(lambda: rig.last("r") is TaskState.RUNNING)
        agent = rig.agents["node-0"]
        agent.tell(signal.SIGSTOP)
        rig.pump(lambda: any(isinstance(event, e.NodeLost) for event in rig.events))
        agent.tell(signal.SIGCONT)
        rig.pump(lambda: sum(isinstance(event, e.NodeJoined) for event in rig.events) == 2)
        assert [event.pods for event in rig.events if isinstance(event, e.NodeJoined)][-1] == ()
        log = (Path(rig.home.name) / "node-0.log").read_text()
        assert "killing every Pod" in log
    finally:
        rig.close()


def test_gpus_that_come_and_go_are_reported(site: Site) -> None:
    devices = FakeDevices(1)
    with site.world() as world, site.agent(site.options(world.endpoint), devices):
        until(world, of(e.NodeJoined))
        devices.gpus = (*devices.gpus, GpuSpec("cpu-new", "cpu", 1))
        until(world, lambda event: isinstance(event, e.NodeReported) and len(event.gpus) == 2)
        devices.gpus = devices.gpus[:1]
        until(world, lambda event: isinstance(event, e.NodeReported) and len(event.gpus) == 1)


def test_an_agent_that_is_told_to_leave_finishes_what_runs(site: Site) -> None:
    with site.world(seconds=0.5) as world, site.agent(site.options(world.endpoint)) as (agent, _):
        until(world, of(e.NodeJoined))
        world.perform(CREATE)
        until(world, of(e.PodStarted))
        world.perform(START)
        until(world, of(e.TaskStarted))
        agent.leave()
        kinds = [type(event) for event in until(world, of(e.NodeLost))]
        assert kinds.index(e.NodeDrainRequested) < kinds.index(e.TaskFinished) < kinds.index(e.PodStopped)


def test_parameters_that_do_not_fit_into_a_message_fail_the_attempt_with_the_remedy(site: Site) -> None:
    class Large(Bodies):
        def task(self, command: c.StartTask) -> dict[str, object]:
            return {"prompt": "x" * 100_000}

    allowed = curve.Authorized(site.root / "authorized")
    with ZmqWorld("tcp://127.0.0.1:*", site.keys, allowed, Large()) as world, site.agent(site.options(world.endpoint)):
        until(world, of(e.NodeJoined))
        world.perform(CREATE)
        until(world, of(e.PodStarted))
        world.perform(START)
        failed = until(world, of(e.TaskFailed))[-1]
        assert isinstance(failed, e.TaskFailed)
        assert "file store" in failed.detail


def test_an_event_posted_from_another_thread_ends_the_waiting(site: Site) -> None:
    with site.world() as world:
        world.take()
        threading.Timer(0.05, world.post, (e.TaskCancelRequested("r"),)).start()
        world.wait(world.now() + 20 * SECOND)
        assert world.take() == [e.TaskCancelRequested("r")]


def test_a_port_that_is_taken_is_refused_with_the_remedy(site: Site) -> None:
    with site.world() as world, pytest.raises(OSError, match="free port"):
        site.world(world.endpoint)


def test_two_agents_cannot_share_a_state_directory(site: Site) -> None:
    with site.world() as world:
        (site.root / "node-0.state").mkdir()
        options = site.options(world.endpoint)
        with (options.state_dir / "lock").open("w") as held:
            import fcntl

            fcntl.flock(held, fcntl.LOCK_EX)
            with pytest.raises(RuntimeError, match="another agent"):
                run_agent(options, FakeDevices(), FakePodHost())
