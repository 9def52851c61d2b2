"""The page about reproduced experiments: its Python runs, and its table of arguments names what there is."""

from __future__ import annotations

import re
from pathlib import Path

from sim.jobs import POLICIES
from sim.jobs.core import BACKFILLS
from sim.jobs.nodes import PLACEMENTS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reproduce.md").read_text(encoding="utf-8")


def test_the_example_of_the_job_core_runs(capsys) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(example, "docs/reproduce.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[ 0. 10. 15.  3.]")


def test_every_policy_backfill_and_placement_is_in_the_table() -> None:
    (table,) = re.findall(r"\| argument \| is \|\n(.*?)\n\n", PAGE, re.DOTALL)
    for name in (*POLICIES, *BACKFILLS, *PLACEMENTS):
        assert f"`{name}`" in table, name
