"""Uploads and signed links."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from api.gateway.fake import GatewayFake
from api.gateway.files import parse_range
from api.gateway.problems import Refused
from api.gateway.signing import check, sign, signed_path


def picture(kind: str = "PNG", size: tuple[int, int] = (20, 10), **more: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, kind, **more)
    return buffer.getvalue()


@pytest.fixture
def gw(tmp_path: Path) -> GatewayFake:
    return GatewayFake(tmp_path, max_picture_pixels=10_000)


def send(gw: GatewayFake, content: bytes, headers: dict[str, str] | None = None):
    return gw.client.post("/v1/uploads", files={"file": ("a.png", content)}, headers=headers or gw.ana)


def link_of(gw: GatewayFake, file_id: str, headers: dict[str, str] | None = None) -> str:
    answer = gw.client.get(f"/v1/files/{file_id}/content", headers=headers or gw.ana, follow_redirects=False)
    assert answer.status_code == 302, answer.text
    parts = urlsplit(answer.headers["location"])
    return f"{parts.path}?{parts.query}"


@pytest.mark.parametrize(("kind", "media_type"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp")])
def test_a_picture_is_stored_under_its_hash_with_its_true_type(gw: GatewayFake, kind: str, media_type: str) -> None:
    content = picture(kind)
    answer = send(gw, content)
    assert answer.status_code == 201
    stored = answer.json()
    assert (stored["media_type"], stored["width"], stored["height"]) == (media_type, 20, 10)
    assert b"".join(gw.store.read(stored["file_id"])) == content
    assert send(gw, content).json() == stored


def bomb() -> bytes:
    """A PNG of 50,000 x 50,000 pixels in a few kilobytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 100, 200)]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a picture",
        picture("GIF"),
        picture("BMP"),
        picture()[:-30],
        picture(size=(200, 100)),
        bomb(),
        animated(),
    ],
    ids=["empty", "text", "gif", "bmp", "cut off", "too many pixels", "bomb", "animated"],
)
def test_what_is_no_sound_picture_within_the_limits_is_refused(gw: GatewayFake, content: bytes) -> None:
    answer = send(gw, content)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "file"


def test_uploads_need_a_form_with_the_field_file(gw: GatewayFake) -> None:
    assert gw.client.post("/v1/uploads", json={}, headers=gw.ana).status_code == 415
    missing = gw.client.post("/v1/uploads", files={"other": ("a.png", picture())}, headers=gw.ana)
    assert missing.status_code == 422
    assert missing.json()["error"]["param"] == "file"
    broken = gw.client.post("/v1/uploads", content=b"x", headers={**gw.ana, "Content-Type": "multipart/form-data"})
    assert broken.status_code == 400


def test_a_file_is_its_owners_alone(gw: GatewayFake) -> None:
    file_id = send(gw, picture()).json()["file_id"]
    path = f"/v1/files/{file_id}/content"
    assert gw.client.get(path, headers=gw.bob, follow_redirects=False).status_code == 404
    assert gw.client.get(path, headers=gw.ops, follow_redirects=False).status_code == 302
    job = {"method": "dreambooth", "parameters": {"category": "dog", "pictures": [file_id, "b" * 64, "c" * 64]}}
    assert "b" * 64 in gw.client.post("/v1/jobs", json=job, headers=gw.ana).json()["detail"]
    assert file_id in gw.client.post("/v1/jobs", json=job, headers=gw.bob).json()["detail"]


def test_a_training_takes_uploaded_pictures(gw: GatewayFake) -> None:
    ids = [send(gw, picture(size=(8, 8 + number))).json()["file_id"] for number in range(3)]
    answer = gw.client.post(
        "/v1/jobs", json={"method": "dreambooth", "parameters": {"category": "dog", "pictures": ids}}, headers=gw.ana
    )
    assert answer.status_code == 202
    assert (answer.json()["task_type"], answer.json()["model"]) == ("TP", "tiny")


def test_the_files_of_a_finished_job_have_links_that_need_no_key(gw: GatewayFake) -> None:
    gw.support.auto = True
    req_no = gw.submit(method="text_to_image", parameters={"prompt": "x", "count": 2})["req_no"]
    files = gw.client.get(f"/v1/jobs/{req_no}", headers=gw.ana).json()["result"]["files"]
    assert len(files) == 2
    assert gw.client.get(files[0]["url"]).content.startswith(b"\x89PNG")
    assert gw.client.get(files[1]["content_url"], headers=gw.ana).content.startswith(b"\x89PNG")
    assert gw.client.get(files[1]["content_url"], headers=gw.bob).status_code == 404


def test_a_file_can_be_had_by_naming_the_job_that_made_it(gw: GatewayFake) -> None:
    gw.support.auto = True
    req_no = gw.submit(method="text_to_image", parameters={"prompt": "x"})["req_no"]
    file_id = gw.support.known[("ana", req_no)].result["files"][0]["file_id"]
    path = f"/v1/files/{file_id}/content"
    assert gw.client.get(path, headers=gw.ana, follow_redirects=False).status_code == 404
    assert gw.client.get(path, params={"job": req_no}, headers=gw.ana, follow_redirects=False).status_code == 302
    assert gw.client.get(path, params={"job": req_no}, headers=gw.bob, follow_redirects=False).status_code == 404


def test_a_link_serves_etag_range_and_head(gw: GatewayFake) -> None:
    content = picture()
    file_id = send(gw, content).json()["file_id"]
    link = link_of(gw, file_id)
    whole = gw.client.get(link)
    assert whole.status_code == 200
    assert whole.content == content
    assert whole.headers["etag"] == f'"{file_id}"'
    assert whole.headers["content-type"] == "image/png"
    assert whole.headers["accept-ranges"] == "bytes"
    head = gw.client.head(link)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(content)))
    part = gw.client.get(link, headers={"Range": "bytes=4-9"})
    assert (part.status_code, part.content) == (206, content[4:10])
    assert part.headers["content-range"] == f"bytes 4-9/{len(content)}"
    assert gw.client.get(link, headers={"Range": "bytes=-5"}).content == content[-5:]
    assert gw.client.get(link, headers={"Range": "bytes=0-1,4-5"}).status_code == 200
    wrong = gw.client.get(link, headers={"Range": f"bytes={len(content)}-"})
    assert (wrong.status_code, wrong.headers["content-range"]) == (416, f"bytes */{len(content)}")
    assert gw.client.get(link, headers={"If-None-Match": f'W/"x", "{file_id}"'}).status_code == 304
    assert gw.client.get(link, headers={"If-None-Match": '"x"'}).status_code == 200
    assert gw.client.get(link, headers={"Range": "bytes=0-1", "If-Range": '"other"'}).status_code == 200
    assert gw.client.get(link, headers={"Range": "bytes=0-1", "If-Range": f'"{file_id}"'}).status_code == 206


def test_links_that_are_forged_changed_or_old_are_refused(gw: GatewayFake) -> None:
    first, second = send(gw, picture()).json()["file_id"], send(gw, picture(size=(5, 5))).json()["file_id"]
    link = link_of(gw, first)
    assert gw.client.get(link.replace(first, second)).status_code == 403
    assert gw.client.get(link.replace("expires=1", "expires=2")).status_code == 403
    assert gw.client.get(link[:-1] + ("0" if link[-1] != "0" else "1")).status_code == 403
    old = signed_path(first, 1000, 60, b"s" * 40)
    expired = gw.client.get(old)
    assert expired.status_code == 403
    assert "expired" in expired.json()["detail"]
    assert gw.client.get(f"/files/signed/{first}").status_code == 422
    gw.store.delete(first)
    assert gw.client.get(link).status_code == 404


def test_a_link_is_checked_against_every_secret_that_still_counts() -> None:
    signature = sign("a" * 64, 100, b"old")
    assert check("a" * 64, 100, signature, 99, [b"new", b"old"]) is None
    assert check("a" * 64, 100, signature, 99, [b"new"]) is not None
    assert check("a" * 64, 100, signature, 100, [b"old"]) is not None


def test_a_link_stays_the_same_for_a_while_and_never_lives_shorter_than_asked() -> None:
    assert signed_path("a" * 64, 1001, 1600, b"k") == signed_path("a" * 64, 1050, 1600, b"k")
    assert signed_path("a" * 64, 1001, 1600, b"k") != signed_path("a" * 64, 1500, 1600, b"k")
    for now in range(1000, 1100):
        expires = int(signed_path("a" * 64, now, 1600, b"k").split("expires=")[1].split("&")[0])
        assert 1600 <= expires - now < 1700 + 1


@pytest.mark.parametrize(
    ("header", "span"),
    [("", None), ("bytes=0-", (0, 10)), ("bytes=3-3", (3, 4)), ("bytes=5-99", (5, 10)), ("bytes=-3", (7, 10)),
     ("bytes=-99", (0, 10)), ("bytes=7-3", None), ("bytes=-", None), ("items=0-1", None), ("bytes=a-b", None)],
)  # fmt: skip
def test_ranges_are_read_as_rfc_9110_says(header: str, span: tuple[int, int] | None) -> None:
    assert parse_range(header, 10) == span


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=-0", "bytes=99-100"])
def test_ranges_outside_the_file_are_refused(header: str) -> None:
    with pytest.raises(Refused):
        parse_range(header, 10)
