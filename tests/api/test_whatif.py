"""What if, asked of a journal on disk: by the worker process, by SS, and from the command line."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sqlite3
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from api.cli.main import app
from api.ports import SupportRefused
from api.sm.journal import SqliteJournal, read_journal
from api.support.service import SupportService
from api.whatif import WhatIfRefused, WhatIfTooLong, answer, ask_worker
from api.whatif_request import WhatIfRequest
from engine import profiles
from engine.events import TenantConfigured
from engine.journal import MemoryJournal
from sim.simulate import SimulationConfig, simulate
from sim.whatif import ALL

AIGC = profiles.load("aigc")


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal of half an hour on two GPUs with too much to do."""
    kept = MemoryJournal()
    config = SimulationConfig(synthetic_tasks=200, nodes=1, gpus_per_node=2, rate_scale=400, until_hours=0.5)
    simulate(config, journal=kept)
    path = tmp_path_factory.mktemp("state") / "journal.db"
    on_disk = SqliteJournal(path)
    for record in kept.records:
        on_disk(record.now, record.events, record.commands)
    on_disk.close()
    return path


def test_the_worker_answers_as_the_function_does_and_leaves_the_journal_as_it_was(journal: Path) -> None:
    request = WhatIfRequest(add_nodes=["1xa100"], hours=0.1, seeds=2)
    before = journal.read_bytes()
    here = answer(journal, request, AIGC).to_json()
    there = asyncio.run(ask_worker(journal, request, AIGC))
    assert json.loads(json.dumps(here)) == there
    assert here["waiting"] > 0
    wait = next(line for line in here["lines"] if (line["tenant"], line["measure"]) == (ALL, "mean waiting, s"))
    assert wait["changed"] < wait["unchanged"]
    assert journal.read_bytes() == before


def test_the_worker_hands_refusals_on_and_is_stopped_when_it_takes_too_long(journal: Path) -> None:
    with pytest.raises(WhatIfRefused, match="remove_nodes: there are 1"):
        asyncio.run(ask_worker(journal, WhatIfRequest(remove_nodes=["5xa100"]), AIGC))
    with pytest.raises(WhatIfRefused, match=r"no node takes work.*begin [0-9]+ s back"):
        asyncio.run(ask_worker(journal, WhatIfRequest(remove_nodes=["1xa100"]), AIGC))
    with pytest.raises(WhatIfRefused, match="does not exist"):
        asyncio.run(ask_worker(journal.with_name("absent.db"), WhatIfRequest(), AIGC))
    with pytest.raises(WhatIfTooLong, match="fewer seeds"):
        asyncio.run(ask_worker(journal, WhatIfRequest(seeds=100), AIGC, timeout_s=0.05))


def test_a_fork_further_back_sees_the_queue_of_that_time(journal: Path) -> None:
    now = answer(journal, WhatIfRequest(hours=0, seeds=2), AIGC)
    early = answer(journal, WhatIfRequest(hours=0, seeds=2, back_s=1500), AIGC)
    assert early.at_us <= now.at_us - 1_500_000_000
    assert early.waiting > now.waiting, "everything arrives early, and the queue shrinks"
    with pytest.raises(WhatIfRefused, match="knows no node"):
        answer(journal, WhatIfRequest(hours=0, seeds=2, back_s=1e6), AIGC)


def test_a_journal_is_read_as_it_was_at_one_moment_while_the_scheduler_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = SqliteJournal(tmp_path / "journal.db")
    writer(1, [TenantConfigured("a")], [])

    class Racing(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            if sql.startswith("SELECT seq, epoch, crc, body FROM event"):
                writer(2, [TenantConfigured("b")], [])
            return super().execute(sql, *parameters)

    monkeypatch.setattr("api.sm.journal.sqlite3.connect", partial(sqlite3.connect, factory=Racing))
    _, records = read_journal(tmp_path / "journal.db")
    assert [record.seq for record in records] == [1]
    writer.close()


def test_the_example_of_the_documentation_runs(
    journal: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "whatif.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    (journal.parent / "aigc-state").mkdir()
    shutil.copy(journal, journal.parent / "aigc-state" / "journal.db")
    monkeypatch.chdir(journal.parent)
    exec(compile(code.replace("seeds=10", "seeds=2"), "whatif.md", "exec"), {})
    assert "2xa100" in capsys.readouterr().out


def test_ss_computes_one_what_if_at_a_time_and_says_so() -> None:
    async def inside() -> None:
        going = asyncio.Event()

        async def foresee(request: WhatIfRequest) -> Mapping[str, Any]:
            await going.wait()
            return {"load": request.load}

        service = SupportService(None, None, foresee=foresee)  # type: ignore[arg-type]
        first = asyncio.create_task(service.whatif(WhatIfRequest(load=2.0)))
        await asyncio.sleep(0)
        with pytest.raises(SupportRefused) as refused:
            await service.whatif(WhatIfRequest())
        assert (refused.value.status, refused.value.code) == (409, "whatif_running")
        going.set()
        assert await first == {"load": 2.0}
        assert await service.whatif(WhatIfRequest()) == {"load": 1.0}
        with pytest.raises(SupportRefused) as absent:
            await SupportService(None, None).whatif(WhatIfRequest())  # type: ignore[arg-type]
        assert absent.value.status == 501

    asyncio.run(inside())


def test_the_command_prints_every_tenant_and_the_same_as_json(journal: Path) -> None:
    arguments = ["whatif", "--state", str(journal.parent), "--profile", "fifo", "--hours", "0.05", "--seeds", "2"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "profile fifo" in shown.stdout
    found = CliRunner().invoke(app, [*arguments, "--json"])
    report = json.loads(found.stdout)
    assert report["change"] == {"profile": "fifo"}
    tenants = {line["tenant"] for line in report["lines"]}
    assert ALL in tenants
    assert all(tenant in shown.stdout for tenant in tenants)


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--add-nodes", "lots"], 2, "add_nodes"),
        (["--load", "-1"], 2, "--load"),
        (["--profile", "no-such"], 2, "no-such"),
        (["--hours", "1e9"], 2, "hours"),
        (["--journal", "absent.db"], 3, "absent.db"),
    ],
)
def test_wrong_options_are_named(journal: Path, arguments: list[str], code: int, named: str) -> None:
    refused = CliRunner().invoke(app, ["whatif", "--state", str(journal.parent), *arguments])
    assert refused.exit_code == code, refused.output
    assert named in refused.stderr
