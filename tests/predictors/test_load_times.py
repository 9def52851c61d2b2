"""Load times: by bytes and place before anything was seen, by holder where the place is unknown, honest in their P90."""

from __future__ import annotations

import csv
import gzip
import math
import random
from pathlib import Path

import numpy as np
import pytest

from engine.tasks import SECOND
from predictors.loads import LoadTimes
from predictors.physics import GIB

MONITORING = Path(__file__).resolve().parents[3] / "shared/traces/gentd26/basemodel_update_latency_anon.csv.gz"


def test_before_anything_was_seen_bytes_and_place_tell() -> None:
    loads = LoadTimes()
    near, far = (loads.predict(0, source=place, size_bytes=6 * GIB).p50_us for place in ("memory", "remote"))
    assert near < 4 * SECOND < 20 * SECOND < far
    assert loads.predict(0, source="gpu", size_bytes=6 * GIB).p90_us == 0
    small, large = (loads.predict(0, source="remote", size_bytes=size * GIB).p50_us for size in (2, 6))
    assert small < large
    with pytest.raises(ValueError, match="source"):
        loads.predict(0, source="tape")


def test_a_few_loads_correct_a_place_and_a_holder_has_its_own_ways() -> None:
    loads, now = LoadTimes(), 0
    for i in range(40):
        now += 60 * SECOND
        holder = f"node-{i % 2}"
        loads.observe(now, (3 if i % 2 else 30) * SECOND, holder=holder, size_bytes=6 * GIB)
    quick, slow = (loads.predict(now, holder=f"node-{i}", size_bytes=6 * GIB).p50_us / SECOND for i in (1, 0))
    assert quick == pytest.approx(3, rel=0.35)
    assert slow == pytest.approx(30, rel=0.35)


def test_where_the_place_is_known_it_explains_what_the_holder_cannot() -> None:
    rng, loads, now = random.Random(3), LoadTimes(), 0
    truth, said, blind = [], [], []
    unknowing = LoadTimes()
    for i in range(1500):
        now += 60 * SECOND
        place = rng.choice(["memory", "disk", "remote"])
        load_us = round({"memory": 2.5, "disk": 6.0, "remote": 33.0}[place] * rng.lognormvariate(0, 0.2) * SECOND)
        if i >= 500:
            truth.append(math.log(load_us))
            said.append(math.log(loads.predict(now, holder="n", source=place, size_bytes=6 * GIB).p50_us))
            blind.append(math.log(unknowing.predict(now, holder="n", size_bytes=6 * GIB).p50_us))
        loads.observe(now, load_us, holder="n", source=place, size_bytes=6 * GIB)
        unknowing.observe(now, load_us, holder="n", size_bytes=6 * GIB)
    assert r2(truth, said) > 0.92
    assert r2(truth, blind) < 0.3


def test_loads_that_took_no_time_teach_nothing() -> None:
    loads = LoadTimes()
    before = loads.predict(0, holder="n")
    loads.observe(0, 0, holder="n")
    loads.observe(0, 10 * SECOND, holder="n", source="gpu")
    assert loads.predict(0, holder="n") == before


@pytest.mark.skipif(not MONITORING.exists(), reason="the monitoring files of GenTD26 are not beside the repository")
def test_on_the_service_s_own_loads_the_holder_tells_most() -> None:
    with gzip.open(MONITORING, "rt") as file:
        rows = sorted(
            (float(row["timestamp_anon"]), float(row["value"]), row["container_ip"]) for row in csv.DictReader(file)
        )
    loads, truth, said, held = LoadTimes(), [], [], []
    for at_s, load_ms, pod in rows:
        now, load_us = round(at_s * SECOND), round(load_ms * 1000)
        predicted = loads.predict(now, holder=pod)
        truth.append(math.log(load_us))
        said.append(math.log(predicted.p50_us))
        held.append(load_us <= predicted.p90_us)
        loads.observe(now, load_us, holder=pod)
    begin = len(rows) * 3 // 10
    assert r2(truth[begin:], said[begin:]) > 0.9
    assert float(np.mean(held[begin:])) == pytest.approx(0.9, abs=0.02)


def r2(truth: list[float], said: list[float]) -> float:
    true = np.array(truth)
    return 1.0 - float(np.square(true - np.array(said)).sum() / np.square(true - true.mean()).sum())
