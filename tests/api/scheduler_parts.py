"""The processes of the kill test: ``scheduler`` and ``agent``, as an installation runs them, on a state directory of the test."""

from __future__ import annotations

import sys
from pathlib import Path

from api.parts import authorize_agent
from api.settings import AgentSection, MethodSection, SchedulerSection, Settings
from api.state_dir import StateDir

NODE = "n1"


def settings_of(root: Path, port: int, slots: int = 8) -> Settings:
    return Settings(
        state_dir=root,
        scheduler=SchedulerSection(
            profile="fifo",
            bind=f"tcp://127.0.0.1:{port}",
            internal_port=0,
            forecaster="online",
            lease_ms=120_000,
            heartbeat_ms=200,
            snapshot_every=100,
        ),
        agent=AgentSection(connect=f"tcp://127.0.0.1:{port}", name=NODE, devices="cpu:2"),
        methods={"sleep": MethodSection(slots=slots)},
    )


def run_scheduler(settings: Settings) -> int:
    from api.sm.process import run_scheduler, scheduler_config

    return run_scheduler(scheduler_config(settings))


def run_agent(settings: Settings) -> None:
    from executors import curve
    from executors.agent import AgentOptions
    from executors.agent import run_agent as serve
    from executors.devices import open_plugin
    from executors.dfs import open_store
    from executors.pods import LocalPodHost

    home = StateDir(settings.state_dir).agent(NODE)
    keys = authorize_agent(settings, NODE, settings.state_dir / "agent-keys")
    plugin = open_plugin(settings.agent.devices)
    host = LocalPodHost(plugin, open_store(settings.files_url()), home / "work", warm=("light",))
    options = AgentOptions(
        connect=settings.agent.connect,
        node=NODE,
        keys=curve.load(keys / "agent.key"),
        scheduler_public_key=(keys / "scheduler.pub").read_text().strip(),
        state_dir=home,
        cpu_milli=64_000,
        memory_bytes=64 << 30,
        die_with_parent=True,
    )
    serve(options, plugin, host)


if __name__ == "__main__":
    part, where, at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if part == "scheduler":
        sys.exit(run_scheduler(settings_of(where, at)))
    run_agent(settings_of(where, at))
