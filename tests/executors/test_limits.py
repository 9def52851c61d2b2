"""Limits: what is written into which cgroup file, and what a machine is found to offer; fake trees show every kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from executors.limits import Cgroup, Limiter, PodLimits, ProcessLimits, host_resources, open_limiter

MIB = 1 << 20


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def _version_1(tmp_path: Path) -> tuple[Path, Path]:
    root = _tree(
        tmp_path / "cgroup", {f"{controller}/app/cgroup.procs": "" for controller in ("memory", "cpu", "pids")}
    )
    membership = tmp_path / "membership"
    membership.write_text("9:name=systemd:/\n4:memory:/app\n3:cpu,cpuacct:/app\n2:pids:/app\n0::/\n")
    return root, membership


def test_version_1_limits_go_into_a_directory_per_controller(tmp_path: Path) -> None:
    root, membership = _version_1(tmp_path)
    limiter = open_limiter("aigc-x", root, membership)
    assert (limiter.version, limiter.notes) == (1, ())
    box = limiter.make("7", PodLimits(memory_bytes=100 * MIB, cpu_milli=1500, pids=50))
    memory, cpu, pids = (root / controller / "app" / "aigc-x" / "7" for controller in ("memory", "cpu", "pids"))
    assert (memory / "memory.limit_in_bytes").read_text() == str(100 * MIB)
    assert (cpu / "cpu.cfs_quota_us").read_text() == "150000"
    assert (pids / "pids.max").read_text() == "50"
    assert box.join_files == tuple(str(path / "cgroup.procs") for path in (memory, cpu, pids))
    assert box.data_bytes == 0
    assert box.out_of_memory_kills() == 0
    (memory / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert box.out_of_memory_kills() == 2


def test_version_2_limits_go_into_one_directory_and_the_agent_steps_aside(tmp_path: Path) -> None:
    files = {
        "cgroup.controllers": "cpu memory pids",
        "own/cgroup.procs": f"{os.getpid()}\n",
        "own/cgroup.subtree_control": "",
    }
    root = _tree(tmp_path / "cgroup", files)
    (tmp_path / "membership").write_text("0::/own\n")
    limiter = open_limiter("aigc-x", root, tmp_path / "membership")
    assert limiter.version == 2
    assert (root / "own/agent/cgroup.procs").read_text() == str(os.getpid())
    assert (root / "own/cgroup.subtree_control").read_text() == "+memory +cpu +pids"
    box = limiter.make("7", PodLimits(memory_bytes=100 * MIB, cpu_milli=500))
    pod = root / "own/aigc-x/7"
    assert (pod / "memory.max").read_text() == str(100 * MIB)
    assert (pod / "memory.oom.group").read_text() == "1"
    assert (pod / "cpu.max").read_text() == "50000 100000"
    assert box.join_files == (str(pod / "cgroup.procs"),)
    (pod / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
    assert box.out_of_memory_kills() == 1


def test_version_2_moves_nobody_else_out_of_the_way(tmp_path: Path) -> None:
    files = {
        "cgroup.controllers": "cpu memory pids",
        "own/cgroup.procs": f"1\n{os.getpid()}\n",
        "own/cgroup.subtree_control": "",
    }
    root = _tree(tmp_path / "cgroup", files)
    (tmp_path / "membership").write_text("0::/own\n")
    limiter = open_limiter("aigc-x", root, tmp_path / "membership")
    assert limiter.parents == {}
    assert "Delegate=yes" in limiter.notes[0]
    assert limiter.make("7", PodLimits(memory_bytes=100)) == ProcessLimits(data_bytes=100)


def test_no_limit_is_written_where_none_is_asked_for(tmp_path: Path) -> None:
    root, membership = _version_1(tmp_path)
    open_limiter("aigc-x", root, membership).make("7", PodLimits(pids=0))
    assert list(root.rglob("7/*")) == []
    assert len(list(root.rglob("7"))) == 3


def test_a_closed_controller_is_noted_and_the_process_limited_instead(tmp_path: Path) -> None:
    root, membership = _version_1(tmp_path)
    (root / "memory" / "app" / "cgroup.procs").unlink()
    (root / "memory" / "app").rmdir()
    limiter = open_limiter("aigc-x", root, membership)
    assert set(limiter.parents) == {"cpu", "pids"}
    assert any("RLIMIT_DATA" in note for note in limiter.notes)
    box = limiter.make("7", PodLimits(memory_bytes=100 * MIB))
    assert box.data_bytes == 100 * MIB
    assert len(box.join_files) == 2


def test_what_an_earlier_run_left_is_swept_away(tmp_path: Path) -> None:
    root, membership = _version_1(tmp_path)
    limiter = open_limiter("aigc-x", root, membership)
    for parent in limiter.parents.values():
        (parent / "old").mkdir()
    limiter.sweep()
    assert list(root.rglob("old")) == []
    limiter.close()
    assert list(root.rglob("aigc-x")) == []


def test_a_real_cgroup_is_made_joined_counted_and_removed() -> None:
    limiter = open_limiter(f"aigc-test-{os.getpid()}")
    if not limiter.parents:
        pytest.skip(f"no cgroup may be made here: {limiter.notes}")
    try:
        box = limiter.make("1", PodLimits(memory_bytes=64 * MIB, cpu_milli=1000))
        assert isinstance(box, Cgroup)
        program = (
            "import os, sys\n"
            "for path in sys.argv[1:]: open(path, 'w').write(str(os.getpid()))\n"
            "print('in', flush=True)\n"
            "sys.stdin.read()\n"
        )
        command = [sys.executable, "-c", program, *box.join_files]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "in\n"
            assert box.remove() is False, "a process still lives there"
            box.kill()
            assert child.wait() == -9
        assert box.out_of_memory_kills() == 0
        assert box.remove() is True
        assert not any(path.exists() for path in box.directories.values())
    finally:
        limiter.sweep()
        limiter.close()


def _machine(tmp_path: Path, cgroup: dict[str, str], membership: str) -> tuple[Path, Path]:
    proc = _tree(tmp_path / "proc", {"meminfo": "MemTotal: 16384 kB\n", "self/cgroup": membership})
    return _tree(tmp_path / "cgroup", cgroup), proc


def test_the_host_offers_what_the_tightest_cgroup_above_it_allows(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0)) * 1000
    cases = {
        "v2": (
            {
                "cgroup.controllers": "",
                "a/b/cpu.max": "max 100000",
                "a/cpu.max": "50000 100000",
                "a/b/memory.max": "8388608",
            },
            "0::/a/b",
        ),
        "v1": (
            {
                "cpu/a/cpu.cfs_quota_us": "50000",
                "cpu/a/cpu.cfs_period_us": "100000",
                "memory/a/memory.limit_in_bytes": "8388608",
            },
            "3:cpu:/a/b\n4:memory:/a/b",
        ),
        "none": ({"x": ""}, ""),
        "unlimited": (
            {"memory/memory.limit_in_bytes": "9223372036854771712", "cpu/cpu.cfs_quota_us": "-1"},
            "3:cpu:/\n4:memory:/",
        ),
    }
    found = {}
    for name, (cgroup, membership) in cases.items():
        root, proc = _machine(tmp_path / name, cgroup, membership)
        host = host_resources(tmp_path, root, proc)
        found[name] = (host.cpu_milli, host.memory_bytes)
        assert host.disk_bytes > 0
    assert found == {
        "v2": (500, 8 * MIB),
        "v1": (500, 8 * MIB),
        "none": (cores, 16 * MIB),
        "unlimited": (cores, 16 * MIB),
    }


def test_this_machine_offers_something() -> None:
    host = host_resources()
    assert host.cpu_milli > 0
    assert host.memory_bytes > 0
    assert Limiter().make("1", PodLimits()) == ProcessLimits()
