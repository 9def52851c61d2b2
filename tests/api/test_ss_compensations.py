"""What is made good afterwards: a result delivered again, a dead letter run again, a quota given back."""

from __future__ import annotations

import pytest
from ss_platform import Platform

from api.ports import SupportRefused
from engine.scheduler import Engine


def test_a_result_is_delivered_again_with_the_same_bytes(platform: Platform) -> None:
    req_no = platform.ask()
    first = platform.results(1)[f"acme/{req_no}"]
    answer = platform.call(lambda: platform.support.compensate("acme", req_no, "redeliver_result", "k1"))
    assert answer["delivered"]
    assert platform.results(1)[f"acme/{req_no}"] == first
    assert platform.call(lambda: platform.support.compensate("acme", req_no, "redeliver_result", "k1")) == answer
    other = platform.ask()
    assert set(platform.results(1)) == {f"acme/{other}"}, "the same key delivers once"
    with pytest.raises(SupportRefused) as caught:
        platform.call(lambda: platform.support.compensate("acme", other, "redeliver_result", "k1"))
    assert caught.value.code == "key_used"


def test_a_dead_letter_is_run_again_on_request(platform: Platform) -> None:
    req_no = platform.ask(parameters={"seconds": 0, "fail": "error"})
    assert platform.result(req_no)["state"] == "dead"
    answer = platform.call(lambda: platform.support.compensate("acme", req_no, "rerun"))
    assert answer["rerun"] == 1
    assert set(platform.results(1)) == {f"acme/{req_no}/rerun-1"}
    finished = platform.ask()
    platform.result(finished)
    with pytest.raises(SupportRefused) as caught:
        platform.call(lambda: platform.support.compensate("acme", finished, "rerun"))
    assert caught.value.status == 409


def test_a_dead_letter_the_engine_has_forgotten_is_run_again_too(platform: Platform) -> None:
    req_no = platform.ask(parameters={"seconds": 0, "fail": "error"})
    assert platform.result(req_no)["state"] == "dead"

    def forget(engine: Engine) -> None:
        del engine.state.tasks[req_no], engine.state.terminal[req_no]

    platform.call(lambda: platform.scheduler.loop.ask(forget))
    answer = platform.call(lambda: platform.support.compensate("acme", req_no, "rerun"))
    assert answer["rerun"] == 1
    assert set(platform.results(1)) == {f"acme/{req_no}/rerun-1"}


def test_the_quota_of_a_dead_letter_is_given_back_once(platform: Platform) -> None:
    req_no = platform.ask(parameters={"seconds": 0, "fail": "error"})
    platform.result(req_no)
    assert platform.scheduler.store.quota_reserved("acme") == 1
    answer = platform.call(lambda: platform.support.compensate("acme", req_no, "release_quota"))
    assert answer["released"]
    assert platform.scheduler.store.quota_reserved("acme") == 0
    assert platform.call(lambda: platform.support.compensate("acme", req_no, "release_quota")) == answer
