"""Key files and the agent's spool on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.protocol import messages as m
from engine.protocol.agent import SpoolChange
from engine.tasks import NEVER
from executors import curve
from executors.spool import COMPACT_BYTES, SYNC_AFTER_US, Spool


def test_a_key_file_is_for_its_owner_alone_and_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "a.key"
    pair = curve.load_or_generate(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert curve.load_or_generate(path) == pair
    with pytest.raises(FileExistsError):
        curve.save(curve.generate(), path)


def test_a_secret_that_others_may_read_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    curve.load_or_generate(path)
    path.chmod(0o644)
    with pytest.raises(curve.KeyProblem, match="chmod 600"):
        curve.load(path)


@pytest.mark.parametrize("content", ["", "public = 5", "public = 'short'", "\xff", "public = '" + "a" * 40 + "'"])
def test_a_file_that_is_no_key_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.key"
    path.write_text(content, "latin-1")
    path.chmod(0o600)
    with pytest.raises(curve.KeyProblem, match=r"a\.key"):
        curve.load(path)


def test_a_missing_key_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(curve.KeyProblem, match="no key file"):
        curve.load(tmp_path / "none.key")


def test_the_secret_is_not_in_a_key_pairs_text() -> None:
    pair = curve.generate()
    assert pair.secret not in repr(pair)


def test_the_directory_of_authorized_nodes_is_read_again_when_it_changes(tmp_path: Path) -> None:
    allowed = curve.Authorized(tmp_path / "authorized")
    first, second = curve.generate(), curve.generate()
    assert allowed.node_of(first.public) is None
    curve.authorize(tmp_path / "authorized", "gpu-1", first.public)
    assert allowed.node_of(first.public) == "gpu-1"
    curve.authorize(tmp_path / "authorized", "gpu-1", second.public)
    assert allowed.node_of(first.public) is None
    assert allowed.node_of(second.public) == "gpu-1"
    (tmp_path / "authorized" / "gpu-1.pub").unlink()
    assert allowed.node_of(second.public) is None


def test_a_bad_file_among_the_authorized_shuts_out_nobody_else(tmp_path: Path) -> None:
    pair = curve.generate()
    curve.authorize(tmp_path, "good", pair.public)
    (tmp_path / "bad.pub").write_text("no key")
    allowed = curve.Authorized(tmp_path)
    assert allowed.node_of(pair.public) == "good"
    assert "bad.pub" in allowed.problems[0]


@pytest.mark.parametrize("name", ["", "../evil", "a b", "-x", "x" * 64])
def test_a_node_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(curve.KeyProblem, match="node name"):
        curve.authorize(tmp_path, name, curve.generate().public)


def done(number: int) -> m.Done:
    return m.Done(f"r{number}", 1, 0, '{"files":[]}')


def test_the_spool_holds_what_was_kept_and_not_forgotten(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.apply(0, SpoolChange((done(1), done(2), m.Failed("r3", 1), m.Stopped("r4", 1, 0, "cp")), ()))
    spool.apply(0, SpoolChange((), (("r1", 1, 0),)))
    spool.close()
    again = Spool(tmp_path / "spool")
    assert list(again.held.values()) == [done(2), m.Failed("r3", 1), m.Stopped("r4", 1, 0, "cp")]
    again.close()


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_tail_costs_only_the_record_it_tore(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "spool"
    spool = Spool(path)
    spool.apply(0, SpoolChange((done(1),), ()))
    whole = path.stat().st_size
    spool.apply(0, SpoolChange((done(2),), ()))
    spool.close()
    data = path.read_bytes()
    cut = min(cut, len(data) - whole - 1)
    path.write_bytes(data[:-cut])
    again = Spool(path)
    assert list(again.held.values()) == [done(1)]
    assert again.torn_bytes == len(data) - whole - cut
    again.apply(0, SpoolChange((done(3),), ()))
    again.close()
    last = Spool(path)
    assert list(last.held.values()) == [done(1), done(3)]
    last.close()


def test_only_what_is_not_acknowledged_soon_waits_for_the_disk(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.apply(5, SpoolChange((done(1),), ()))
    spool.apply(7, SpoolChange((done(2),), ()))
    assert spool.sync_at == 5 + SYNC_AFTER_US
    spool.apply(9, SpoolChange((), (("r1", 1, 0), ("r2", 1, 0))))
    assert spool.sync_at == NEVER
    spool.apply(9, SpoolChange((done(3),), ()))
    spool.sync()
    assert spool.sync_at == NEVER
    spool.close()


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    spool = Spool(path)
    spool.apply(0, SpoolChange((done(1), done(2)), ()))
    spool.close()
    data = bytearray(path.read_bytes())
    data[len(data) // 2 + 12] ^= 1
    path.write_bytes(data)
    again = Spool(path)
    assert list(again.held.values()) == [done(1)]
    again.close()


def test_the_spool_does_not_grow_for_ever(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.apply(0, SpoolChange((m.Done("stays", 1),), ()))
    large = '"' + "x" * 40_000 + '"'
    for number in range(40):
        spool.apply(0, SpoolChange((m.Done(f"r{number}", 1, 0, large),), ()))
        spool.apply(0, SpoolChange((), ((f"r{number}", 1, 0),)))
    assert (tmp_path / "spool").stat().st_size < 1.2 * COMPACT_BYTES
    assert list(spool.held) == [("stays", 1, 0)]
    spool.close()
