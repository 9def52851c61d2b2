"""The report card's page: every picture is there, and the page needs nothing from elsewhere."""

from __future__ import annotations

import random
import re
from html import unescape
from pathlib import Path

from typer.testing import CliRunner

from api.cli.main import app
from engine.tasks import SECOND
from predictors.gentd26 import SUCCEED, Row
from predictors.report import report_with_figures
from sim.plots import Plot
from sim.prediction_page import pictures, write_html


def rows(count: int = 700) -> list[Row]:
    rng = random.Random(2)
    return [
        Row(
            i * 300 * SECOND,
            round(rng.lognormvariate(3.0, 0.4) * SECOND),
            SUCCEED,
            f"G{i % 30}",
            f"<M{i % 3}>",
            "",
            1.0,
            30.0,
            0,
            9.0,
        )
        for i in range(count)
    ]


def test_the_page_has_every_picture_and_needs_no_other_file(tmp_path: Path) -> None:
    card, figures = report_with_figures(rows())
    write_html(card, figures, tmp_path / "card.html")
    page = (tmp_path / "card.html").read_text()
    plots = pictures(card, figures)
    assert page.count("<svg") == len(plots) >= 7
    for plot in plots:
        assert plot.heading in unescape(page)
    assert not re.search(r"(src|href)=\"(https?:)?//", page)
    assert "<M0>" not in page
    assert "&lt;M0&gt;" in page


def test_the_same_card_gives_the_same_page(tmp_path: Path) -> None:
    card, figures = report_with_figures(rows())
    for name in ("one", "two"):
        write_html(card, figures, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_pictures_of_others_come_after_the_cards_own(tmp_path: Path) -> None:
    card, figures = report_with_figures(rows())
    write_html(card, figures, tmp_path / "card.html", [Plot("A fleet", "It follows.", "<svg></svg>")])
    page = (tmp_path / "card.html").read_text()
    assert page.count("<svg") == len(pictures(card, figures)) + 1
    assert page.index("A fleet") > page.index(pictures(card, figures)[0].heading)


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    trace, page = tmp_path / "trace.csv", tmp_path / "card.html"
    lines = ["gmt_create,predict_status,exec_time_seconds,groupId,checkpoint_model_version_id"]
    lines += [
        f"2024-11-{15 + i // 240:02d} {i // 10 % 24:02d}:{i % 10 * 6:02d}:00,SUCCEED,{10 + i % 7},G{i % 9},M{i % 2}"
        for i in range(480)
    ]
    trace.write_text("\n".join(lines) + "\n")
    result = CliRunner().invoke(app, ["predict", "report", "--trace", str(trace), "--html", str(page), "--json"])
    assert result.exit_code == 0, result.output
    assert "<svg" in page.read_text()
    lonely = CliRunner().invoke(app, ["predict", "report", "--trace", str(trace), "--fleet"])
    assert lonely.exit_code == 2
    assert "--html" in lonely.stderr
