"""A host of real Pods for the tests here, and the way to what lies beside them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from executors.devices import CpuPlugin
from executors.dfs import open_store
from executors.pods import LocalPodHost

sys.path.insert(0, str(Path(__file__).parent))

from pod_bench import DRILLS, Bench, nurseries


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A host with the drill methods, closed at the end."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    store = open_store(f"file://{tmp_path}/files")
    others = nurseries()
    host = LocalPodHost(CpuPlugin(2), store, tmp_path / "work", methods=DRILLS)
    try:
        yield Bench(host, store, tmp_path / "work")
    finally:
        host.close()
        assert nurseries() - others == set()
        assert [parent for parent in host.limiter.parents.values() if parent.exists()] == []
