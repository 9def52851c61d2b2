"""What SS shows: jobs to their tenants, why they wait, their events; nodes, queue and health to operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ss_platform import Platform

from api.ports import SupportRefused
from engine.events import NodeReported
from engine.resources import ResidentModel, Tier


def test_another_tenants_job_is_an_absent_one(platform: Platform) -> None:
    req_no = platform.ask()
    platform.result(req_no)
    for call in (
        lambda: platform.support.job("other", req_no),
        lambda: platform.support.cancel("other", req_no),
        lambda: platform.support.why("other", req_no),
        lambda: platform.support.compensate("other", req_no, "redeliver_result"),
    ):
        with pytest.raises(SupportRefused) as caught:
            platform.call(call)
        assert caught.value.status == 404
    assert platform.call(lambda: platform.support.job("*", req_no)).tenant == "acme"


def test_a_waiting_task_says_why(tmp_path: Path) -> None:
    platform = Platform(tmp_path, gpus=1)
    first = platform.ask(seconds=3600, method="sleep")
    platform.job_when(first, {"running"})
    waiting = platform.ask(method="text_to_image", parameters={"prompt": "a red circle"})
    platform.job_when(waiting, {"pending"})
    reasons = platform.call(lambda: platform.support.why("acme", waiting))
    assert reasons
    assert all(item["reason"] and item["message"] for item in reasons)
    platform.stop()


def test_jobs_are_listed_newest_first_in_pages(platform: Platform) -> None:
    mine = [platform.ask(group="a" if n % 2 else "b") for n in range(5)]
    platform.ask(tenant="other")
    platform.results(6)
    page, cursor = platform.call(lambda: platform.support.jobs("acme", limit=3))
    rest, end = platform.call(lambda: platform.support.jobs("acme", limit=3, cursor=cursor))
    assert [view.req_no for view in (*page, *rest)] == mine[::-1]
    assert end == ""
    grouped, _ = platform.call(lambda: platform.support.jobs("acme", group="a", state="finished"))
    assert [view.req_no for view in grouped] == [mine[3], mine[1]]
    everybody, _ = platform.call(lambda: platform.support.jobs("*"))
    assert len(everybody) == 6
    with pytest.raises(SupportRefused, match="cursor"):
        platform.call(lambda: platform.support.jobs("acme", cursor="zzz"))


def test_the_events_of_a_job_tell_its_life_and_end_with_it(platform: Platform) -> None:
    req_no = platform.ask(seconds=0.05)
    platform.job_when(req_no, {"pending", "bound", "starting", "running", "finished"})

    async def listen(after: int) -> list[Any]:
        return [event async for event in platform.support.events("acme", req_no, after)]

    events = platform.call(lambda: listen(0))
    kinds = [event.kind for event in events]
    assert kinds[0] == "submitted"
    assert kinds[-1] == "finished"
    assert [event.event_id for event in events] == sorted({event.event_id for event in events})
    assert events[-1].view.result is not None
    assert all(event.view.result is None for event in events[:-1])
    again = platform.call(lambda: listen(0))
    assert [event.kind for event in again] == [kind for kind in kinds if kind != "progress"]
    assert platform.call(lambda: listen(events[-1].event_id)) == []


def test_nodes_are_shown_drained_and_opened_again(platform: Platform) -> None:
    (node,) = platform.call(platform.support.nodes)
    assert (node["name"], node["state"], len(node["gpus"])) == ("drill-0", "up", 2)
    platform.call(lambda: platform.support.drain("drill-0"))
    assert platform.call(platform.support.nodes)[0]["draining"]
    platform.call(lambda: platform.support.uncordon("drill-0"))
    assert not platform.call(platform.support.nodes)[0]["draining"]
    for call in (lambda: platform.support.drain("nowhere"), lambda: platform.support.drain("drill-0", "no-gpu")):
        with pytest.raises(SupportRefused) as caught:
            platform.call(call)
        assert caught.value.status == 404


def test_a_node_is_shown_with_the_models_it_holds_and_gives_one_up(platform: Platform) -> None:
    platform.scheduler.core.stocks.note(
        [
            NodeReported(
                "drill-0", (), resident=(ResidentModel("m", Tier.MEMORY, 5, True),), cache_counts=(("disk_hits", 3),)
            )
        ]
    )
    (node,) = platform.call(platform.support.nodes)
    assert node["models"] == [{"model": "m", "tier": "memory", "size_bytes": 5, "pinned": True}]
    assert node["caches"] == {"disk": {"hits": 3}}
    platform.call(lambda: platform.support.unload("drill-0", "m"))
    for call in (lambda: platform.support.unload("nowhere", "m"), lambda: platform.support.unload("drill-0", "k")):
        with pytest.raises(SupportRefused) as caught:
            platform.call(call)
        assert caught.value.status == 404


def test_queue_and_health_are_shown(platform: Platform) -> None:
    running = platform.ask(seconds=3600)
    platform.job_when(running, {"running"})
    shown = platform.call(platform.support.queue)
    assert shown["engine"]["tenants"] == {"acme": {"running": 1}}
    assert shown["support"]["accepted"] == 1
    health = platform.call(platform.support.health)
    assert health["ready"], health
