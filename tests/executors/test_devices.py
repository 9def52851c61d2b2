"""DevicePlugins: GPUs that come, go and fall ill between two polls, seen through a driver that may fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.resources import GpuSpec
from executors.devices import CpuPlugin, FilePlugin, NvmlPlugin, open_plugin
from executors.devices.nvml import REOPEN_PERIOD_S, model_name
from executors.limits import HostResources
from executors.ports import DevicePlugin, DeviceUse

GIB = 1 << 30
HOST = HostResources(cpu_milli=4000, memory_bytes=16 * GIB, disk_bytes=0, network_bps=0)


class NVMLError(Exception):
    """As pynvml names it."""


@dataclass
class FakeNvml:
    """Stands for the module pynvml: fixes its list when initialised, as the real one does."""

    plugged: list[str] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)
    dead: bool = False
    inits: int = 0
    has_events: bool = True
    events: list[tuple[str, int]] = field(default_factory=list)
    registered: list[str] = field(default_factory=list)
    nvmlEventTypeXidCriticalError: int = 8
    _listed: list[str] = field(default_factory=list)
    NVMLError: type[NVMLError] = NVMLError

    def nvmlInit(self) -> None:
        if self.dead:
            raise NVMLError("Driver Not Loaded")
        self.inits += 1
        self._listed = list(self.plugged)

    def nvmlShutdown(self) -> None:
        self._listed = []

    def nvmlDeviceGetCount(self) -> int:
        if self.dead:
            raise NVMLError("Unknown Error")
        return len(self._listed)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return self._alive(self._listed[index])

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return self._alive(uuid)

    def nvmlDeviceGetUUID(self, handle: str) -> bytes:
        return handle.encode()

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "NVIDIA A100-SXM4-80GB"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(total=80 * GIB, used=3 * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        if handle == "GPU-virtual":
            raise NVMLError("Not Supported")
        return SimpleNamespace(gpu=37)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> Any:
        return [SimpleNamespace(pid=42), SimpleNamespace(pid=7)]

    def nvmlEventSetCreate(self) -> str:
        if not self.has_events:
            raise NVMLError("Not Supported")
        return "set"

    def nvmlDeviceRegisterEvents(self, handle: str, kind: int, events: str) -> None:
        assert (kind, events) == (8, "set")
        self.registered.append(handle)

    def nvmlEventSetWait_v2(self, events: str, timeout_ms: int) -> Any:
        assert timeout_ms == 0, "the agent's poll does not wait"
        if not self.events:
            raise NVMLError("Timeout")
        device, xid = self.events.pop(0)
        return SimpleNamespace(device=device, eventData=xid)

    def _alive(self, uuid: str) -> str:
        if self.dead or uuid in self.lost or uuid not in self._listed:
            raise NVMLError("GPU is lost")
        return uuid


@dataclass
class Machine:
    """A fake driver, what the kernel lists, and a clock."""

    nvml: FakeNvml
    now: float = 0.0
    kernel_tells: bool = True

    def plugin(self) -> NvmlPlugin:
        return NvmlPlugin(
            self.nvml, lambda: frozenset(self.nvml.plugged) if self.kernel_tells else frozenset(), lambda: self.now
        )


def _uuids(devices: tuple[GpuSpec, ...]) -> list[str]:
    return [device.uuid for device in devices]


@pytest.fixture
def machine() -> Machine:
    return Machine(FakeNvml(["GPU-a", "GPU-b"]))


def test_nvml_lists_gpus_with_model_and_memory_and_their_use(machine: Machine) -> None:
    plugin: DevicePlugin = machine.plugin()
    assert plugin.devices() == (GpuSpec("GPU-a", "a100", 80 * GIB), GpuSpec("GPU-b", "a100", 80 * GIB))
    assert plugin.use()[0] == DeviceUse("GPU-a", 3 * GIB, 370, (7, 42))


def _healthy(devices: tuple[GpuSpec, ...]) -> list[str]:
    return [device.uuid for device in devices if device.healthy]


@pytest.mark.parametrize("xid", [48, 79, 119])
def test_a_gpu_that_reports_an_error_after_which_it_must_be_reset_is_ill(machine: Machine, xid: int) -> None:
    plugin = machine.plugin()
    assert _healthy(plugin.devices()) == ["GPU-a", "GPU-b"]
    machine.nvml.events.append(("GPU-b", xid))
    assert _healthy(plugin.devices()) == ["GPU-a"]
    assert plugin.error == f"GPU GPU-b: Xid {xid}; reset it or restart the machine"
    machine.now += 10 * REOPEN_PERIOD_S
    assert _healthy(plugin.devices()) == ["GPU-a"], "time mends nothing"
    assert sorted(machine.nvml.registered) == ["GPU-a", "GPU-b"], "each is watched once"


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 68])
def test_the_fault_of_a_program_says_nothing_of_its_gpu(machine: Machine, xid: int) -> None:
    plugin = machine.plugin()
    plugin.devices()
    machine.nvml.events.append(("GPU-b", xid))
    assert _healthy(plugin.devices()) == ["GPU-a", "GPU-b"]


def test_a_broken_gpu_that_was_taken_out_and_put_back_begins_anew(machine: Machine) -> None:
    plugin = machine.plugin()
    plugin.devices()
    machine.nvml.events.append(("GPU-b", 79))
    assert _healthy(plugin.devices()) == ["GPU-a"]
    machine.nvml.plugged.remove("GPU-b")
    assert _uuids(plugin.devices()) == ["GPU-a"]
    machine.nvml.plugged.append("GPU-b")
    assert _healthy(plugin.devices()) == ["GPU-a", "GPU-b"]


def test_a_driver_without_events_is_no_fault(machine: Machine) -> None:
    machine.nvml.has_events = False
    plugin = machine.plugin()
    assert _healthy(plugin.devices()) == ["GPU-a", "GPU-b"]
    assert _healthy(plugin.devices()) == ["GPU-a", "GPU-b"]


def test_a_gpu_that_is_plugged_in_or_out_is_sensed_by_the_next_poll(machine: Machine) -> None:
    plugin = machine.plugin()
    plugin.devices()
    machine.nvml.plugged.append("GPU-c")
    assert _uuids(plugin.devices()) == ["GPU-a", "GPU-b", "GPU-c"]
    machine.nvml.plugged.remove("GPU-a")
    assert _uuids(plugin.devices()) == ["GPU-b", "GPU-c"]


def test_nothing_is_reopened_while_nothing_changes(machine: Machine) -> None:
    plugin = machine.plugin()
    for _ in range(100):
        machine.now += 1
        plugin.devices()
    assert machine.nvml.inits == 1


def test_where_the_kernels_list_is_hidden_nvml_is_reopened_now_and_then(machine: Machine) -> None:
    machine.kernel_tells = False
    plugin = machine.plugin()
    plugin.devices()
    machine.nvml.plugged.append("GPU-c")
    assert _uuids(plugin.devices()) == ["GPU-a", "GPU-b"]
    machine.now += REOPEN_PERIOD_S
    assert _uuids(plugin.devices()) == ["GPU-a", "GPU-b", "GPU-c"]


def test_a_lost_gpu_is_listed_as_ill_and_the_others_as_they_are(machine: Machine) -> None:
    plugin = machine.plugin()
    plugin.devices()
    machine.nvml.lost.add("GPU-a")
    assert [(gpu.uuid, gpu.healthy) for gpu in plugin.devices()] == [("GPU-a", False), ("GPU-b", True)]
    assert "lost" in plugin.error
    assert [use.uuid for use in plugin.use()] == ["GPU-b"]


def test_while_the_driver_fails_the_known_gpus_are_ill_then_they_recover(machine: Machine) -> None:
    plugin = machine.plugin()
    before = plugin.devices()
    machine.nvml.dead = True
    for _ in range(3):
        ill = plugin.devices()
        assert _uuids(ill) == _uuids(before)
        assert not any(gpu.healthy for gpu in ill)
        assert plugin.use() == ()
    assert plugin.error
    machine.nvml.dead = False
    machine.now += REOPEN_PERIOD_S
    assert plugin.devices() == before
    assert plugin.error == ""


def test_a_virtual_gpu_that_tells_no_utilisation_is_listed_all_the_same() -> None:
    plugin = Machine(FakeNvml(["GPU-virtual"])).plugin()
    assert _uuids(plugin.devices()) == ["GPU-virtual"]
    assert plugin.use()[0].busy_permille == 0


def test_no_driver_means_no_gpus_and_a_reason() -> None:
    plugin = Machine(FakeNvml(dead=True)).plugin()
    assert plugin.devices() == ()
    assert "Driver Not Loaded" in plugin.error


def test_a_process_is_shown_just_its_gpus(machine: Machine) -> None:
    plugin = machine.plugin()
    assert plugin.environment(["GPU-b", "GPU-a"])["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-a"
    assert plugin.environment([])["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("Tesla V100-PCIE-16GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
        ("NVIDIA L40S", "l40s"),
        ("Graphics", "graphics"),
        ("", "unknown"),
    ],
)
def test_a_products_name_is_cut_down_to_its_model(product: str, name: str) -> None:
    assert model_name(product) == name


def test_cpu_slots_share_the_hosts_memory_evenly() -> None:
    plugin: DevicePlugin = CpuPlugin(2, HOST)
    assert plugin.devices() == (GpuSpec("cpu-0", "cpu", 8 * GIB), GpuSpec("cpu-1", "cpu", 8 * GIB))
    assert plugin.environment(["cpu-0"])["OMP_NUM_THREADS"] == "1"
    assert plugin.environment(["cpu-0"])["CUDA_VISIBLE_DEVICES"] == ""


def test_uncounted_cpu_slots_are_one_a_core_as_far_as_memory_goes() -> None:
    assert len(CpuPlugin(0, HOST).devices()) == 4
    assert len(CpuPlugin(0, HostResources(64_000, 16 * GIB, 0, 0)).devices()) == 8
    assert len(CpuPlugin(0, HostResources(500, GIB, 0, 0)).devices()) == 1


def test_cpu_use_is_what_passed_since_the_last_call(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 12582912 kB\n")
    (tmp_path / "stat").write_text("cpu 100 0 100 700 100 0 0 0 0 0\n")
    plugin = CpuPlugin(2, HOST, tmp_path)
    assert [use.busy_permille for use in plugin.use()] == [200, 200]
    (tmp_path / "stat").write_text("cpu 190 0 100 710 100 0 0 0 0 0\n")
    assert [(use.busy_permille, use.memory_used_bytes) for use in plugin.use()] == [(900, 2 * GIB)] * 2
    assert [use.busy_permille for use in plugin.use()] == [0, 0]


def _write(path: Path, *gpus: dict[str, Any]) -> None:
    path.write_text(json.dumps({"gpus": gpus}))


A = {"uuid": "gpu-a", "model": "a100", "memory_bytes": 80 * GIB}
B = {"uuid": "gpu-b", "model": "h100", "memory_bytes": 80 * GIB, "memory_used_bytes": 5, "busy_permille": 300}


def test_an_edited_inventory_is_sensed_by_the_next_poll(tmp_path: Path) -> None:
    path = tmp_path / "gpus.json"
    _write(path, A)
    plugin: DevicePlugin = FilePlugin(path)
    assert _uuids(plugin.devices()) == ["gpu-a"]
    _write(path, A, B)
    assert _uuids(plugin.devices()) == ["gpu-a", "gpu-b"]
    assert plugin.use()[1] == DeviceUse("gpu-b", 5, 300)
    _write(path, {**A, "healthy": False})
    assert plugin.devices() == (GpuSpec("gpu-a", "a100", 80 * GIB, healthy=False),)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda path: path.write_text('{"gpus": [{"uu'), "JSON"),
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: _write(path, {**A, "memory_bytes": 0}), "gpus.0.memory_bytes"),
        (lambda path: _write(path, A, A), "listed twice"),
        (lambda path: _write(path, {**A, "colour": "red"}), "gpus.0.colour"),
    ],
)
def test_a_bad_inventory_keeps_the_last_good_one_and_says_why(
    tmp_path: Path, spoil: Callable[[Path], None], problem: str
) -> None:
    path = tmp_path / "gpus.json"
    _write(path, A)
    plugin = FilePlugin(path)
    spoil(path)
    assert _uuids(plugin.devices()) == ["gpu-a"]
    assert problem in plugin.error
    with pytest.raises(ValueError, match="device inventory"):
        FilePlugin(path)
    _write(path, B)
    assert _uuids(plugin.devices()) == ["gpu-b"]
    assert plugin.error == ""


def test_a_plugin_is_opened_by_its_name(tmp_path: Path) -> None:
    _write(tmp_path / "gpus.json", A)
    assert len(open_plugin("cpu:3").devices()) == 3
    assert isinstance(open_plugin("cpu"), CpuPlugin)
    assert isinstance(open_plugin("nvml"), NvmlPlugin)
    assert _uuids(open_plugin(f"file:{tmp_path}/gpus.json").devices()) == ["gpu-a"]
    assert open_plugin("auto").devices()


@pytest.mark.parametrize("text", ["", "gpu", "cpu:0", "cpu:x", "cpu:-1", "file:", "nvml:0", "auto:2"])
def test_an_unknown_plugin_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ValueError, match=r"device plugin"):
        open_plugin(text)
