"""How the agent and a Pod talk: length-prefixed JSON over a socket pair, never blocking on the agent's side."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

MAX_MESSAGE_BYTES = 8 << 20
_PREFIX_BYTES = 4


def encode(message: Mapping[str, Any]) -> bytes:
    """Return a message as bytes: its length in four bytes, then its JSON; raises ValueError when it is too long."""
    body = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
    if len(body) > MAX_MESSAGE_BYTES:
        raise ValueError(
            f"message {message.get('op')!r}: {len(body)} bytes, more than {MAX_MESSAGE_BYTES}; put large data into the file store"
        )
    return len(body).to_bytes(_PREFIX_BYTES, "big") + body


class Frames:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> list[dict[str, Any]]:
        """Return the messages that a chunk completes; raises ValueError when the stream is none of ours."""
        self._buffer += chunk
        messages: list[dict[str, Any]] = []
        while len(self._buffer) >= _PREFIX_BYTES:
            length = int.from_bytes(self._buffer[:_PREFIX_BYTES], "big")
            if length > MAX_MESSAGE_BYTES:
                raise ValueError(f"a Pod's message claims {length} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
            if len(self._buffer) < _PREFIX_BYTES + length:
                break
            message = json.loads(self._buffer[_PREFIX_BYTES : _PREFIX_BYTES + length])
            del self._buffer[: _PREFIX_BYTES + length]
            if not isinstance(message, dict):
                raise ValueError("a Pod's message is no JSON object")
            messages.append(message)
        return messages


class Channel:
    """The agent's end: `send` queues what the socket does not take at once, `receive` returns what is there."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._frames = Frames()
        self._unsent = bytearray()
        self.closed = False
        """The other end is gone, or talked nonsense."""

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._end.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message, now or by a later `flush`."""
        self._unsent += encode(message)
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        while self._unsent and not self.closed:
            try:
                sent = self._end.send(self._unsent)
            except BlockingIOError:
                return
            except OSError:
                # Gone; what it said before is still to be read, so `receive` decides when the channel is closed.
                self._unsent.clear()
                return
            del self._unsent[:sent]

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have come."""
        messages: list[dict[str, Any]] = []
        while not self.closed:
            try:
                chunk = self._end.recv(1 << 16)
                if not chunk:
                    self.closed = True
                messages += self._frames.feed(chunk)
            except BlockingIOError:
                break
            except (OSError, ValueError):
                self.closed = True
        return messages

    def close(self) -> None:
        """Close this end."""
        self.closed = True
        self._end.close()
