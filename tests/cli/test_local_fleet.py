"""A fleet on one machine starts and stops its own processes, as the orders in the file say, and nobody else's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from api.elastic import FleetFile, FleetOrder, LocalFleet
from api.supervisor import Part
from engine.commands import ScaleNodes
from engine.protocol.fleet import NodeOffer

_OFFER = NodeOffer(3, 1, prefix="n-")


def _until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def _fleet(directory: Path, said: list[str]) -> tuple[LocalFleet, FleetFile]:
    file = FleetFile(directory / "fleet.json")

    def make(name: str) -> Part:
        return Part(name, [sys.executable, "-c", "import time; time.sleep(60)"], directory / f"{name}.log")

    return LocalFleet(_OFFER, file, make, said.append, stop_grace_s=5), file


def test_there_are_as_many_agents_as_the_last_order_says(tmp_path: Path) -> None:
    fleet, file = _fleet(tmp_path, [])
    try:
        fleet.check()
        assert list(fleet.parts) == ["n-0"]
        file.write(ScaleNodes(3, "pending_work"))
        fleet.check()
        assert list(fleet.parts) == ["n-0", "n-1", "n-2"]
        file.write(ScaleNodes(1, "idle", ("n-0", "n-2")))
        fleet.check()
        _until(lambda: not fleet.check() and list(fleet.parts) == ["n-1"])
    finally:
        fleet.close()


def test_a_node_that_is_to_leave_is_asked_not_killed(tmp_path: Path) -> None:
    file = FleetFile(tmp_path / "fleet.json")
    done = tmp_path / "drained"
    ready = tmp_path / "ready"
    code = (
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(done)!r}).touch(), sys.exit(0)))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    fleet = LocalFleet(
        NodeOffer(2, 0, prefix="n-"),
        file,
        lambda name: Part(name, [sys.executable, "-c", code], tmp_path / "log"),
        print,
    )
    try:
        file.write(ScaleNodes(1, "forecast"))
        fleet.check()
        _until(ready.exists)
        file.write(ScaleNodes(0, "idle", ("n-0",)))
        _until(lambda: not fleet.check() and not fleet.parts)
        assert done.exists()
    finally:
        fleet.close()


def test_an_agent_that_falls_is_replaced_later_and_later(tmp_path: Path) -> None:
    said: list[str] = []
    fleet, _ = _fleet(tmp_path, said)
    try:
        fleet.check()
        part = fleet.parts["n-0"]
        assert part.process is not None
        os.kill(part.process.pid, signal.SIGKILL)
        _until(lambda: not fleet.check() and not fleet.parts)
        assert any("n-0 has ended (exit -9)" in line for line in said)
        fleet.check()
        assert not fleet.parts, "the next one starts only after a pause"
    finally:
        fleet.close()


def test_nothing_is_left_and_nothing_else_is_touched_when_it_closes(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    fleet, file = _fleet(tmp_path, [])
    try:
        file.write(ScaleNodes(3, "pending_work"))
        fleet.check()
        processes = [part.process for part in fleet.parts.values()]
        fleet.close()
        assert all(process is not None and process.returncode is not None for process in processes)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_an_order_is_carried_out_once_and_what_was_wanted_survives(tmp_path: Path) -> None:
    fleet, file = _fleet(tmp_path, [])
    file.write(ScaleNodes(2, "forecast"))
    file.write(ScaleNodes(1, "idle", ("n-1",)))
    try:
        fleet.check()
        assert fleet.wanted == 1
        again, _ = _fleet(tmp_path, [])
        assert again.wanted == 1
    finally:
        fleet.close()
    assert file.read() == [FleetOrder(1, 2), FleetOrder(2, 1, ("n-1",))]


@pytest.mark.parametrize("text", ["", "{", "[[1]]", '{"a": 1}', "[[1, 2, 3]]", "null"])
def test_a_damaged_file_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "fleet.json").write_text(text)
    assert FleetFile(tmp_path / "fleet.json").read() == []


def test_only_the_latest_orders_are_kept(tmp_path: Path) -> None:
    file = FleetFile(tmp_path / "fleet.json")
    for nodes in range(100):
        file.write(ScaleNodes(nodes, "forecast"))
    orders = file.read()
    assert len(orders) == 64
    assert orders[-1] == FleetOrder(100, 99)
