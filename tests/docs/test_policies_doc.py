"""The page about policies tells the truth: its profiles load, its own policy runs, and every ordering is in its table."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from api.cli.main import app
from engine import profiles
from engine.levels.orderings import ORDERINGS
from engine.profile import BACKFILLS

PAGE = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
ORDERING = PAGE.split("## Placement")[0]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", ORDERING, re.DOTALL)
TOML = [text for language, text in BLOCKS if language == "toml"]
PYTHON = [text for language, text in BLOCKS if language == "python"]


def test_every_ordering_and_backfill_is_in_the_tables() -> None:
    assert re.findall(r"^\| `([a-z-]+)` \|", ORDERING, re.MULTILINE) == [*ORDERINGS, *BACKFILLS]


def test_every_profile_that_the_table_names_exists() -> None:
    named = {
        name
        for row in re.findall(r"^\| `[a-z-]+` \|.*\|(.*)\|$", ORDERING, re.MULTILINE)
        for name in row.split("`")[1::2]
    }
    assert len(named) >= 12
    assert named <= set(profiles.NAMES)


def test_the_example_of_queues_loads() -> None:
    quotas = profiles.load(TOML[0]).quotas
    assert quotas is not None
    assert [queue.name for queue in quotas.queues] == ["research", "vision", "service"]


def test_the_policy_of_ones_own_is_short_and_runs_from_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(PYTHON[0].splitlines()) <= 20
    (tmp_path / "my_policies.py").write_text(PYTHON[0])
    (tmp_path / "pictures.toml").write_text(TOML[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    try:
        ordering = profiles.load(TOML[1]).ordering
        assert type(ordering).__name__ == "PicturesFirst"
        assert (ordering.step_us, ordering.age_us) == (5_000_000, 1_800_000_000)
        line = re.search(r"aigc (simulate --profile pictures.toml --tasks 500)", PAGE)
        assert line is not None
        answer = CliRunner().invoke(app, line[1].replace("500", "60").split(), catch_exceptions=False)
        assert answer.exit_code == 0, answer.output
        assert "pictures" in answer.stdout
    finally:
        sys.modules.pop("my_policies", None)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("no_such_module:Mine", "cannot be imported"),
        ("engine.tasks:TaskSpec", "is no ordering; derive it from engine.levels.ordering.Policy"),
        ("engine.tasks:NoSuchThing", "cannot be imported"),
    ],
)
def test_what_is_wrong_with_a_policy_of_ones_own_is_named(policy: str, message: str) -> None:
    with pytest.raises(profiles.InvalidProfile, match=message):
        profiles.load(f'[ordering]\npolicy = "{policy}"\n')


def test_a_profile_from_others_imports_nothing() -> None:
    with pytest.raises(profiles.InvalidProfile, match="is unknown"):
        profiles.load('[ordering]\npolicy = "engine.levels.ordering:Fifo"\n', own_policies=False)
