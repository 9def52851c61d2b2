"""What the README shows can be typed: its simulator commands and Python examples are run, its links exist."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from api.cli.main import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TRACE = ROOT.parent / "shared" / "traces" / "gentd26" / "lora_request_trace.csv"
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for language, block in BLOCKS if language == "" for line in block.splitlines()]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("aigc simulate")])
def test_a_simulator_command_runs_as_written_on_the_first_tasks(line: str, tmp_path: Path, monkeypatch) -> None:
    if "lora_request_trace.csv" in line:
        if not TRACE.is_file():
            pytest.skip(f"the trace {TRACE.name} is not beside this checkout")
        shutil.copy(TRACE, tmp_path)
    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(app, [*shlex.split(line)[1:], "--limit", "200"], catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    assert "waiting" in answer.stdout
    if "--html" in line:
        assert "<svg" in (tmp_path / "report.html").read_text()


def test_every_command_the_readme_shows_exists() -> None:
    shown = {
        tuple(word for word in shlex.split(line)[1:3] if word.isalpha())
        for line in COMMANDS
        if line.startswith("aigc ")
    }
    assert len(shown) >= 7
    for words in shown:
        names = words if words[0] in {"jobs", "nodes", "models", "keys", "predict"} else words[:1]
        answer = CliRunner().invoke(app, [*names, "--help"])
        assert answer.exit_code == 0, (names, answer.output)


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    wanted = {line.split()[1] for line in COMMANDS if line.startswith("make ")}
    assert {"demo", "test"} <= wanted
    for target in wanted:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("number", [n for n, (language, _) in enumerate(BLOCKS) if language == "python"])
def test_a_python_example_runs(number: int, capsys) -> None:
    code = BLOCKS[number][1]
    if "openai" in code:
        compile(code, "README.md", "exec")
        return  # run against the real platform in tests/e2e/test_openai_sdk.py
    exec(compile(code.replace("2000", "200"), "README.md", "exec"), {})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_inside_the_repository_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        linked = (document.parent / path) if path else document
        assert linked.exists(), f"{document.name} links to {target}"
        if anchor and linked.suffix == ".md":
            headings = [
                re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in linked.read_text().splitlines()
                if line.startswith("#")
            ]
            assert anchor in headings, f"{document.name} links to {target}"
