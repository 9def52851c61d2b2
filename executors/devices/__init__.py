"""DevicePlugins: what GPUs a machine has and how they are used - by NVML, as CPU slots, or from a file for drills.

Every plugin looks again at each call, so that a GPU which was added, taken away or has fallen ill is sensed by the next poll.
Besides the port each has `error`: what keeps it from seeing clearly now, empty when nothing does.
"""

from __future__ import annotations

from pathlib import Path

from executors.devices.cpu import CpuPlugin
from executors.devices.file import FilePlugin
from executors.devices.nvml import NvmlPlugin

__all__ = ["CpuPlugin", "FilePlugin", "NvmlPlugin", "open_plugin"]

Plugin = CpuPlugin | FilePlugin | NvmlPlugin


def open_plugin(text: str = "auto") -> Plugin:
    """Open the plugin that a text names: ``auto``, ``nvml``, ``cpu``, ``cpu:2`` (slots) or ``file:PATH``.

    ``auto`` is NVML where it finds a GPU, CPU slots otherwise. Raises ValueError for any other text, and when the file's first
    inventory is wrong.
    """
    kind, _, rest = text.partition(":")
    match kind:
        case "auto" if not rest:
            nvml = NvmlPlugin()
            return nvml if nvml.devices() else CpuPlugin()
        case "nvml" if not rest:
            return NvmlPlugin()
        case "cpu":
            if rest and not (rest.isdigit() and int(rest) > 0):
                raise ValueError(f"device plugin {text!r}: write the number of slots as in cpu:2")
            return CpuPlugin(int(rest) if rest else 0)
        case "file" if rest:
            return FilePlugin(Path(rest))
        case _:
            raise ValueError(f"device plugin {text!r}: unknown; use auto, nvml, cpu, cpu:2 or file:PATH")
