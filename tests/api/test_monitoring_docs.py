"""The pages on the API and on monitoring name what there is, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from api.gateway import jobs
from api.gateway.fake import GatewayFake, SupportFake
from api.monitoring.fold import MetricsFold
from api.monitoring.metrics import Metrics
from api.monitoring.watch import Watch
from api.sm.capacity import CapacityMetrics
from api.sm.foresight import ForesightMetrics

ROOT = Path(__file__).parents[2]


def page(name: str) -> str:
    path = ROOT / "docs" / name
    if not path.is_file():
        pytest.skip(f"docs/{name} does not come with an installed package")
    return path.read_text()


def test_every_metric_is_in_the_page_and_the_page_names_no_other() -> None:
    metrics = Metrics(process=False)
    MetricsFold(metrics)
    CapacityMetrics(metrics.registry)
    ForesightMetrics(metrics.registry)
    Watch(SupportFake(), metrics, lambda: 0.0)
    there = {f"{one.name}_total" if one.type == "counter" else one.name for one in metrics.registry.collect()}
    named = set(re.findall(r"\baigc_[a-z_]+", page("monitoring.md")))
    suffixes = {f"{name}{suffix}" for name in there for suffix in ("_bucket", "_sum", "_count")}
    assert there - named == set()
    assert named - there - suffixes == set()


def test_every_code_of_a_refusal_is_in_the_page() -> None:
    source = "".join(path.read_text() for path in Path(jobs.__file__).parent.glob("*.py") if path.name != "fake.py")
    codes = set(re.findall(r"(?:Refused|SupportRefused)\(\s*\d{3},\s*\"([a-z_]+)\"", source))
    assert len(codes) > 25
    assert {code for code in codes if f"`{code}`" not in page("api.md")} == set()


def test_every_route_is_in_the_page(tmp_path: Path) -> None:
    text = page("api.md")
    last_words = {path.rstrip("/").split("/")[-1] for path in GatewayFake(tmp_path).app.openapi()["paths"]}
    assert {word for word in last_words if not word.startswith("{") and word not in text} == set()
