"""The parts of a Pod one by one: its wire, its birth without a fork, its models, its failures' names, and the prefetch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from engine.tasks import FailureCause
from executors import pod_nursery, pod_wire
from executors.devices.cpu import NO_GPU_ENVIRONMENT
from executors.dfs import ObjectFileStore, open_store
from executors.methods.base import InputRefused, ModelMissing
from executors.methods.parameters import ParameterError, validate
from executors.pod_attempts import InputFileMissing, cause_of
from executors.pod_main import PodSpec, log_tail
from executors.pod_models import BaseModelMissing, ModelCache
from executors.pod_wire import Channel, Frames, encode
from executors.residency.stock import NodeStock

GENEROUS_S = 60.0


def _wait_until(done: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + GENEROUS_S
    while not done():
        assert time.monotonic() < deadline, f"waited in vain for {why}"
        threading.Event().wait(0.01)


# --- the wire -------------------------------------------------------------------------------------------------------


def test_messages_survive_any_cut_of_the_stream() -> None:
    messages = [{"op": "a", "text": "größe"}, {"op": "b", "list": list(range(50))}, {"op": "c"}]
    stream = b"".join(encode(message) for message in messages)
    for size in (1, 3, 7, len(stream)):
        frames = Frames()
        assert [
            found for at in range(0, len(stream), size) for found in frames.feed(stream[at : at + size])
        ] == messages


@pytest.mark.parametrize("stream", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x02[]", b"\x00\x00\x00\x01{"])
def test_nonsense_is_no_message(stream: bytes) -> None:
    with pytest.raises(ValueError):
        Frames().feed(stream)
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    with theirs:
        theirs.sendall(stream)
        assert channel.receive() == []
    assert channel.closed
    channel.close()


def test_a_message_that_is_too_long_is_refused_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_wire, "MAX_MESSAGE_BYTES", 100)
    with pytest.raises(ValueError, match="file store"):
        encode({"op": "start", "text": "x" * 100})


def test_a_full_socket_delays_a_message_and_blocks_nobody() -> None:
    ours, theirs = socket.socketpair()
    channel, frames = Channel(ours), Frames()
    sent = [{"op": "n", "number": number, "text": "x" * 50_000} for number in range(40)]
    for message in sent:
        channel.send(message)
    theirs.settimeout(GENEROUS_S)
    received: list[object] = []
    while len(received) < len(sent):
        received += frames.feed(theirs.recv(1 << 16))
        channel.flush()
    assert received == sent
    theirs.close()
    channel.send({"op": "into the void"})
    assert channel.receive() == []
    assert channel.closed
    channel.close()


# --- birth without a fork -------------------------------------------------------------------------------------------


def test_a_pod_can_be_born_as_a_fresh_program_where_forking_is_not_sound(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/files")
    spec = PodSpec(
        pod=1,
        method="sleep",
        factory="",
        model={},
        models=ModelCache(tmp_path / "cache", store.url).to_json(),
        store_url=store.url,
        directory=str(tmp_path),
        log=str(tmp_path / "pod.log"),
        device="cpu",
        environment=dict(NO_GPU_ENVIRONMENT),
        join_files=(),
        data_bytes=0,
        gpu_memory_cap_bytes=0,
        threads=1,
    )
    ours, theirs = socket.socketpair()
    pid = pod_nursery._spawn(theirs.detach())
    try:
        frames = Frames()
        ours.settimeout(GENEROUS_S)
        ours.sendall(encode({"op": "spec", "spec": asdict(spec)}))
        [up] = frames.feed(ours.recv(1 << 16))
        assert up["op"] == "up"
        assert os.getsid(pid) == pid
        ours.sendall(encode({"op": "end"}))
        assert ours.recv(1) == b""
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        ours.close()


def test_a_process_with_a_second_thread_does_not_fork() -> None:
    program = (
        "import threading\n"
        "from executors.pod_process import is_single_threaded\n"
        "alone = is_single_threaded()\n"
        "done = threading.Event()\n"
        "threading.Thread(target=done.wait).start()\n"
        "print(alone, is_single_threaded())\n"
        "done.set()\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout == "True False\n"


def test_an_unknown_nursery_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose one of"):
        pod_nursery.Nursery("kinder", tmp_path / "log")


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> ObjectFileStore:
    return open_store(f"file://{tmp_path}/files")


@pytest.fixture
def cache(tmp_path: Path, store: ObjectFileStore) -> ModelCache:
    for name in ("sd15", "org/name"):
        (tmp_path / "bases" / name).mkdir(parents=True)
        (tmp_path / "bases" / name / "model_index.json").write_text("{}")
    (tmp_path / "bases" / "empty").mkdir()
    return ModelCache(tmp_path / "cache", store.url, tmp_path / "bases", cache_max_bytes=3000)


def _weights(letter: str, size: int = 1000) -> bytes:
    """A safetensors file of this size that ends with its letter."""
    room = size - 8 - 96
    header = json.dumps({"w": {"dtype": "U8", "shape": [room], "data_offsets": [0, room]}}).encode().ljust(96)
    return len(header).to_bytes(8, "little") + header + letter.encode() * room


def _adapter(store: ObjectFileStore, letter: str, size: int = 1000) -> dict[str, str]:
    return {"adapter.safetensors": store.put_bytes(_weights(letter, size)).file_id}


def test_a_base_model_is_found_by_its_path_below_the_models_directory(cache: ModelCache, tmp_path: Path) -> None:
    for name in ("sd15", "org/name"):
        found = cache.resolve({"id": name, "base": name, "adapter": None, "path": None})
        assert found is not None
        assert (found.id, found.base_dir, found.adapter_dir) == (name, tmp_path / "bases" / name, None)
    assert cache.resolve({}) is None


@pytest.mark.parametrize("name", ["absent", "empty", "../bases/sd15", "/etc", "org/../sd15", "", "."])
def test_a_base_model_that_is_not_there_is_missing_for_pods_and_for_methods(cache: ModelCache, name: str) -> None:
    with pytest.raises(ModelMissing):
        cache.resolve({"id": "x", "base": name or "?"})
    with pytest.raises(FileNotFoundError):
        cache.base_dir(name)


def test_a_model_may_lie_in_a_directory_of_its_own(cache: ModelCache, tmp_path: Path) -> None:
    found = cache.resolve({"id": "mine", "path": str(tmp_path / "bases" / "sd15")})
    assert found is not None
    assert (found.id, found.base_dir) == ("mine", tmp_path / "bases" / "sd15")
    with pytest.raises(ModelMissing, match="no directory"):
        cache.resolve({"id": "mine", "path": str(tmp_path / "gone")})


def test_an_adapter_is_fetched_once_and_checked(cache: ModelCache, store: ObjectFileStore) -> None:
    model = {"id": "dog", "base": "sd15", "adapter": _adapter(store, "a")}
    cache.prefetch(model)
    [directory] = [path for path in cache.cache_dir.iterdir() if path.is_dir()]
    assert (directory / "adapter.safetensors").read_bytes() == _weights("a")
    store.delete(model["adapter"]["adapter.safetensors"])
    cache.prefetch(model)


def test_an_adapter_that_is_absent_corrupt_or_oddly_named_is_missing(
    cache: ModelCache, store: ObjectFileStore, tmp_path: Path
) -> None:
    spoiled = _adapter(store, "s")
    file_id = spoiled["adapter.safetensors"]
    (tmp_path / "files" / "sha256" / file_id[:2] / file_id).write_bytes(_weights("s")[:-1] + b"x")
    for adapter in ({"a.bin": "0" * 64}, {"a.bin": "no id"}, {"../a": "0" * 64}, {".hidden": "0" * 64}, spoiled):
        with pytest.raises(ModelMissing, match=r"model\.adapter"):
            cache.resolve({"id": "x", "base": "sd15", "adapter": adapter})
    assert [path for path in cache.cache_dir.iterdir() if path.is_dir()] == []


def test_the_cache_evicts_the_least_recently_used_but_nothing_that_is_held(
    cache: ModelCache, store: ObjectFileStore
) -> None:
    adapters = {letter: _adapter(store, letter) for letter in "abcde"}

    def present() -> str:
        contents = [next(path.iterdir()).read_bytes() for path in cache.cache_dir.iterdir() if path.is_dir()]
        return "".join(sorted(content[-1:].decode() for content in contents))

    def fetch(letter: str) -> None:
        cache.prefetch({"id": letter, "base": "sd15", "adapter": adapters[letter]})
        newest = max(path.stat().st_mtime_ns for path in cache.cache_dir.iterdir() if path.is_dir())
        _wait_until(lambda: time.time_ns() > newest, "the clock")

    for letter in "abc":
        fetch(letter)
    assert present() == "abc"
    fetch("a")
    fetch("d")
    assert present() == "acd"
    holder = (
        "import sys, json; from executors.pod_models import ModelCache\n"
        "fields, model = json.loads(sys.argv[1])\n"
        "ModelCache.from_json(fields).resolve(model)\n"
        "print('held', flush=True); sys.stdin.read()\n"
    )
    argument = json.dumps([cache.to_json(), {"id": "c", "base": "sd15", "adapter": adapters["c"]}])
    command = [sys.executable, "-c", holder, argument]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        for letter in "bea":
            fetch(letter)
        assert "c" in present()
        assert len(present()) == 3
        assert process.stdin is not None
        process.stdin.close()


def test_a_fetch_that_was_cut_off_leaves_no_half_model(cache: ModelCache, store: ObjectFileStore) -> None:
    model = {"id": "dog", "base": "sd15", "adapter": _adapter(store, "a")}
    cache.prefetch(model)
    [directory] = [path for path in cache.cache_dir.iterdir() if path.is_dir()]
    for path in directory.iterdir():
        path.unlink()
    directory.rename(cache.cache_dir / f".{directory.name}.abcd.part")
    cache.prefetch(model)
    assert [path.name for path in cache.cache_dir.iterdir() if path.is_dir()] == [directory.name]


def test_a_prefetch_runs_in_the_background_and_its_failure_is_logged(
    cache: ModelCache, store: ObjectFileStore, caplog: pytest.LogCaptureFixture
) -> None:
    stock = NodeStock(cache)
    stock.bring({"id": "gone", "base": "gone"})
    stock.bring({"id": "dog", "base": "sd15", "adapter": _adapter(store, "a")})
    _wait_until(lambda: any(path.is_dir() for path in cache.cache_dir.glob("[0-9a-f]*")), "the model")
    stock.close()
    assert '"gone"' in caplog.text
    assert "is not on this node" in caplog.text


# --- names of failures ----------------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


def _parameter_error() -> Exception:
    with pytest.raises(ParameterError) as caught:
        validate("sleep", {"seconds": -1})
    return caught.value


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (MemoryError(), FailureCause.OUT_OF_MEMORY),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate"), FailureCause.OUT_OF_MEMORY),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"),
            FailureCause.OUT_OF_MEMORY,
        ),
        (OSError(12, "Cannot allocate memory"), FailureCause.OUT_OF_MEMORY),
        (ModelMissing("x"), FailureCause.MODEL_MISSING),
        (BaseModelMissing("x"), FailureCause.MODEL_MISSING),
        (InputRefused("pictures", "no picture"), FailureCause.BAD_INPUT),
        (InputFileMissing("x"), FailureCause.BAD_INPUT),
        (_parameter_error(), FailureCause.BAD_INPUT),
        (RuntimeError("CUDA error: unspecified launch failure"), FailureCause.GPU_LOST),
        (FileNotFoundError("x"), FailureCause.CRASHED),
        (ValueError("out of memory of what was said"), FailureCause.CRASHED),
    ],
)
def test_a_failure_is_named_by_what_raised_it(error: Exception, cause: FailureCause) -> None:
    assert cause_of(error) is cause


def test_a_logs_tail_is_its_end_in_whole_lines_of_text(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert log_tail(log) == ""
    log.write_bytes("ä".encode() * 100 + b"\nend\n")
    assert log_tail(log, 10).endswith("ä\nend")
    assert len(log_tail(log, 10)) <= 10
