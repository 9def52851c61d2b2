"""What SS sees of a training's pictures before the task is queued."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from PIL import Image

from api.support import pictures
from executors.dfs import ObjectFileStore, open_store


@pytest.fixture
def files() -> ObjectFileStore:
    return open_store("memory://")


def _encoded(kind: str, size: tuple[int, int] = (8, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (1, 2, 3)).save(out, kind)
    return out.getvalue()


def _png_that_claims(width: int, height: int) -> bytes:
    """A few bytes whose header promises any number of pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + struct.pack(">I", 0)
        + b"IDAT"
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_of_each_kind_that_is_taken_passes(files: ObjectFileStore, kind: str) -> None:
    assert pictures.problem(files, [files.put_bytes(_encoded(kind)).file_id]) == ""


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no picture", "this is no picture"),
        (b"", "the file has 0 bytes"),
        (_encoded("GIF"), "the picture is GIF; send PNG, JPEG or WebP"),
        (_encoded("BMP"), "the picture is BMP"),
        (_encoded("PNG")[:20], "this is no"),
        (_png_that_claims(10_000, 6_000), "10000x6000 pixels, more than the 50000000 allowed"),
        (_png_that_claims(60_000, 60_000), "more than the 50000000 pixels allowed"),
    ],
    ids=["text", "empty", "gif", "bmp", "cut off", "too many pixels", "far too many pixels"],
)
def test_a_picture_that_cannot_be_used_is_named_by_its_place(files: ObjectFileStore, content: bytes, told: str) -> None:
    good, bad = files.put_bytes(_encoded("PNG")).file_id, files.put_bytes(content).file_id
    found = pictures.problem(files, [good, bad, good])
    assert found.startswith("pictures.1: ")
    assert told in found


def test_a_file_that_is_not_there_is_named_with_the_remedy(files: ObjectFileStore) -> None:
    assert pictures.problem(files, ["a" * 64]) == f"pictures.0: there is no file {'a' * 64}; upload it first"


def test_a_file_that_is_too_large_is_not_read(files: ObjectFileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = files.put_bytes(_encoded("PNG", (64, 64))).file_id
    monkeypatch.setattr(pictures, "MAX_PICTURE_BYTES", 10)
    assert "send a picture of 1 to 10" in pictures.problem(files, [file_id])


def test_only_the_beginning_of_a_large_picture_is_read(files: ObjectFileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "HEAD_BYTES", 64)
    assert pictures.problem(files, [files.put_bytes(_encoded("PNG", (256, 256))).file_id]) == ""
    # What begins with more than that in metadata is for the Pod to judge.
    assert pictures.problem(files, [files.put_bytes(b"\0" * 65).file_id]) == ""
    assert pictures.problem(files, [files.put_bytes(b"\0" * 64).file_id]) != ""


def test_each_picture_of_a_generation_is_named_by_its_field(files: ObjectFileStore) -> None:
    good, bad = files.put_bytes(_encoded("PNG")).file_id, files.put_bytes(b"no picture").file_id
    assert pictures.problem_of(files, {"image": good, "mask": good}) == ""
    assert pictures.problem_of(files, {"image": good, "mask": bad}).startswith("mask: this is no picture")
    assert pictures.problem_of(files, {"control.0.image": "b" * 64}).startswith("control.0.image: there is no file")
    assert pictures.problem_of(files, {}) == ""
