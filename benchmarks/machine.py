"""Says in one line what a benchmark was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine_line() -> str:
    """Return the processor, its cores, the load of the last minute, and the versions of Python and the system."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    system = f"Python {platform.python_version()}, {platform.system()} {platform.release()}"
    return f"{model}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; {system}"
