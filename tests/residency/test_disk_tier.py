"""The disk tier with a real store: one fetch for many, whole models or none, never over its budget, nothing in use ever lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from executors import dfs
from executors.dfs import ObjectFileStore, open_store
from executors.methods.base import ModelMissing
from executors.residency import disk as disk_module
from executors.residency import holds
from executors.residency.disk import DiskTier, NoRoom, key_of

SIZE = 1000


def weights(letter: str, size: int = SIZE) -> bytes:
    """A safetensors file of this size whose bytes are one letter."""
    room = size - 8 - 96
    header = json.dumps({"w": {"dtype": "U8", "shape": [room], "data_offsets": [0, room]}}).encode().ljust(96)
    return len(header).to_bytes(8, "little") + header + letter.encode() * room


@pytest.fixture
def store(tmp_path: Path) -> ObjectFileStore:
    return open_store(f"file://{tmp_path}/files")


@pytest.fixture
def tier(tmp_path: Path, store: ObjectFileStore) -> DiskTier:
    return DiskTier(tmp_path / "cache", store.url, 3 * SIZE)


def put(store: ObjectFileStore, letter: str, size: int = SIZE) -> dict[str, str]:
    return {"adapter.safetensors": store.put_bytes(weights(letter, size)).file_id}


def present(tier: DiskTier) -> set[str]:
    return {path.name for path in tier.root.iterdir() if path.is_dir() and not path.name.startswith(".")}


def ids(tier: DiskTier) -> list[str]:
    return [model for each in tier.on_disk() for model in each.model_ids]


class CountedStore:
    """Counts the fetches of a store, and lets a test stand in the middle of one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fetches = 0
        self.gate = threading.Event()
        self.gate.set()
        self.inside = threading.Event()
        original = dfs.ObjectFileStore.fetch

        def fetch(store: ObjectFileStore, file_id: str, to: Path) -> Path:
            self.fetches += 1
            self.inside.set()
            assert self.gate.wait(30)
            return original(store, file_id, to)

        monkeypatch.setattr(dfs.ObjectFileStore, "fetch", fetch)


@contextmanager
def held_elsewhere(tier: DiskTier, store: ObjectFileStore, files: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a model until its standard input ends."""
    program = (
        "import sys, json; from pathlib import Path\n"
        "from executors.residency.disk import DiskTier\n"
        "root, url, files = json.loads(sys.argv[1])\n"
        "DiskTier(Path(root), url, 3000).fetch('a', files)\n"
        "print('held', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, json.dumps([str(tier.root), store.url, files])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        yield other


def test_many_threads_that_want_one_model_make_one_fetch(
    tier: DiskTier, store: ObjectFileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = put(store, "a")
    counted = CountedStore(monkeypatch)
    counted.gate.clear()
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(tier.fetch("m", files))) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert counted.inside.wait(30)
    counted.gate.set()
    for thread in threads:
        thread.join(30)
    assert counted.fetches == 1
    assert found == [tier.root / key_of(files)] * 8
    for _ in range(8):
        tier.release(files)
    with pytest.raises(ValueError, match="more often"):
        tier.release(files)


def test_a_fetch_does_not_keep_other_models_waiting(
    tier: DiskTier, store: ObjectFileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, quick = put(store, "s"), put(store, "q")
    tier.fetch("quick", quick, hold=False)
    counted = CountedStore(monkeypatch)
    counted.gate.clear()
    thread = threading.Thread(target=tier.fetch, args=("slow", slow), kwargs={"hold": False})
    thread.start()
    assert counted.inside.wait(30)
    assert tier.fetch("quick", quick, hold=False).is_dir()
    tier.pin("quick")
    counted.gate.set()
    thread.join(30)
    assert sorted(ids(tier)) == ["quick", "slow"]


def test_what_is_held_or_pinned_stays_and_a_model_that_is_needed_now_is_fetched_all_the_same(
    tier: DiskTier, store: ObjectFileStore
) -> None:
    files = {letter: put(store, letter) for letter in "abcd"}
    tier.fetch("a", files["a"])
    tier.pin("b")
    tier.fetch("b", files["b"], hold=False)
    tier.fetch("c", files["c"])
    with pytest.raises(NoRoom, match="pinned or in use"):
        tier.fetch("d", files["d"], hold=False, ahead=True)
    path = tier.fetch("d", files["d"])
    assert (path / "adapter.safetensors").read_bytes() == weights("d")
    assert tier.counts()["bytes"] == 3 * SIZE
    assert tier.counts()["refusals"] == 2
    tier.pin("a")  # Any change of the ledger looks at what does not belong there.
    assert path.is_dir(), "it is held"
    tier.release(files["d"])
    tier.pin("a")
    assert not path.exists(), "it has no place here once nobody holds it"
    assert present(tier) == {key_of(files[letter]) for letter in "abc"}
    for letter in "ac":
        tier.release(files[letter])


def test_an_unpinned_model_goes_like_others(tier: DiskTier, store: ObjectFileStore) -> None:
    tier.pin("a")
    for letter in "abcd":
        tier.fetch(letter, put(store, letter), hold=False)
    assert "a" in ids(tier)
    tier.unpin("a")
    for letter in "ef":
        tier.fetch(letter, put(store, letter), hold=False)
    assert "a" not in ids(tier)


def test_a_dropped_model_is_gone_unless_it_is_in_use(tier: DiskTier, store: ObjectFileStore) -> None:
    files = put(store, "a")
    tier.pin("a")
    path = tier.fetch("a", files)
    assert tier.drop("a") == 0
    assert path.is_dir()
    assert ids(tier) == []
    tier.tidy()
    assert path.is_dir(), "it is in use"
    tier.release(files)
    tier.tidy()
    assert not path.exists()
    assert tier.counts()["bytes"] == 0
    tier.fetch("a", files, hold=False)
    assert tier.drop("a") == SIZE
    assert not path.exists()
    assert tier.drop("never here") == 0


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calls=st.lists(
        st.tuples(st.sampled_from("fhrpud"), st.sampled_from("abcdef")),
        min_size=1,
        max_size=25,
    )
)
def test_whatever_is_asked_the_tier_is_within_its_budget_and_its_ledger_is_true(
    tmp_path_factory: pytest.TempPathFactory, calls: list[tuple[str, str]]
) -> None:
    home = tmp_path_factory.mktemp("tier")
    store = open_store(f"file://{home}/files")
    sizes = {letter: 300 + 250 * number for number, letter in enumerate("abcdef")}
    files = {letter: put(store, letter, size) for letter, size in sizes.items()}
    tier = DiskTier(home / "cache", store.url, 2500)
    held: dict[str, int] = {}
    pinned: set[str] = set()
    try:
        for call, letter in calls:
            match call:
                case "f":
                    tier.fetch(letter, files[letter], hold=False)
                case "h":
                    tier.fetch(letter, files[letter])
                    held[letter] = held.get(letter, 0) + 1
                case "r" if held.get(letter):
                    tier.release(files[letter])
                    held[letter] -= 1
                case "p":
                    before = set(ids(tier))
                    tier.pin(letter)
                    pinned |= {letter} & before
                case "u":
                    tier.unpin(letter)
                    pinned.discard(letter)
                case "d":
                    tier.drop(letter)
                    pinned.discard(letter)
                case _:
                    continue
            counts = tier.counts()
            on_disk = tier.on_disk()
            assert counts["bytes"] <= 2500
            assert counts["bytes"] == sum(sizes[each.model_ids[0]] for each in on_disk)
            for letter_held, times in held.items():
                if times:
                    path = tier.root / key_of(files[letter_held]) / "adapter.safetensors"
                    assert path.stat().st_size == sizes[letter_held]
            assert pinned <= set(ids(tier))
    finally:
        for letter, times in held.items():
            for _ in range(times):
                tier.release(files[letter])


# --- crashes ----------------------------------------------------------------------------------------------------------


def test_a_process_that_is_killed_in_the_middle_of_a_fetch_leaves_nothing_half(
    tier: DiskTier, store: ObjectFileStore, tmp_path: Path
) -> None:
    files = put(store, "a")
    program = (
        "import sys, time, json; from pathlib import Path\n"
        "from executors import dfs; from executors.residency.disk import DiskTier\n"
        "root, url, files = json.loads(sys.argv[1])\n"
        "def fetch(store, file_id, to):\n"
        "    to.write_bytes(b'half'); print('inside', flush=True); time.sleep(600)\n"
        "dfs.ObjectFileStore.fetch = fetch\n"
        "DiskTier(Path(root), url, 3000).fetch('m', files)\n"
    )
    argument = json.dumps([str(tier.root), store.url, files])
    with subprocess.Popen([sys.executable, "-c", program, argument], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "inside\n"
        assert [each for each in tier.root.iterdir() if each.name.endswith(".part")]
        process.send_signal(signal.SIGKILL)
    path = tier.fetch("m", files, hold=False)
    assert (path / "adapter.safetensors").read_bytes() == weights("a")
    assert [each for each in tier.root.iterdir() if each.name.endswith(".part")] == []
    assert tier.counts()["bytes"] == SIZE


@pytest.mark.parametrize("spoiled", [b"", b"{", b'{"format": 99}', b"null", b'{"format":1,"entries":{"x":{}}}'])
def test_without_a_ledger_that_can_be_read_the_models_are_taken_in_as_they_are(
    tier: DiskTier, store: ObjectFileStore, spoiled: bytes
) -> None:
    for letter in "abc":
        tier.fetch(letter, put(store, letter), hold=False)
    (tier.root / "ledger.json").write_bytes(spoiled)
    tier.fetch("d", put(store, "d"), hold=False)
    assert tier.counts()["bytes"] == 3 * SIZE
    assert len(present(tier)) == 3


def test_a_model_whose_files_were_cut_by_a_power_cut_is_fetched_again(tier: DiskTier, store: ObjectFileStore) -> None:
    files = put(store, "a")
    path = tier.fetch("a", files, hold=False) / "adapter.safetensors"
    path.write_bytes(weights("a")[:500])
    assert tier.fetch("a", files, hold=False) / "adapter.safetensors" == path
    assert path.read_bytes() == weights("a")
    assert tier.counts()["bytes"] == SIZE


def test_a_model_whose_bytes_rotted_is_fetched_again_by_who_takes_hold_of_it(
    tier: DiskTier, store: ObjectFileStore
) -> None:
    files = put(store, "a")
    path = tier.fetch("a", files, hold=False) / "adapter.safetensors"
    path.write_bytes(weights("a")[:-1] + b"x")
    tier.fetch("a", files)
    assert path.read_bytes() == weights("a")
    assert tier.counts()["bytes"] == SIZE
    tier.release(files)


def test_a_damaged_model_that_another_pod_uses_is_refused_not_waited_for(
    tier: DiskTier, store: ObjectFileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holds, "DAMAGED_WAIT_S", 0.0)
    files = put(store, "a")
    with held_elsewhere(tier, store, files) as other:
        path = tier.root / key_of(files) / "adapter.safetensors"
        path.write_bytes(weights("a")[:-1] + b"x")
        with pytest.raises(NoRoom, match="damaged and in use"):
            tier.fetch("a", files)
        other.kill()
    tier.fetch("a", files)
    assert path.read_bytes() == weights("a")
    tier.release(files)


def test_a_large_model_is_believed_by_its_size(
    tier: DiskTier, store: ObjectFileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "VERIFIED_BYTES", SIZE - 1)
    files = put(store, "a")
    path = tier.fetch("a", files, hold=False) / "adapter.safetensors"
    path.write_bytes(weights("a")[:-1] + b"x")
    tier.fetch("a", files)
    assert path.read_bytes().endswith(b"x")
    tier.release(files)


def test_a_model_that_somebody_deleted_is_fetched_again(tier: DiskTier, store: ObjectFileStore) -> None:
    files = put(store, "a")
    path = tier.fetch("a", files, hold=False)
    (path / "adapter.safetensors").unlink()
    path.rmdir()
    assert (tier.fetch("a", files, hold=False) / "adapter.safetensors").is_file()
    assert tier.counts()["bytes"] == SIZE


def test_a_budget_that_was_lowered_is_kept_from_the_next_change_on(tier: DiskTier, store: ObjectFileStore) -> None:
    for letter in "abc":
        tier.fetch(letter, put(store, letter), hold=False)
    smaller = DiskTier(tier.root, store.url, SIZE)
    smaller.unpin("nobody")
    assert smaller.counts()["bytes"] == SIZE
    assert ids(smaller) == ["c"]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_malicious_file_is_refused_with_the_reason_and_leaves_nothing(tier: DiskTier, store: ObjectFileStore) -> None:
    bomb = (1 << 62).to_bytes(8, "little") + b"{}"
    files = {"adapter.safetensors": store.put_bytes(bomb).file_id}
    with pytest.raises(ModelMissing, match="header claims"):
        tier.fetch("bomb", files)
    with pytest.raises(ModelMissing, match="may run code"):
        tier.fetch("pickle", {"weights.bin": store.put_bytes(b"\x80\x04").file_id})
    with pytest.raises(ModelMissing, match="plain file name"):
        tier.fetch("path", {"../../etc/x": store.put_bytes(b"x").file_id})
    with pytest.raises(ModelMissing, match="from 1 to"):
        tier.fetch("none", {})
    assert present(tier) == set()
    assert tier.counts()["bytes"] == 0


def test_a_corrupt_or_absent_file_is_refused_and_its_room_given_back(
    tier: DiskTier, store: ObjectFileStore, tmp_path: Path
) -> None:
    files = put(store, "a")
    file_id = files["adapter.safetensors"]
    (tmp_path / "files" / "sha256" / file_id[:2] / file_id).write_bytes(weights("b"))
    with pytest.raises(ModelMissing, match="SHA-256"):
        tier.fetch("a", files)
    with pytest.raises(ModelMissing, match="not in the file store"):
        tier.fetch("gone", {"adapter.safetensors": "0" * 64})
    with pytest.raises(ModelMissing, match="64 lower-case"):
        tier.fetch("odd", {"adapter.safetensors": "zz"})
    assert tier.counts()["bytes"] == 0


def test_a_disk_without_space_refuses_before_the_first_byte(
    tier: DiskTier, store: ObjectFileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = put(store, "a")
    counted = CountedStore(monkeypatch)
    monkeypatch.setattr(disk_module, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(NoRoom, match="free some space"):
        tier.fetch("a", files)
    assert counted.fetches == 0
    assert tier.counts()["bytes"] == 0


def test_a_model_trained_anew_replaces_what_its_name_meant(tier: DiskTier, store: ObjectFileStore) -> None:
    tier.fetch("dog", put(store, "a"), hold=False)
    tier.fetch("dog", put(store, "b"), hold=False)
    assert ids(tier) == ["dog"]
    tier.pin("dog")
    for letter in "cde":
        tier.fetch(letter, put(store, letter), hold=False)
    assert key_of(put(store, "b")) in present(tier)
    assert key_of(put(store, "a")) not in present(tier)


def test_uses_by_one_process_that_holds_a_model_count_for_it(tier: DiskTier, store: ObjectFileStore) -> None:
    files = put(store, "a")
    for _ in range(5):
        tier.fetch("a", files)
    tier.pin("x")
    assert tier.counts()["hits"] == 4
    for _ in range(5):
        tier.release(files)


def test_two_processes_and_an_eviction_at_the_same_time_lose_nothing(tier: DiskTier, store: ObjectFileStore) -> None:
    files = {letter: put(store, letter) for letter in "abcdef"}
    program = (
        "import sys, json; from pathlib import Path\n"
        "from executors.residency.disk import DiskTier\n"
        "root, url, files, order = json.loads(sys.argv[1])\n"
        "tier = DiskTier(Path(root), url, 3000)\n"
        "for letter in order:\n"
        "    path = tier.fetch(letter, files[letter]) / 'adapter.safetensors'\n"
        "    content = path.read_bytes()\n"
        "    assert len(content) == 1000 and content.endswith(letter.encode()), (letter, len(content))\n"
        "    tier.release(files[letter])\n"
        "print('ok')\n"
    )
    orders = ["abcdef" * 6, "fedcba" * 6]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, json.dumps([str(tier.root), store.url, files, order])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for order in orders
    ]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert output == "ok\n", errors
    assert tier.counts()["bytes"] <= 3 * SIZE
    assert len(present(tier)) <= 3
    assert len(list(tier.root.glob("*.lock"))) <= len(present(tier)) + 1 + 6


def test_several_processes_hold_one_model_and_a_hold_ends_with_its_process(
    tier: DiskTier, store: ObjectFileStore
) -> None:
    files = put(store, "a")
    with held_elsewhere(tier, store, files) as other:
        assert tier.fetch("a", files).is_dir()
        tier.release(files)
        assert tier.drop("a") == 0
        tier.tidy()
        assert len(present(tier)) == 1
        other.kill()
    tier.tidy()
    assert present(tier) == set()
