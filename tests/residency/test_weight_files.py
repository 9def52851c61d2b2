"""Weight files that lie about themselves, could run code or hold no numbers are refused with the reason before they are read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executors.residency.weights import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    WeightsRefused,
    check_directory,
    check_finite,
    check_floats,
    check_name,
    inspect,
)

F32 = np.arange(6, dtype="<f4")


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(folder: Path, content: bytes, name: str = "w.safetensors") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def good(tensors: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    names = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64", "uint16": "BF16", "uint8": "F8_E5M2"}
    header, data = {}, b""
    for name, value in tensors.items():
        part = value.tobytes()
        header[name] = tensor(len(data), len(data) + len(part), list(value.shape), names[str(value.dtype)])
        data += part
    return raw(header, data)


def test_a_true_file_is_read_in_the_order_of_its_bytes(tmp_path: Path) -> None:
    path = write(
        tmp_path, raw({"b": tensor(8, 24, [2, 2]), "a": tensor(0, 8, [2]), "__metadata__": {"k": "v"}}, b"\0" * 24)
    )
    found = inspect(path)
    assert [(each.name, each.shape) for each in found.tensors] == [("a", (2,)), ("b", (2, 2))]
    assert found.metadata == {"k": "v"}
    check_finite(found)
    check_floats(found)


def test_what_the_library_writes_is_taken(tmp_path: Path) -> None:
    from safetensors.numpy import save

    content = save(
        {"x": F32.reshape(2, 3), "empty": np.zeros((0, 4), dtype=np.float32), "one": np.ones((), np.float16)}
    )
    found = inspect(write(tmp_path, content))
    assert {each.name: each.shape for each in found.tensors} == {"x": (2, 3), "empty": (0, 4), "one": ()}
    check_finite(found)


LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too few for a header"),
    "header bomb": (raw(b"{}", length=1 << 62), f"the limit is {MAX_HEADER_BYTES}"),
    "header beyond the file": (raw(b"{}", length=4096), "cut off or no safetensors"),
    "pickle": (b"\x80\x04\x95" + b"\0" * 64, "header claims"),
    "no json": (raw(b"{nope"), "header cannot be read"),
    "nested too deep": (raw(b"[" * 200_000), "header cannot be read"),
    "no object": (raw([1]), "no set of tensors"),
    "not text": (raw(b"\xff\xfe"), "header cannot be read"),
    "a name twice": (raw(b'{"a": {}, "a": {}}'), "appears twice"),
    "odd metadata": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "lacks a field": (raw({"w": {"dtype": "F32", "shape": [1]}}), "lacks its dtype"),
    "surplus field": (raw({"w": {**tensor(0, 4, [1]), "hook": "x"}}, b"\0" * 4), "lacks its dtype"),
    "unknown dtype": (raw({"w": tensor(0, 4, [1], "OBJ")}, b"\0" * 4), "unknown dtype 'OBJ'"),
    "negative shape": (raw({"w": tensor(0, 4, [-1])}, b"\0" * 4), "which is none"),
    "shape of booleans": (raw({"w": tensor(0, 4, [True])}, b"\0" * 4), "which is none"),
    "shape of floats": (raw({"w": tensor(0, 4, [1.0])}, b"\0" * 4), "which is none"),
    "too many dimensions": (raw({"w": tensor(0, 4, [1] * 9)}, b"\0" * 4), "which is none"),
    "offsets backwards": (raw({"w": tensor(4, 0, [1])}, b"\0" * 4), "no stretch"),
    "wrong size": (raw({"w": tensor(0, 4, [2])}, b"\0" * 4), "its shape and dtype ask for 8"),
    "overflowing shape": (raw({"w": tensor(0, 4, [1 << 40, 1 << 40])}, b"\0" * 4), "ask for"),
    "overlap": (raw({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, b"\0" * 12), "'b' overlaps another"),
    "the same bytes twice": (raw({"a": tensor(0, 8, [2]), "b": tensor(0, 8, [2])}, b"\0" * 8), "overlaps another"),
    "gap": (raw({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, b"\0" * 12), "4 bytes before its tensor 'b'"),
    "truncated": (raw({"a": tensor(0, 8, [2])}, b"\0" * 5), "cut off"),
    "appended": (raw({"a": tensor(0, 4, [1])}, b"\0" * 4 + b"PK\x03\x04"), "the last 4 bytes belong to no tensor"),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_file_that_lies_about_itself_is_refused_with_the_reason(tmp_path: Path, kind: str) -> None:
    content, reason = LIES[kind]
    with pytest.raises(WeightsRefused) as caught:
        inspect(write(tmp_path, content))
    assert reason in str(caught.value)
    assert "w.safetensors" in str(caught.value)


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    header = {str(number): tensor(0, 0, [0]) for number in range(MAX_TENSORS + 1)}
    with pytest.raises(WeightsRefused, match="100001 tensors"):
        inspect(write(tmp_path, raw(header)))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cut=st.integers(0, 200), flip=st.integers(0, 199), value=st.integers(0, 255), data=st.data())
def test_whatever_is_done_to_a_file_it_is_refused_or_its_bytes_add_up(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int, value: int, data: st.DataObject
) -> None:
    content = bytearray(good({"a": F32, "b": F32.reshape(2, 3)}))
    content[flip % len(content)] = value
    content = content[: len(content) - min(cut, len(content)) if data.draw(st.booleans()) else len(content)]
    path = write(tmp_path_factory.mktemp("fuzz"), bytes(content))
    try:
        found = inspect(path)
        check_finite(found)
    except WeightsRefused:
        return
    sizes = {"F32": 4, "F64": 8, "F16": 2, "I32": 4, "U32": 4}
    for each in found.tensors:
        assert each.end <= len(content)
        assert each.end - each.begin == int(np.prod(each.shape)) * sizes.get(each.dtype, (each.end - each.begin) or 1)


@pytest.mark.parametrize(
    "numbers",
    [
        np.array([1.0, np.nan], dtype="<f4"),
        np.array([1.0, np.inf], dtype="<f2"),
        np.array([-np.inf, 1.0], dtype="<f8"),
        np.array([0x3F80, 0x7FC0], dtype="<u2"),
        np.array([0x00, 0x7C], dtype="u1"),
    ],
    ids=["nan32", "inf16", "inf64", "bf16", "f8"],
)
def test_weights_that_are_not_finite_are_refused_by_tensor(tmp_path: Path, numbers: np.ndarray[Any, Any]) -> None:
    found = inspect(write(tmp_path, good({"fine": F32, "unet.bad": numbers})))
    with pytest.raises(WeightsRefused, match=r"'unet\.bad' holds numbers that are not finite"):
        check_finite(found)


@pytest.mark.parametrize("tensors", [{}, {"ids": np.arange(4)}], ids=["none", "integers"])
def test_an_adapter_without_floating_point_weights_is_refused(tmp_path: Path, tensors: dict[str, Any]) -> None:
    found = inspect(write(tmp_path, good(tensors)))
    with pytest.raises(WeightsRefused):
        check_floats(found)


@pytest.mark.parametrize(
    "name",
    [
        "model.bin",
        "w.PT",
        "x.ckpt",
        "a.pkl",
        "hook.py",
        "../w.safetensors",
        "/etc/passwd",
        ".hidden",
        "a..b",
        "",
        "a/b",
    ],
)
def test_names_that_are_paths_or_formats_that_run_code_are_refused(name: str) -> None:
    with pytest.raises(WeightsRefused):
        check_name(name)


@pytest.mark.parametrize(
    "name", ["adapter.safetensors", "adapter.json", "a.pt.safetensors", "model-00001-of-00002.safetensors"]
)
def test_plain_names_are_taken(name: str) -> None:
    check_name(name)


def test_links_fifos_and_directories_are_no_weight_files(tmp_path: Path) -> None:
    target = write(tmp_path, good({"a": F32}))
    (tmp_path / "link.safetensors").symlink_to(target)
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("link", "pipe", "folder", "absent"):
        with pytest.raises(WeightsRefused):
            inspect(tmp_path / f"{name}.safetensors")


def test_a_model_directory_may_link_inside_its_repository_only(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "rev"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write(repository / "blobs", good({"a": F32}), "blob")
    (snapshot / "model.safetensors").symlink_to(repository / "blobs" / "blob")
    assert len(check_directory(snapshot, within=repository, finite=True)) == 1
    write(tmp_path, good({"a": F32}), "secret")
    (snapshot / "other.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(WeightsRefused, match="leads out of"):
        check_directory(snapshot, within=repository)
