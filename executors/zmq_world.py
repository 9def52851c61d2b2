"""The real world: the scheduler's end of the executor protocol on a ZeroMQ ROUTER, behind the engine's `World` port.

One thread owns the sockets and does all reading and writing, heartbeats included, so that a long step of the engine never looks
like a dead scheduler. The thread that drives the engine meets it at one lock around the sans-IO `Controller`.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType

import zmq
from zmq.utils import z85

from engine import commands as c
from engine.events import Event
from engine.protocol import messages as m
from engine.protocol.controller import (
    HEARTBEAT_US,
    LEASE_US,
    MARGIN_US,
    Controller,
    NodeStatus,
    Outstanding,
    PayloadRefused,
    Payloads,
    TermPayloads,
)
from engine.tasks import FailureCause, Micros
from executors import wire
from executors.curve import Authorized, KeyPair

log = logging.getLogger(__name__)

_READ_AT_ONCE = 512
_PEERS_KEPT = 8192
_IDLE_MS = 200
_RECHECK_US = 1_000_000
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_DOMAIN = b"aigc"


class SteadyClock:
    """Microseconds since the epoch that never go back: the wall clock is read once, then the monotonic one counts."""

    def __init__(self, not_before: Micros = 0) -> None:
        self._base = max(time.time_ns() // 1000, not_before) - time.monotonic_ns() // 1000

    def now(self) -> Micros:
        """Return the time."""
        return self._base + time.monotonic_ns() // 1000


class _CheckedPayloads:
    """Payloads whose bodies are known to fit into a message."""

    def __init__(self, inner: Payloads) -> None:
        self._inner = inner
        self._terms = inner if isinstance(inner, TermPayloads) else None

    def pod(self, command: c.CreatePod) -> dict[str, object]:
        body = self._inner.pod(command)
        return self._checked(body, m.CreatePod(command.pod, command.method, body), f"the model of pod {command.pod}")

    def task(self, command: c.StartTask) -> dict[str, object]:
        body = self._inner.task(command)
        key = (command.req_no, command.attempt, command.rank)
        order = m.Dispatch(*key, command.pod, body, command.checkpoint, self.terms(command))
        return self._checked(body, order, f"the parameters of task {command.req_no}")

    def terms(self, command: c.StartTask) -> dict[str, object]:
        return self._terms.terms(command) if self._terms is not None else {}

    def prefetch(self, command: c.PrefetchModel) -> dict[str, object]:
        body = self._inner.prefetch(command)
        return self._checked(body, m.Prefetch(body), f"the model {command.model}")

    def _checked(self, body: dict[str, object], order: m.Order, what: str) -> dict[str, object]:
        try:
            wire.encode_item(order)
        except wire.WireError as error:
            raise PayloadRefused(FailureCause.BAD_INPUT, f"{what} cannot be sent: {error}") from error
        return body


class ZmqWorld:
    """Real executors as a `World`. Binds at once; `port` tells where. Use as a context manager, or call `close`.

    `allowed` decides which node the holder of a public key may speak for. `epoch` must grow with every start of the scheduler, and
    `not_before` is the last time in its journal. `restore` hands over what a recovered engine believes to be under way; call it
    before the first `take`. Everything but `post`, `nodes` and `close` belongs to the one thread that drives the engine.
    """

    def __init__(
        self,
        bind: str,
        keys: KeyPair,
        allowed: Authorized,
        payloads: Payloads,
        *,
        epoch: int = 1,
        not_before: Micros = 0,
        restore: Outstanding | None = None,
        lease_us: Micros = LEASE_US,
        margin_us: Micros = MARGIN_US,
        heartbeat_us: Micros = HEARTBEAT_US,
        on_advice: Callable[[c.Notify | c.ScaleNodes], None] | None = None,
    ) -> None:
        self.clock = SteadyClock(not_before)
        self.refused_messages = 0
        """Frames that were no messages, and HELLOs for a node that the key may not speak for."""
        self.refused_connections = 0
        self._controller = Controller(
            epoch, _CheckedPayloads(payloads), lease_us=lease_us, margin_us=margin_us, heartbeat_us=heartbeat_us
        )
        if restore is not None:
            self._controller.restore(self.clock.now(), restore)
        self._allowed = allowed
        self._on_advice = on_advice
        self._lock = threading.Lock()
        self._bell = threading.Event()
        self._posted: deque[Event] = deque()
        self._undurable = False
        self._unsent = False
        self._closing = False
        self._failure: BaseException | None = None
        self._speakers: dict[bytes, str] = {}
        """Connections that spoke for a node, and the keys they were let in with."""
        self._recheck_at: Micros = 0
        self._context = zmq.Context()
        self._zap = self._context.socket(zmq.REP)
        self._zap.linger = 0
        self._zap.bind(_ZAP_ENDPOINT)
        self._router = self._open_router(bind, keys)
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self.endpoint: str = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._thread = threading.Thread(target=self._serve, name="executor-io", daemon=True)
        self._thread.start()

    # --- the World port -------------------------------------------------------------------------------------------------

    def now(self) -> Micros:
        """Return the time in microseconds since the epoch, never less than before."""
        return self.clock.now()

    def take(self) -> Sequence[Event]:
        """Return the events since the last call. Those of the last call are taken to be in the journal by now."""
        self._check()
        self._bell.clear()
        events: list[Event] = []
        while self._posted:
            events.append(self._posted.popleft())
        with self._lock:
            self._settle()
            events.extend(self._controller.take_events())
            self._undurable = True
            self._unsent = self._unsent or self._controller.has_outgoing()
        self._flush()
        return events

    def perform(self, command: c.Command) -> None:
        """Begin to carry out a command; the events that led to it are taken to be in the journal."""
        if isinstance(command, c.Notify | c.ScaleNodes):
            if self._on_advice is not None:
                self._on_advice(command)
            return
        with self._lock:
            self._settle()
            self._controller.perform(self.clock.now(), command)
            self._unsent = self._unsent or self._controller.has_outgoing()
            if self._controller.has_events():
                self._bell.set()

    def wait(self, until: Micros | None) -> None:
        """Return at `until`, or as soon as `take` has something. None: only an event ends the waiting."""
        if self._undurable:
            with self._lock:
                self._settle()
        self._flush()
        if until is None:
            self._bell.wait()
        else:
            self._bell.wait(max(0, until - self.clock.now()) / 1_000_000)
        self._check()

    # --- from any thread ------------------------------------------------------------------------------------------------

    def post(self, event: Event) -> None:
        """Hand in an event from outside (a submission, a cancel, an operator's order) and wake the driving thread."""
        self._posted.append(event)
        if not self._bell.is_set():
            self._bell.set()

    def wake(self) -> None:
        """End a `wait` early."""
        self._bell.set()

    def nodes(self) -> tuple[NodeStatus, ...]:
        """Return every node seen, for monitoring."""
        with self._lock:
            return self._controller.statuses()

    def close(self) -> None:
        """Send what is ready, stop the thread and close the sockets. Nodes keep their Pods until their lease runs out."""
        if self._closing:
            return
        self._closing = True
        self._signal()
        self._thread.join(timeout=5)
        self._context.destroy(linger=0)
        self._wake_in.close()
        self._wake_out.close()
        self._bell.set()

    def __enter__(self) -> ZmqWorld:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- the driving thread's side --------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Acknowledge what the last `take` handed out: the driver journals before it performs or takes again."""
        if self._undurable:
            self._undurable = False
            self._controller.durable()
            self._unsent = self._unsent or self._controller.has_outgoing()

    def _flush(self) -> None:
        if self._unsent:
            self._unsent = False
            self._signal()

    def _signal(self) -> None:
        try:
            self._wake_in.send(b"\0")
        except (BlockingIOError, OSError):
            pass

    def _check(self) -> None:
        if self._failure is not None:
            raise RuntimeError("the executor I/O thread failed; nothing reaches the nodes any more") from self._failure
        if self._closing:
            raise RuntimeError("the world is closed")

    # --- the I/O thread ---------------------------------------------------------------------------------------------------

    def _open_router(self, bind: str, keys: KeyPair) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        router.linger = 0
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.SNDHWM, 10_000)
        router.setsockopt(zmq.RCVHWM, 10_000)
        router.setsockopt(zmq.MAXMSGSIZE, wire.MAX_BYTES)
        router.setsockopt(zmq.HEARTBEAT_IVL, 2_000)
        router.setsockopt(zmq.HEARTBEAT_TIMEOUT, 8_000)
        router.setsockopt(zmq.HANDSHAKE_IVL, 5_000)
        router.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        router.curve_server = True
        router.curve_secretkey = keys.secret.encode("ascii")
        router.curve_publickey = keys.public.encode("ascii")
        try:
            router.bind(bind)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise OSError(
                error.errno, f"bind {bind}: {error.strerror}; choose another address or a free port"
            ) from error
        return router

    def _serve(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            log.exception("the executor I/O thread failed")
            self._failure = error
            self._bell.set()

    def _loop(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._zap, zmq.POLLIN)
        poller.register(self._wake_out, zmq.POLLIN)
        while True:
            ready = dict(poller.poll(_IDLE_MS))
            if self._wake_out.fileno() in ready:
                self._clear_wake()
            if self._zap in ready:
                self._answer_zap()
            messages = self._read() if self._router in ready else []
            with self._lock:
                now = self.clock.now()
                for peer, message in messages:
                    self._controller.receive(now, peer, message)
                self._controller.tick(now)
                out = self._controller.take_outgoing(now)
                if self._controller.has_events():
                    self._bell.set()
            for peer, reply in out:
                self._send(peer, reply)
            if now >= self._recheck_at:
                self._recheck_at = now + _RECHECK_US
                self._shut_out()
            if self._closing:
                return

    def _clear_wake(self) -> None:
        try:
            while len(self._wake_out.recv(4096)) == 4096:
                pass
        except BlockingIOError:
            pass

    def _read(self) -> list[tuple[str, m.FromNode]]:
        messages: list[tuple[str, m.FromNode]] = []
        for _ in range(_READ_AT_ONCE):
            try:
                frame = self._router.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            routing_id = frame.bytes
            parts = self._router.recv_multipart(zmq.NOBLOCK, copy=False) if frame.more else []
            for part in parts:
                message = self._decode(routing_id, part)
                if message is not None:
                    messages.append((routing_id.hex(), message))
        return messages

    def _decode(self, routing_id: bytes, part: zmq.Frame) -> m.FromNode | None:
        try:
            message = wire.decode(part.bytes)
        except wire.WireError as error:
            self.refused_messages += 1
            self._send(
                routing_id.hex(),
                m.Nack(0, error.tag, m.NackReason.UNKNOWN if error.tag else m.NackReason.MALFORMED, str(error)[:200]),
            )
            return None
        if isinstance(message, m.Hello) and not self._may_speak(routing_id, part, message):
            return None
        if isinstance(message, m.Welcome | m.HeartbeatAck | m.Orders | m.DoneAck | m.Rejoin | m.Fence):
            self.refused_messages += 1
            return None
        return message

    def _may_speak(self, routing_id: bytes, part: zmq.Frame, hello: m.Hello) -> bool:
        """Bind the connection to the node whose key it was authenticated with."""
        key = str(part.get("User-Id"))
        if self._allowed.node_of(key) == hello.node.name:
            self._speakers.pop(routing_id, None)
            self._speakers[routing_id] = key
            if len(self._speakers) > _PEERS_KEPT:
                del self._speakers[next(iter(self._speakers))]
            return True
        self.refused_messages += 1
        log.warning("a HELLO for node %s came with a key that may not speak for it", hello.node.name)
        detail = f"this key may not speak for node {hello.node.name}; add its public key as {hello.node.name}.pub"
        self._send(routing_id.hex(), m.Nack(0, hello.n, m.NackReason.MALFORMED, detail))
        return False

    def _shut_out(self) -> None:
        """Cut off the nodes whose key was taken away; their lease runs out on both sides."""
        for routing_id, key in list(self._speakers.items()):
            if self._allowed.node_of(key) is None:
                del self._speakers[routing_id]
                with self._lock:
                    self._controller.peer_gone(routing_id.hex())

    def _send(self, peer: str, message: m.FromScheduler) -> None:
        routing_id = bytes.fromhex(peer)
        try:
            for data in wire.encode(message):
                self._router.send_multipart((routing_id, data), zmq.NOBLOCK)
        except zmq.Again:
            pass  # The peer's queue is full; what matters is sent again.
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._speakers.pop(routing_id, None)
            with self._lock:
                self._controller.peer_gone(peer)

    def _answer_zap(self) -> None:
        """Let in the connections whose key is in the directory (ZeroMQ's authentication protocol, RFC 27)."""
        while True:
            try:
                request = self._zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            version, request_id, domain, _address, _identity, mechanism = request[:6]
            user = b""
            if domain == _DOMAIN and mechanism == b"CURVE" and len(request) == 7 and len(request[6]) == 32:
                key = z85.encode(request[6])
                if self._allowed.node_of(key.decode("ascii")) is not None:
                    user = key
            self.refused_connections += not user
            # 300 closes the connection without a word, and the agent tries again: its key may be added at any time. After a 400 it
            # would give up for good.
            status = (b"200", b"OK") if user else (b"300", b"unknown key")
            self._zap.send_multipart((version, request_id, *status, user, b""))
