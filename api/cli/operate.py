"""`aigc up` and the parts it runs, `demo`, `doctor` and `keys`."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from api.cli.options import Config, Json, ReadyJson, StateDir
from api.cli.output import Exit, announce, err, fail, out, print_json, print_rows
from api.settings import FleetSection, Settings, changed, load_settings
from engine.resources import GpuSpec

keys_app = typer.Typer(no_args_is_help=True, help="API keys of customers and operators, CURVE keys of agents.")


def up(
    config: Config = None,
    state_dir: StateDir = None,
    devices: Annotated[str | None, typer.Option(help="auto, nvml, cpu:N or file:PATH.")] = None,
    elastic: Annotated[
        str | None, typer.Option(help="MIN:MAX nodes that come and go with the demand, such as 1:4.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address of the gateway.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the gateway; 0: any free one.")] = None,
    as_json: Json = False,
) -> None:
    """Run the whole platform on this machine until Ctrl-C; it comes back with everything it had accepted.

    Example: `aigc up --devices cpu:2`
    """
    settings = _settings(config, state_dir, devices)
    if elastic is not None:
        settings.fleet = _fleet(settings, elastic, devices)
    settings.gateway = changed(settings.gateway, "gateway", host=host, port=port)
    from api import state_dir as state

    try:
        with state.held(state.StateDir(settings.state_dir).lock("up"), "`aigc up`"):
            _run_until_told(settings, config, as_json)
    except (state.StateDirInUse, ValueError) as error:
        fail(str(error), Exit.USAGE)


def _fleet(settings: Settings, bounds: str, devices: str | None) -> FleetSection:
    """Return the fleet with the bounds of the command line."""
    least, separator, most = bounds.partition(":")
    if not (separator and least.isdecimal() and most.isdecimal() and int(most) > 0 and int(least) <= int(most)):
        fail(f"--elastic: {bounds!r} is no MIN:MAX; use for example 1:4", Exit.USAGE)
    own = devices is not None and devices.startswith("cpu:") and devices[4:].isdecimal()
    gpus = max(1, int(devices[4:])) if devices is not None and own else None
    return changed(settings.fleet, "fleet", nodes_min=int(least), nodes_max=int(most), devices=devices, gpus=gpus)


def _run_until_told(settings: Settings, config: Path | None, as_json: bool) -> None:
    from api.platform import AgentPlan, local_platform
    from api.supervisor import PartFailed

    name = settings.agent.name or socket.gethostname()
    agents = [] if settings.fleet.nodes_max else [AgentPlan(name, settings.agent.devices)]
    supervisor, settings = local_platform(settings, agents, _say, config)

    def leave(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, leave)
    try:
        supervisor.start()
        err.print(f"\n[bold]the gateway listens on {settings.gateway_url()}[/bold]")
        err.print(f"operator key: {settings.state_dir / 'operator.key'}   Ctrl-C stops everything\n")
        if as_json:
            print_json({"url": settings.gateway_url(), "operator_key_file": str(settings.state_dir / "operator.key")})
            sys.stdout.flush()
        supervisor.watch()
    except PartFailed as error:
        supervisor.stop()
        fail(str(error))
    except KeyboardInterrupt:
        supervisor.stop()


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for state and pictures.")] = Path(
        "demo-output"
    ),
    steps: Annotated[int, typer.Option(min=10, max=2000, help="Training steps.")] = 300,
    as_json: Json = False,
) -> None:
    """Train a model from four drawn pictures and generate eight with it, with a cancel and a killed Pod on the way."""
    from api.demo import DemoFailed, run_demo

    try:
        report = run_demo(output, steps)
    except DemoFailed as error:
        fail(str(error))
    if as_json:
        print_json(report)


def gateway(config: Config = None, state_dir: StateDir = None, as_json: ReadyJson = False) -> None:
    """Run the gateway (GW): REST API for customers and operators."""
    from api.parts import run_gateway

    settings = _settings(config, state_dir)

    def ready(url: str) -> None:
        announce("gateway", url=url, scheduler_url=settings.internal_url(), state_dir=settings.state_dir.resolve())

    try:
        run_gateway(settings, on_ready=ready if as_json else None)
    except (ValueError, OSError) as error:
        fail(str(error), Exit.USAGE)


def scheduler(config: Config = None, state_dir: StateDir = None, as_json: ReadyJson = False) -> None:
    """Run the support service (SS) and the scheduler (SM)."""
    from api import state_dir as state
    from api.parts import run_scheduler
    from api.sm.journal import JournalCorrupt

    settings = _settings(config, state_dir)

    def ready(agents: str, url: str) -> None:
        announce("scheduler", agents=agents, internal_url=url, state_dir=settings.state_dir.resolve())

    try:
        with state.held(state.StateDir(settings.state_dir).lock("scheduler"), "a scheduler"):
            code = run_scheduler(settings, on_ready=ready if as_json else None)
    except (state.StateDirInUse, ValueError, OSError) as error:
        fail(str(error), Exit.USAGE)
    except JournalCorrupt as error:
        fail(str(error))
    raise typer.Exit(code)


def agent(
    connect: Annotated[str | None, typer.Option(help="The scheduler's address, such as tcp://10.0.0.1:5570.")] = None,
    name: Annotated[str | None, typer.Option(help="Node name. [default: the host's name]")] = None,
    keys: Annotated[Path | None, typer.Option(help="Directory that `aigc keys agent` made for this node.")] = None,
    devices: Annotated[str | None, typer.Option(help="auto, nvml, cpu:N or file:PATH.")] = None,
    die_with_parent: Annotated[
        bool, typer.Option("--die-with-parent", hidden=True, help="End when the process that started this one does.")
    ] = False,
    config: Config = None,
    state_dir: StateDir = None,
    as_json: ReadyJson = False,
) -> None:
    """Offer this machine's GPUs to a scheduler.

    Example: `aigc agent --connect tcp://scheduler:5570 --name gpu-1 --keys gpu-1.keys`
    """
    settings = _settings(config, state_dir, devices, connect, name)
    node = settings.agent.name or socket.gethostname()
    directory = keys or settings.state_dir / "agents" / node / "keys"
    if not (directory / "agent.key").is_file() or not (directory / "scheduler.pub").is_file():
        fail(
            f"--keys: {directory} holds no agent.key and scheduler.pub; "
            f"run `aigc keys agent {node}` where the scheduler runs and copy the directory here",
            Exit.USAGE,
        )
    from api.parts import run_agent

    def joined(gpus: Sequence[GpuSpec]) -> None:
        announce("agent", node=node, scheduler=settings.agent.connect, gpus=[asdict(gpu) for gpu in gpus])

    try:
        run_agent(settings, directory, die_with_parent=die_with_parent, on_joined=joined if as_json else None)
    except (ValueError, OSError, RuntimeError) as error:
        fail(str(error), Exit.USAGE)


def doctor(config: Config = None, state_dir: StateDir = None, as_json: Json = False) -> None:
    """Check the machine, the configuration and the state directory. Exit code 1 when something has to be mended."""
    from api.doctor import examine

    findings = list(examine(_settings(config, state_dir)))
    if as_json:
        print_json([finding.to_json() for finding in findings])
    else:
        colour = {"ok": "green", "note": "yellow", "fault": "red"}
        for finding in findings:
            shade = colour[finding.verdict]
            out.print(f"[{shade}]{finding.verdict:<5}[/{shade}] {finding.what:<16} {finding.detail}", soft_wrap=True)
    if any(finding.verdict == "fault" for finding in findings):
        raise typer.Exit(int(Exit.FAILED))


@keys_app.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(help="Who the key belongs to.")],
    operator: Annotated[bool, typer.Option(help="May see and do everything.")] = False,
    label: Annotated[str, typer.Option(help="A word to know the key by.")] = "",
    days: Annotated[float | None, typer.Option(help="Life in days; without: until it is revoked.")] = None,
    config: Config = None,
    state_dir: StateDir = None,
    as_json: Json = False,
) -> None:
    """Make an API key; it is shown once and kept only as a keyed hash."""
    store = _keys(config, state_dir)
    try:
        key, record = store.create(
            tenant, "operator" if operator else "user", label=label, ttl_s=None if days is None else days * 86_400
        )
    except ValueError as error:
        fail(str(error), Exit.USAGE)
    finally:
        store.close()
    if as_json:
        print_json({"key": key, "key_id": record.key_id, "tenant": record.tenant, "role": record.role})
    else:
        out.print(key, markup=False, soft_wrap=True)


@keys_app.command("list")
def list_keys(config: Config = None, state_dir: StateDir = None, as_json: Json = False) -> None:
    """List API keys; never the keys themselves."""
    store = _keys(config, state_dir)
    try:
        records = store.list()
    finally:
        store.close()
    rows = [
        {
            "key_id": record.key_id,
            "tenant": record.tenant,
            "role": record.role,
            "label": record.label,
            "created": _day(record.created_at),
            "expires": _day(record.expires_at),
            "revoked": _day(record.revoked_at),
        }
        for record in records
    ]
    print_rows(rows, ("key_id", "tenant", "role", "label", "created", "expires", "revoked"), as_json)


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="The key's id, as listed.")],
    config: Config = None,
    state_dir: StateDir = None,
    as_json: Json = False,
) -> None:
    """Revoke an API key; it stops working at the next request."""
    store = _keys(config, state_dir)
    try:
        record = store.revoke(key_id)
    finally:
        store.close()
    if record is None:
        fail(f"no key {key_id}; `aigc keys list` shows them", Exit.REFUSED)
    if as_json:
        print_json({"key_id": key_id, "revoked": _day(record.revoked_at)})
    else:
        err.print(f"{key_id}: revoked", markup=False)


@keys_app.command("agent")
def agent_keys(
    node: Annotated[str, typer.Argument(help="Name of the node the agent will speak for.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for the keys. [default: NODE.keys]")
    ] = None,
    config: Config = None,
    state_dir: StateDir = None,
    as_json: Json = False,
) -> None:
    """Let an agent join as a node, and write the keys that its machine needs."""
    from api.parts import authorize_agent

    try:
        directory = authorize_agent(_settings(config, state_dir), node, output or Path(f"{node}.keys"))
    except ValueError as error:
        fail(str(error), Exit.USAGE)
    if as_json:
        print_json({"node": node, "keys": str(directory)})
    else:
        out.print(str(directory), markup=False, soft_wrap=True)
        err.print(
            f"copy it to the node's machine and run: aigc agent --name {node} --keys {directory.name} --connect ..."
        )


def _settings(
    config: Path | None,
    state_dir: Path | None,
    devices: str | None = None,
    connect: str | None = None,
    name: str | None = None,
) -> Settings:
    settings = load_settings(config, state_dir=state_dir)
    settings.agent = changed(settings.agent, "agent", devices=devices, connect=connect, name=name)
    return settings


def _keys(config: Path | None, state_dir: Path | None) -> Any:
    from api.parts import open_keys

    return open_keys(_settings(config, state_dir))


def _day(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _say(line: str) -> None:
    err.print(line, markup=False)
