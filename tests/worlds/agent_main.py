"""An agent process for tests: HOME ENDPOINT SCHEDULER_PUBLIC_KEY NODE GPUS KIND. SIGUSR1 kills its Pods as a crash would."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fake_pods import FakeDevices, FakePodHost

from executors import curve, ports
from executors.agent import AgentOptions, run_agent


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    home, endpoint, public, name, gpus, kind = sys.argv[1:]
    root = Path(home)
    state = root / f"{name}.state"
    plugin: ports.DevicePlugin
    host: ports.PodHost
    if kind == "fake":
        plugin, fake = FakeDevices(int(gpus)), FakePodHost()
        host = fake
        signal.signal(signal.SIGUSR1, lambda *_: fake.crash_all())
    else:
        from executors.devices import open_plugin
        from executors.dfs import open_store
        from executors.pod_watch import Patience
        from executors.pods import LocalPodHost

        plugin = open_plugin(f"cpu:{gpus}" if kind == "pods" else f"file:{root / name}.gpus.json")
        local = LocalPodHost(
            plugin,
            open_store((root / "files").as_uri()),
            state / "work",
            cgroups=False,
            warm=("light",),
            methods={"steps": "step_drill:Steps"},
            patience=Patience(floor_s=1.0, factor=4.0),
        )
        host = local
        signal.signal(
            signal.SIGUSR1, lambda *_: [os.kill(pod.pid, signal.SIGKILL) for pod in local._pods.values() if pod.pid]
        )
    run_agent(
        AgentOptions(
            connect=endpoint,
            node=name,
            keys=curve.load(root / f"{name}.key"),
            scheduler_public_key=public,
            state_dir=state,
            device_poll_s=0.2,
            die_with_parent=True,
        ),
        plugin,
        host,
    )


main()
