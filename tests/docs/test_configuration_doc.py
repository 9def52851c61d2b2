"""The configuration's documentation names every field with its default."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest

from api.settings import ConfigurationError, Settings, load_settings, settings_table

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"
TABLE = re.compile(r"(<!-- table: [^>]*-->\n)(.*?)(<!-- end -->)", re.DOTALL)


@pytest.fixture(autouse=True)
def _no_outside_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AIGC_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_the_table_lists_every_field_as_the_class_has_it() -> None:
    text = DOCUMENT.read_text()
    if os.environ.get("REWRITE_DOCS"):
        DOCUMENT.write_text(TABLE.sub(lambda found: found[1] + settings_table() + found[3], text))
    found = TABLE.search(DOCUMENT.read_text())
    assert found is not None
    assert found[2] == settings_table(), "run the tests once with REWRITE_DOCS=1"


def test_every_field_says_what_it_means() -> None:
    without = [line for line in settings_table().splitlines()[2:] if line.endswith("|  |")]
    assert without == []


def test_the_example_file_is_valid(tmp_path: Path) -> None:
    example = re.search(r"```toml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert example is not None
    tomllib.loads(example[1])
    path = tmp_path / "example.toml"
    path.write_text(example[1])
    settings = load_settings(path)
    assert settings.tenants["acme"].weight == 3
    assert settings.methods["text_to_image"].gpu_share == 500
    assert "dreambooth" in settings.methods, "naming one method keeps the defaults of the others"


def test_environment_wins_over_the_file_and_flags_over_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.toml"
    path.write_text('state_dir = "from-file"\nlog_level = "error"\n[gateway]\nport = 1\n')
    monkeypatch.setenv("AIGC_GATEWAY__PORT", "2")
    monkeypatch.setenv("AIGC_LOG_LEVEL", "debug")
    settings = load_settings(path, state_dir=Path("from-flag"))
    assert (settings.state_dir, settings.gateway.port, settings.log_level) == (Path("from-flag"), 2, "debug")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[gateway]\nport = 99999\n", "gateway.port"),
        ("[gateway]\nprot = 1\n", "gateway.prot"),
        ("stat_dir = 'x'\n", "stat_dir"),
        ("[methods.sleep]\ngpu_share = 2000\n", "methods.sleep.gpu_share"),
    ],
)
def test_a_wrong_field_is_named(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=re.escape(named)):
        load_settings(path)


def test_a_missing_file_and_broken_toml_are_said_clearly(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        load_settings(tmp_path / "nowhere.toml")
    path = tmp_path / "broken.toml"
    path.write_text("state_dir = ")
    with pytest.raises(ConfigurationError, match="not valid TOML"):
        load_settings(path)


def test_defaults_need_nothing() -> None:
    assert load_settings() == Settings(methods=Settings().methods)
