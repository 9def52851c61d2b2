"""The file store: one contract for every kind of store, then what only a local directory or S3 can do wrong."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from executors import dfs
from executors.dfs import CorruptFile, ObjectFileStore, object_path, open_store

ABSENT = "0" * 64


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """A local S3 server with one bucket; skips where none is installed."""
    program = shutil.which("moto_server")
    if program is None:
        pytest.skip("no moto_server on the PATH: pip install 'moto[server]' to run the S3 tests")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    command = [program, "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            if server.poll() is not None:
                pytest.skip("moto_server does not start here")
            try:
                bucket = urllib.request.Request(f"{endpoint}/files", method="PUT")
                urllib.request.urlopen(bucket, timeout=5).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    pytest.skip("moto_server does not answer here")
                threading.Event().wait(0.1)
        yield endpoint
    finally:
        server.kill()
        server.wait()


@pytest.fixture(params=["file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectFileStore:
    """An empty store of each kind."""
    match request.param:
        case "file":
            return open_store(f"file://{tmp_path}/store")
        case "memory":
            return open_store("memory://")
        case _:
            endpoint = request.getfixturevalue("s3_endpoint")
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
            return open_store(f"s3://files/{tmp_path.name}?endpoint={endpoint}")


def test_what_is_put_is_read_back_under_its_digest(store: ObjectFileStore) -> None:
    ref = store.put_bytes(b"picture", "image/png")
    assert ref.file_id == hashlib.sha256(b"picture").hexdigest()
    assert store.stat(ref.file_id) == ref
    assert (ref.size_bytes, ref.media_type) == (7, "image/png")
    assert b"".join(store.read(ref.file_id)) == b"picture"


def test_an_empty_file_is_a_file(store: ObjectFileStore) -> None:
    ref = store.put_bytes(b"")
    assert store.stat(ref.file_id) == ref
    assert b"".join(store.read(ref.file_id)) == b""


def test_a_large_file_is_streamed_in_and_out(store: ObjectFileStore, tmp_path: Path) -> None:
    source = tmp_path / "large"
    source.write_bytes(os.urandom(1 << 20) * 11)
    ref = store.put_path(source, "application/x-safetensors")
    assert ref.size_bytes == source.stat().st_size > dfs.SINGLE_PUT_BYTES
    chunks = list(store.read(ref.file_id))
    assert len(chunks) > 3
    assert b"".join(chunks) == source.read_bytes()
    assert store.stat(ref.file_id) == ref
    fetched = store.fetch(ref.file_id, tmp_path / "deep" / "copy")
    assert fetched.read_bytes() == source.read_bytes()
    assert [entry.name for entry in fetched.parent.iterdir()] == ["copy"]


def test_equal_bytes_are_one_file_with_the_first_media_type(store: ObjectFileStore) -> None:
    first = store.put_bytes(b"same", "image/png")
    assert store.put_bytes(b"same", "text/plain") == first
    assert [ref.file_id for ref in store.files()] == [first.file_id]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 4, b"0123"),
        (3, 5, b"34"),
        (7, None, b"789"),
        (8, 99, b"89"),
        (10, 12, b""),
        (4, 4, b""),
        (0, None, b"0123456789"),
    ],
)
def test_a_range_is_read(store: ObjectFileStore, start: int, end: int | None, expected: bytes) -> None:
    ref = store.put_bytes(b"0123456789")
    assert b"".join(store.read(ref.file_id, start, end)) == expected


def test_a_range_that_is_none_is_refused(store: ObjectFileStore) -> None:
    ref = store.put_bytes(b"0123456789")
    for start, end in [(-1, 3), (5, 4)]:
        with pytest.raises(ValueError, match="range"):
            store.read(ref.file_id, start, end)


def test_an_absent_file_is_told_at_once(store: ObjectFileStore, tmp_path: Path) -> None:
    assert store.stat(ABSENT) is None
    assert store.delete(ABSENT) is False
    with pytest.raises(FileNotFoundError):
        store.read(ABSENT)
    with pytest.raises(FileNotFoundError):
        store.fetch(ABSENT, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_deleted_file_is_gone_with_its_media_type(store: ObjectFileStore) -> None:
    ref = store.put_bytes(b"short-lived", "image/png")
    assert store.delete(ref.file_id) is True
    assert store.stat(ref.file_id) is None
    assert store.put_bytes(b"short-lived").media_type == "application/octet-stream"


@pytest.mark.parametrize(
    "bad", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 65, "a" * 63 + "/", "a" * 64 + "\n", "a" * 62 + ".."]
)
def test_no_id_names_another_path(store: ObjectFileStore, bad: str, tmp_path: Path) -> None:
    for call in (store.stat, store.read, store.delete, lambda name: store.fetch(name, tmp_path / "x"), object_path):
        with pytest.raises(ValueError, match="64 lower-case hex"):
            call(bad)


@pytest.mark.parametrize("bad", ["png", "image/png\r\nX-Evil: 1", "", "a" * 80 + "/b"])
def test_a_media_type_that_is_none_is_refused(store: ObjectFileStore, bad: str) -> None:
    with pytest.raises(ValueError, match="media type"):
        store.put_bytes(b"x", bad)
    assert list(store.files()) == []


def _corrupt(root: Path, file_id: str) -> Path:
    path = root / object_path(file_id)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


def test_corrupt_bytes_never_reach_a_readers_end(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/store")
    content = b"z" * (3 << 20)
    ref = store.put_bytes(content)
    _corrupt(tmp_path / "store", ref.file_id)
    received = b""
    with pytest.raises(CorruptFile, match=ref.file_id):
        for chunk in store.read(ref.file_id):
            received += chunk
    assert len(received) < len(content)
    with pytest.raises(CorruptFile):
        store.fetch(ref.file_id, tmp_path / "out" / "copy")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_of_the_wrong_size_is_stored_again(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/store")
    ref = store.put_bytes(b"whole", "image/png")
    (tmp_path / "store" / object_path(ref.file_id)).write_bytes(b"who")
    store.put_bytes(b"whole", "image/png")
    assert b"".join(store.read(ref.file_id)) == b"whole"


def test_a_source_that_changes_under_way_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "growing"
    source.write_bytes(b"a" * (dfs.SINGLE_PUT_BYTES + 10))
    hashed = dfs._hash

    def hash_then_change(chunks: Iterator[bytes]) -> tuple[str, int]:
        result = hashed(chunks)
        source.write_bytes(b"b" * (dfs.SINGLE_PUT_BYTES + 10))
        return result

    monkeypatch.setattr(dfs, "_hash", hash_then_change)
    for url in ("memory://", f"file://{tmp_path}/store"):
        source.write_bytes(b"a" * (dfs.SINGLE_PUT_BYTES + 10))
        store = open_store(url)
        with pytest.raises(ValueError, match="changed while it was stored"):
            store.put_path(source)
        assert list(store.files()) == []
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"file://{tmp_path}/store")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dfs, "synced", full)
    with pytest.raises(OSError, match="No space"):
        store.put_bytes(b"too much")
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


def test_two_processes_share_a_directory_but_not_memory(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/a%20store")
    ref = store.put_bytes(b"shared", "image/png")
    assert store.shared
    assert (tmp_path / "a store").is_dir()
    assert open_store(store.url).stat(ref.file_id) == ref
    assert not open_store("memory://").shared


def test_s3_links_read_the_file_without_credentials(
    s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    store = open_store(f"s3://files/{tmp_path.name}?endpoint={s3_endpoint}")
    ref = store.put_bytes(b"linked", "image/png")
    link = store.link(ref.file_id, 60)
    assert link is not None
    with urllib.request.urlopen(link, timeout=10) as answer:
        assert answer.read() == b"linked"
        assert answer.headers["Content-Type"] == "image/png"
    assert open_store("memory://").link(ref.file_id, 60) is None


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("file://relative/path", "file:///absolute/path"),
        ("/var/files", "unknown kind"),
        ("ftp://host/x", "unknown kind"),
        ("s3://", "s3://bucket"),
        ("s3://key:secret@bucket", "AWS_ACCESS_KEY_ID"),
        ("s3://bucket?endpont=http://x", "endpont"),
    ],
)
def test_a_wrong_url_says_what_is_wrong(url: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        open_store(url)
