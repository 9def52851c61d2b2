"""The state directory keeps secrets private, makes them once, and can be checked."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from api.state_dir import StateDir, check_database, write_private


def test_a_secret_is_made_once_even_when_many_ask_at_once(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    state.create()
    with ThreadPoolExecutor(8) as pool:
        secrets = set(pool.map(lambda _: state.secret("internal"), range(32)))
    assert len(secrets) == 1
    assert len(secrets.pop()) == 64
    assert state.secret("internal") != state.secret("links")


def test_only_the_owner_may_read_secrets_and_the_directory(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    state.create()
    state.secret("internal")
    write_private(state.operator_key, "key")
    assert (state.root.stat().st_mode & 0o777) == 0o700
    assert ((state.root / "secrets" / "internal").stat().st_mode & 0o777) == 0o600
    assert (state.operator_key.stat().st_mode & 0o777) == 0o600
    assert state.operator_key.read_text() == "key\n"


def test_a_broken_database_is_told_from_a_sound_one(tmp_path: Path) -> None:
    sound, broken = tmp_path / "sound.db", tmp_path / "broken.db"
    with sqlite3.connect(sound) as database:
        database.execute("CREATE TABLE t (x)")
    broken.write_bytes(b"this is no database" * 100)
    assert check_database(sound) == "ok"
    assert check_database(tmp_path / "none.db") == "absent"
    assert "not a database" in check_database(broken)
