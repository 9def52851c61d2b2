"""A program with one Pod, for a test to kill: prints the Pod's PID and its nursery's, then serves for ever."""

from __future__ import annotations

import select
import sys
from pathlib import Path

import psutil

from executors.devices import CpuPlugin
from executors.dfs import open_store
from executors.pods import LocalPodHost
from executors.ports import AttemptFinished, PodOrder


def main(root: Path) -> None:
    """Run a Pod in `root` until killed."""
    sys.path.insert(0, str(Path(__file__).parent))
    store = open_store(f"file://{root}/files")
    host = LocalPodHost(CpuPlugin(1), store, root / "work", methods={"Litter": "drill_methods:Litter"})
    host.create(PodOrder(1, "Litter"))
    host.start(1, "r", 1, {"crash": False})
    [nursery] = psutil.Process().children()
    while True:
        poller = select.poll()
        for descriptor in host.filenos():
            poller.register(descriptor, select.POLLIN)
        poller.poll(50)
        for report in host.take():
            if isinstance(report, AttemptFinished):
                print(nursery.pid, *report.result["metadata"]["pids"], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
