"""A whole platform on one machine: which parts there are, on which ports, with which keys."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from api.elastic import local_fleet
from api.parts import authorize_agent, ensure_operator_key
from api.settings import Settings
from api.state_dir import StateDir
from api.supervisor import Part, Supervisor, command


@dataclass(frozen=True, slots=True)
class AgentPlan:
    """An agent that runs on this machine."""

    name: str
    devices: str


class PortTaken(ValueError):
    """A configured port is in use; the message names the field."""


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def local_platform(
    settings: Settings, agents: Sequence[AgentPlan], say: Callable[[str], None], config: Path | None = None
) -> tuple[Supervisor, Settings]:
    """Prepare the state directory and the parts: scheduler, gateway, agents.

    Ports that are 0 are chosen. Returns the supervisor, not yet started, and the settings with ports filled in. Raises PortTaken.
    """
    gateway, scheduler = settings.gateway, settings.scheduler
    bind = scheduler.bind
    if bind.endswith((":0", ":*")):
        bind = f"{bind.rpartition(':')[0]}:{free_port()}"
    settings = settings.model_copy(
        update={
            "state_dir": settings.state_dir.resolve(),
            "gateway": gateway.model_copy(update={"port": gateway.port or free_port(gateway.host)}),
            "scheduler": scheduler.model_copy(
                update={"internal_port": scheduler.internal_port or free_port(scheduler.internal_host), "bind": bind}
            ),
        }
    )
    for taken in ports_taken(settings):
        raise taken
    state = StateDir(settings.state_dir)
    state.create()
    ensure_operator_key(settings)
    environment = {
        "AIGC_STATE_DIR": str(settings.state_dir),
        "AIGC_GATEWAY__PORT": str(settings.gateway.port),
        "AIGC_SCHEDULER__BIND": bind,
        "AIGC_SCHEDULER__INTERNAL_PORT": str(settings.scheduler.internal_port),
        "PYTHONUNBUFFERED": "1",
    }
    if settings.fleet.nodes_max:
        for field, value in settings.fleet.model_dump().items():
            environment[f"AIGC_FLEET__{field.upper()}"] = str(value)
    if config is not None:
        environment["AIGC_CONFIG"] = str(config.resolve())
    internal = (settings.scheduler.internal_host, settings.scheduler.internal_port)
    parts = [
        Part(
            "scheduler",
            command("scheduler"),
            state.logs / "scheduler.log",
            environment,
            ready=lambda: _listens(*internal),
        ),
        Part(
            "gateway",
            command("gateway"),
            state.logs / "gateway.log",
            environment,
            ready=lambda: _listens(settings.gateway.host, settings.gateway.port),
        ),
    ]
    connect = bind.replace("0.0.0.0", "127.0.0.1").replace("*", "127.0.0.1")  # noqa: S104
    for plan in agents:
        keys = authorize_agent(settings, plan.name, state.agent(plan.name) / "keys")
        arguments = ("--name", plan.name, "--devices", plan.devices, "--connect", connect, "--keys", str(keys))
        parts.append(
            Part(
                plan.name,
                command("agent", *arguments),
                state.logs / f"{plan.name}.log",
                environment,
                ready=partial(_joined, settings, plan.name),
            )
        )
    return Supervisor(parts, say, local_fleet(settings, connect, environment, say)), settings


def ports_taken(settings: Settings) -> Iterator[PortTaken]:
    """Yield an error for each configured address that cannot be listened on."""
    host, _, port = settings.scheduler.bind.removeprefix("tcp://").rpartition(":")
    for field, address in (
        ("gateway.port", (settings.gateway.host, settings.gateway.port)),
        ("scheduler.internal_port", (settings.scheduler.internal_host, settings.scheduler.internal_port)),
        ("scheduler.bind", (host.replace("*", "0.0.0.0"), 0 if port == "*" else int(port))),  # noqa: S104
    ):
        try:
            _check_free(field, *address)
        except PortTaken as error:
            yield error


def _check_free(field: str, host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            variable = "AIGC_" + field.upper().replace(".", "__")
            raise PortTaken(
                f"{field}: {host}:{port} cannot be listened on ({error.strerror}); "
                f"choose another in the configuration or by {variable}"
            ) from None


def _joined(settings: Settings, node: str) -> bool:
    """Tell whether a node has joined, as an operator would see it."""
    import httpx

    key = StateDir(settings.state_dir).operator_key.read_text().strip()
    url = f"http://{settings.gateway.host}:{settings.gateway.port}/v1/nodes"
    try:
        answer = httpx.get(url, headers={"Authorization": f"Bearer {key}"}, timeout=2)
    except httpx.TransportError:
        return False
    if answer.status_code != 200:
        return False
    return any(seen["name"] == node and seen["state"] == "up" for seen in answer.json()["data"])


def _listens(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=0.2):
        return True
    return False
