"""How a part listens and serves HTTP: a taken address is one clear line, and who waits for the part is told when it answers."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn


def listen(host: str, port: int, field: str) -> socket.socket:
    """Return a bound socket; 0 is any free port. Raises OSError naming the configured field."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
    except OSError as error:
        listener.close()
        variable = "AIGC_" + field.upper().replace(".", "__")
        raise OSError(
            error.errno,
            f"{field}: {host}:{port} cannot be listened on ({error.strerror}); "
            f"choose another in the configuration or by {variable}",
        ) from error
    return listener


class _Part(uvicorn.Server):
    """Says when it answers, and ends with exit code 0 when it is told to end."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, then tell."""
        await super().startup(sockets)
        if self._on_ready is not None and not self.should_exit:
            self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals as requests to end; uvicorn itself would die of them afterwards."""
        previous = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, action in previous.items():
                signal.signal(number, action)


def serve(app: Any, listener: socket.socket, *, on_ready: Callable[[], None] | None = None) -> None:
    """Serve an ASGI application until SIGTERM or SIGINT; call in the main thread."""
    config = uvicorn.Config(app, access_log=False, log_config=None, timeout_graceful_shutdown=5, server_header=False)
    _Part(config, on_ready).run(sockets=[listener])
