"""NVIDIA GPUs through NVML: which there are, what they hold, who uses them - and what to say while the driver fails.

NVML fixes its list of devices when it is initialised, so a GPU that is plugged in later is seen only after a restart of the
library. The kernel's own list tells when that is worth it; where it is hidden, the library is restarted now and then.
"""

from __future__ import annotations

import importlib
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.resources import GpuSpec
from executors.devices.cpu import NO_GPU_ENVIRONMENT
from executors.devices.xid import XidWatch
from executors.ports import DeviceUse

REOPEN_PERIOD_S = 30.0
"""NVML is opened anew at most this often while it fails or the kernel's list is hidden, and at once when that list changes."""
KERNEL_LIST = Path("/proc/driver/nvidia/gpus")

_VENDOR_WORDS = frozenset({"nvidia", "tesla", "geforce", "quadro"})
_FORM_WORDS = re.compile(r"(sxm\d?|pcie|hbm\d\w?|nvl|\d+gb|\d+g|generation|graphics|laptop|gpu)")


class NvmlPlugin:
    """The NVIDIA GPUs of this machine.

    While the driver fails, the GPUs last seen stay listed as not healthy: their Pods may still run, new ones must not be placed.
    A GPU is gone when a working driver does not list it. One that reported an error after which it must be reset stays ill until
    it has been gone, or until this process ends. MIG slices are not offered. May be asked from several threads.
    """

    def __init__(
        self,
        library: Any = None,
        kernel_list: Callable[[], frozenset[str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`library` is the module `pynvml`, or what stands for it in a test."""
        self._library = library
        self._kernel_list = kernel_list or _kernel_list
        self._clock = clock
        self._opened = False
        self._tried_at: float | None = None
        self._seen_in_kernel: frozenset[str] = frozenset()
        self._known: dict[str, GpuSpec] = {}
        self._xids: XidWatch | None = None
        self._broken: dict[str, int] = {}
        """GPU -> the Xid after which it must be reset."""
        self._lock = threading.Lock()
        self.error = ""

    def devices(self) -> tuple[GpuSpec, ...]:
        """Return the GPUs in the order of the PCI bus, as NVML lists them."""
        with self._lock:
            return self._devices()

    def _devices(self) -> tuple[GpuSpec, ...]:
        if self._library is None:
            try:
                self._library = importlib.import_module("pynvml")
            except ImportError:
                self.error = "nvidia-ml-py is not installed; install aigc-platform[executors]"
                return ()
        if not self._open():
            return self._all_ill()
        try:
            found = [self._describe(index) for index in range(int(self._library.nvmlDeviceGetCount()))]
        except self._library.NVMLError as error:
            self._fail(error)
            return self._all_ill()
        self._known = {gpu.uuid: gpu for gpu in found if gpu is not None}
        return tuple(self._judged())

    def _judged(self) -> list[GpuSpec]:
        """Return the GPUs with those ill that reported a fatal error; one that went away and came back begins anew."""
        if self._xids is not None:
            self._broken.update(self._xids.take())
        self._broken = {uuid: xid for uuid, xid in self._broken.items() if uuid in self._known}
        for uuid, xid in self._broken.items():
            self.error = f"GPU {uuid}: Xid {xid}; reset it or restart the machine"
        return [_ill(gpu) if gpu.uuid in self._broken else gpu for gpu in self._known.values()]

    def use(self) -> tuple[DeviceUse, ...]:
        """Return the use of each GPU that answers."""
        with self._lock:
            return self._use()

    def _use(self) -> tuple[DeviceUse, ...]:
        if not self._opened:
            return ()
        uses: list[DeviceUse] = []
        for uuid in self._known:
            try:
                handle = self._library.nvmlDeviceGetHandleByUUID(uuid)
                memory = self._library.nvmlDeviceGetMemoryInfo(handle)
                busy = int(self._optional("nvmlDeviceGetUtilizationRates", handle, "gpu")) * 10
                processes = sorted(int(process.pid) for process in self._processes(handle))
            except self._library.NVMLError as error:
                self.error = str(error)
                continue
            uses.append(DeviceUse(uuid, int(memory.used), min(1000, busy), tuple(processes)))
        return tuple(uses)

    def environment(self, uuids: Sequence[str]) -> Mapping[str, str]:
        """Return the environment that shows a process just these GPUs; without any it sees none."""
        if not uuids:
            return dict(NO_GPU_ENVIRONMENT)
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(uuids)}

    def close(self) -> None:
        """Close NVML; it is opened again by the next call."""
        with self._lock:
            self._shut()

    def _shut(self) -> None:
        if self._opened:
            self._opened = False
            self._xids = None
            try:
                self._library.nvmlShutdown()
            except self._library.NVMLError:
                pass

    def _open(self) -> bool:
        """Have NVML open, anew when the kernel's list has changed; False while it does not open."""
        in_kernel = self._kernel_list()
        changed = in_kernel != self._seen_in_kernel
        now = self._clock()
        recent = self._tried_at is not None and now - self._tried_at < REOPEN_PERIOD_S
        if not changed and (recent or (self._opened and in_kernel)):
            return self._opened
        self._shut()
        self._seen_in_kernel = in_kernel
        self._tried_at = now
        try:
            self._library.nvmlInit()
        except (self._library.NVMLError, OSError) as error:
            self.error = f"NVML does not open: {error}"
            return False
        self._opened = True
        self._xids = XidWatch(self._library)
        self.error = ""
        return True

    def _fail(self, error: Exception) -> None:
        self._shut()
        self._tried_at = self._clock()
        self.error = f"NVML fails: {error}"

    def _all_ill(self) -> tuple[GpuSpec, ...]:
        return tuple(_ill(gpu) for gpu in self._known.values())

    def _describe(self, index: int) -> GpuSpec | None:
        """Describe one GPU; one that fails alone is listed as ill if it was known, by its place in the list."""
        try:
            handle = self._library.nvmlDeviceGetHandleByIndex(index)
            uuid = _text(self._library.nvmlDeviceGetUUID(handle))
            name = _text(self._library.nvmlDeviceGetName(handle))
            memory = self._library.nvmlDeviceGetMemoryInfo(handle)
        except self._library.NVMLError as error:
            self.error = f"GPU {index}: {error}"
            known = list(self._known.values())
            return _ill(known[index]) if index < len(known) else None
        if self._xids is not None:
            self._xids.watch(uuid, handle)
        return GpuSpec(uuid, model_name(name), int(memory.total))

    def _optional(self, call: str, handle: Any, attribute: str) -> Any:
        """Return what not every GPU tells (virtual ones do not), 0 then."""
        try:
            return getattr(getattr(self._library, call)(handle), attribute)
        except self._library.NVMLError:
            return 0

    def _processes(self, handle: Any) -> Sequence[Any]:
        try:
            found: Sequence[Any] = self._library.nvmlDeviceGetComputeRunningProcesses(handle)
        except self._library.NVMLError:
            return ()
        return found


def model_name(product: str) -> str:
    """Return the short name that prices and predictions key on: ``NVIDIA A100-SXM4-80GB`` is ``a100``."""
    words = [word for word in re.split(r"[^a-z0-9]+", product.lower()) if word]
    telling = [word for word in words if word not in _VENDOR_WORDS and not _FORM_WORDS.fullmatch(word)]
    return "".join(telling) or "-".join(words) or "unknown"


def _kernel_list() -> frozenset[str]:
    try:
        return frozenset(path.name for path in KERNEL_LIST.iterdir())
    except OSError:
        return frozenset()


def _ill(gpu: GpuSpec) -> GpuSpec:
    return GpuSpec(gpu.uuid, gpu.model, gpu.memory_bytes, healthy=False)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
