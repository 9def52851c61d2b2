"""Simulated nodes tell of their caches as real ones do, obey pins and releases, and a run with prefetch loads less from afar."""

from __future__ import annotations

from dataclasses import replace

import simpy

from engine import profiles
from engine.commands import CreatePod, PrefetchModel, ReleaseModel
from engine.events import NodeReported
from engine.resources import Demand, GpuGrant, ResidentModel, Tier
from engine.tasks import SECOND
from sim.caches import ByteCache
from sim.hardware import Hardware, cluster
from sim.stock import MOST_TOLD, resident
from sim.workload import Workload
from sim.world import SimWorld


class Hands:
    """Gives commands to one node by hand, and keeps what it says of its models."""

    def __init__(self) -> None:
        self.env = simpy.Environment()
        self.world = SimWorld(self.env, Hardware(cluster(1, 2), load_sigma=0.0), Workload("by hand", ()), 0, None)
        self.node = self.world.nodes["node-0"]

    def until(self, seconds: float) -> list[dict[str, ResidentModel]]:
        said = []
        while self.env.peek() <= seconds * SECOND:
            self.env.step()
            for event in self.world.take():
                if isinstance(event, NodeReported) and event.resident is not None:
                    said.append({each.model: each for each in event.resident})
        return said

    def pod(self, number: int, model: str) -> None:
        grant = GpuGrant(f"node-0-gpu-{number % 2}", 1000, 0)
        self.world.perform(CreatePod(number, "node-0", "text_to_image", model, (grant,), Demand(), 1))


def test_a_node_tells_of_a_load_and_of_a_prefetch_with_the_tier() -> None:
    hands = Hands()
    hands.pod(1, "m")
    hands.world.perform(PrefetchModel("node-0", "p"))
    last = hands.until(200)[-1]
    assert {name: each.tier for name, each in last.items()} == {"m": Tier.MEMORY, "p": Tier.DISK}
    assert last["p"].size_bytes == hands.world.hardware.model_bytes("", "p")


def test_it_says_nothing_when_nothing_changed() -> None:
    hands = Hands()
    hands.pod(1, "m")
    assert len(hands.until(200)) == 1
    hands.pod(2, "m")
    assert hands.until(400) == []


def test_a_pinned_model_is_told_as_pinned_until_it_is_released_and_a_dropped_one_goes() -> None:
    hands = Hands()
    hands.world.perform(PrefetchModel("node-0", "m", True))
    assert hands.until(200)[-1]["m"].pinned
    hands.world.perform(ReleaseModel("node-0", "m"))
    assert not hands.until(400)[-1]["m"].pinned
    hands.world.perform(ReleaseModel("node-0", "m", drop=True))
    assert hands.until(600)[-1] == {}


def test_a_node_that_was_lost_tells_what_its_disk_kept_when_it_is_back() -> None:
    hands = Hands()
    hands.pod(1, "m")
    hands.until(200)
    hands.world.fail_node("node-0", repair_after_us=10 * SECOND)
    assert {name: each.tier for name, each in hands.until(400)[-1].items()} == {"m": Tier.DISK}


def test_pinned_entries_of_a_simulated_cache_stay_and_it_is_never_over_its_capacity() -> None:
    cache = ByteCache(30)
    cache.pin("a")
    for name in "abcd":
        cache.put(name, 10)
        assert cache.used_bytes <= 30
    assert [name for name, _ in cache.entries()] == ["d", "c", "a"]
    cache.pin("c")
    cache.pin("d")
    cache.put("e", 10)
    assert "e" not in cache
    assert cache.used_bytes == 30


def test_a_report_is_capped_with_the_pinned_first() -> None:
    disk = ByteCache(10_000)
    disk.pin("m0")
    for number in range(MOST_TOLD + 20):
        disk.put(f"m{number}", 1)
    told = resident(disk, ByteCache(10))
    assert len(told) == MOST_TOLD
    assert told[0] == ResidentModel("m0", Tier.DISK, 1, True)


def test_the_profile_aigc_asks_for_prefetches_and_the_classics_do_not() -> None:
    ahead = {name: profiles.load(name).prefetch_ahead for name in profiles.NAMES}
    assert ahead.pop("aigc") > 0
    assert set(ahead.values()) == {0}
    assert replace(profiles.load("aigc"), prefetch_ahead=0).prefetch_ahead == 0
