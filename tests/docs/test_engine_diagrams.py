"""The command that the engine's page names for its diagrams prints them."""

from __future__ import annotations

import pytest

from engine import lifecycle


def test_the_life_cycle_module_prints_its_diagrams(capsys: pytest.CaptureFixture[str]) -> None:
    lifecycle.main()
    assert capsys.readouterr().out.strip() == lifecycle.mermaid().strip()
