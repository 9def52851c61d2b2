"""The file store (DFS): content-addressed files in a local directory, in memory or in S3, behind one URL.

A file's name is the SHA-256 of its bytes (`sha256/ab/abcd...`), so equal bytes are one file, a name never changes its content,
and a reader can always tell whether what it got is what was stored. obstore moves the bytes; what it leaves open is decided
here: checking, media types, durability of a local directory, and that no id can ever name another path.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import obstore
from obstore.store import LocalStore, MemoryStore, S3Store

from executors.ports import FileRef

CHUNK_BYTES = 1 << 20
"""Bytes a reader or a hash takes at once."""
SINGLE_PUT_BYTES = 8 << 20
"""Files up to this size are read once and stored by one request; larger ones are hashed first, then streamed."""
DEFAULT_MEDIA_TYPE = "application/octet-stream"

_FILE_ID = re.compile(r"[0-9a-f]{64}")
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]{1,64}/[A-Za-z0-9!#$&^_.+-]{1,64}(; ?[A-Za-z0-9=_.+-]{1,64}){0,3}")
_S3_OPTIONS = frozenset({"endpoint", "region"})


class CorruptFile(ValueError):
    """The bytes in the store are not those that the file's id names."""

    def __init__(self, file_id: str, found: str) -> None:
        super().__init__(
            f"file {file_id}: its bytes have the SHA-256 {found}; delete the file and store it again from its source"
        )
        self.file_id = file_id


class ObjectFileStore:
    """A `FileStore` over an object store. Safe to share between threads; several processes may open the same URL.

    The media type is kept as the object's Content-Type where the store has one, otherwise in a small file beside it. Storing bytes
    that are there already keeps the first media type.
    """

    def __init__(self, objects: LocalStore | MemoryStore | S3Store, url: str, root: Path | None = None) -> None:
        self._objects = objects
        self._root = root
        self.url = url
        """Opens the same store again, also in another process unless it is `memory://`."""

    @property
    def shared(self) -> bool:
        """Tell whether another process that opens `url` sees the same files."""
        return not isinstance(self._objects, MemoryStore)

    def put_path(self, source: Path, media_type: str = DEFAULT_MEDIA_TYPE) -> FileRef:
        """Store a file, streamed and atomic; raises ValueError when the file changes while it is read."""
        if source.stat().st_size <= SINGLE_PUT_BYTES:
            return self.put_bytes(source.read_bytes(), media_type)
        _check_media_type(media_type)
        digest, size = _hash(_chunks(source))
        present = self._present(digest, size)
        if present is not None:
            return present
        self._write(digest, _verified(_chunks(source), digest, source), media_type)
        return FileRef(digest, size, media_type)

    def put_bytes(self, content: bytes, media_type: str = DEFAULT_MEDIA_TYPE) -> FileRef:
        """Store bytes."""
        _check_media_type(media_type)
        digest = hashlib.sha256(content).hexdigest()
        present = self._present(digest, len(content))
        if present is not None:
            return present
        self._write(digest, content, media_type)
        return FileRef(digest, len(content), media_type)

    def stat(self, file_id: str) -> FileRef | None:
        """Return what is known of a file, None when absent; raises ValueError when the id is none."""
        path = object_path(file_id)
        try:
            found = obstore.get(self._objects, path, options={"head": True})
        except FileNotFoundError:
            return None
        if self._root is None:
            media_type = str(found.attributes.get("Content-Type", DEFAULT_MEDIA_TYPE))
        else:
            media_type = self._sidecar(file_id)
        return FileRef(file_id, int(found.meta["size"]), media_type)

    def read(self, file_id: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Stream bytes [start, end); raises FileNotFoundError when absent, at once.

        A whole file is checked: the last chunk is held back until the SHA-256 is known to be right, else CorruptFile is raised,
        so that a corrupt file is never delivered to its end. A part can not be checked. `end` may lie behind the file's end.
        """
        path = object_path(file_id)
        size = int(obstore.head(self._objects, path)["size"])
        if start < 0 or (end is not None and end < start):
            raise ValueError(f"read: the range [{start}, {end}) is none; give 0 <= start <= end")
        stop = size if end is None else min(end, size)
        if start == 0 and stop == size:
            return _verified(self._stream(path, None), file_id)
        if start >= stop:
            return iter(())
        return self._stream(path, (start, stop))

    def fetch(self, file_id: str, to: Path) -> Path:
        """Copy a file to a local path, whole or not at all; raises FileNotFoundError, or CorruptFile."""
        chunks = self.read(file_id)
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = to.parent / f".{to.name[:64]}.{secrets.token_hex(6)}.part"
        try:
            with partial.open("wb") as out:
                for chunk in chunks:
                    out.write(chunk)
            partial.replace(to)
        finally:
            partial.unlink(missing_ok=True)
        return to

    def delete(self, file_id: str) -> bool:
        """Delete a file; False when it was absent."""
        path = object_path(file_id)
        try:
            obstore.head(self._objects, path)
        except FileNotFoundError:
            return False
        try:
            obstore.delete(self._objects, path)
        except FileNotFoundError:
            return False
        if self._root is not None:
            (self._root / f"{path}.type").unlink(missing_ok=True)
        return True

    def files(self) -> Iterator[FileRef]:
        """List every file, in no promised order; the media type is left at its default."""
        for batch in obstore.list(self._objects, "sha256"):
            for meta in batch:
                name = str(meta["path"]).rsplit("/", 1)[-1]
                if _FILE_ID.fullmatch(name):
                    yield FileRef(name, int(meta["size"]))

    def link(self, file_id: str, seconds: int) -> str | None:
        """Return a link that reads the file straight from S3 and expires; None where the store serves no HTTP."""
        if not isinstance(self._objects, S3Store):
            return None
        return str(obstore.sign(self._objects, "GET", object_path(file_id), timedelta(seconds=seconds)))

    def _present(self, file_id: str, size: int) -> FileRef | None:
        known = self.stat(file_id)
        return known if known is not None and known.size_bytes == size else None

    def _write(self, file_id: str, content: bytes | Iterator[bytes], media_type: str) -> None:
        path = object_path(file_id)
        if self._root is None:
            obstore.put(self._objects, path, content, attributes={"Content-Type": media_type})
            return
        # The name must never show bytes that a power cut could still take back: write aside, sync, then rename.
        staged = f"staging/{secrets.token_hex(16)}"
        try:
            obstore.put(self._objects, staged, content)
            synced(self._root / staged)
            (self._root / path).parent.mkdir(parents=True, exist_ok=True)
            if media_type != DEFAULT_MEDIA_TYPE:
                obstore.put(self._objects, f"{path}.type", media_type.encode())
            (self._root / staged).replace(self._root / path)
            synced((self._root / path).parent)
        finally:
            (self._root / staged).unlink(missing_ok=True)

    def _sidecar(self, file_id: str) -> str:
        try:
            return bytes(obstore.get(self._objects, f"{object_path(file_id)}.type").bytes()).decode()
        except FileNotFoundError:
            return DEFAULT_MEDIA_TYPE

    def _stream(self, path: str, span: tuple[int, int] | None) -> Iterator[bytes]:
        options: Any = {} if span is None else {"range": span}
        found = obstore.get(self._objects, path, options=options)
        for chunk in found.stream(min_chunk_size=CHUNK_BYTES):
            content = bytes(chunk)
            for start in range(0, len(content), CHUNK_BYTES):
                yield content[start : start + CHUNK_BYTES]


def open_store(url: str) -> ObjectFileStore:
    """Open the file store behind a URL: `file:///dir`, `memory://`, or `s3://bucket/prefix?endpoint=https://...&region=...`.

    A local directory is created when it is absent. S3 takes its credentials from the AWS_* environment, never from the URL.
    """
    parts = urlsplit(url)
    match parts.scheme:
        case "file":
            if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query:
                raise ValueError(f"file store {url!r}: a local directory is written file:///absolute/path")
            root = Path(unquote(parts.path))
            root.mkdir(parents=True, exist_ok=True)
            return ObjectFileStore(LocalStore(str(root)), f"file://{quote(str(root))}", root)
        case "memory":
            return ObjectFileStore(MemoryStore(), "memory://")
        case "s3":
            return ObjectFileStore(_open_s3(url), url)
        case _:
            raise ValueError(
                f"file store {url!r}: unknown kind; use file:///dir, memory:// or s3://bucket?endpoint=..."
            )


def object_path(file_id: str) -> str:
    """Return where a file lies inside its store; raises ValueError unless the id is 64 lower-case hex digits."""
    if not _FILE_ID.fullmatch(file_id):
        raise ValueError(f"file id {file_id[:80]!r}: it must be the 64 lower-case hex digits of a SHA-256")
    return f"sha256/{file_id[:2]}/{file_id}"


def _open_s3(url: str) -> S3Store:
    parts = urlsplit(url)
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    unknown = sorted(set(options) - _S3_OPTIONS)
    if unknown:
        raise ValueError(f"file store {url!r}: unknown option {unknown[0]!r}; known are {sorted(_S3_OPTIONS)}")
    if not parts.netloc or "@" in parts.netloc:
        raise ValueError(
            f"file store {url!r}: write s3://bucket/prefix; credentials come from AWS_ACCESS_KEY_ID and its like"
        )
    settings: dict[str, Any] = {"region": options.get("region") or os.environ.get("AWS_REGION", "us-east-1")}
    client: dict[str, Any] = {}
    if "endpoint" in options:
        settings["endpoint"] = options["endpoint"]
        client["allow_http"] = options["endpoint"].startswith("http://")
    prefix = parts.path.strip("/") or None
    return S3Store(parts.netloc, prefix=prefix, client_options=client or None, **settings)


def _check_media_type(media_type: str) -> None:
    if not _MEDIA_TYPE.fullmatch(media_type):
        raise ValueError(f"media type {media_type[:80]!r}: write it as type/subtype, for example image/png")


def _chunks(source: Path) -> Iterator[bytes]:
    with source.open("rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            yield chunk


def _hash(chunks: Iterator[bytes]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


def _verified(chunks: Iterator[bytes], file_id: str, source: Path | None = None) -> Iterator[bytes]:
    """Pass chunks on, one behind, so that a wrong digest is known before the last one is out."""
    digest = hashlib.sha256()
    held = b""
    for chunk in chunks:
        digest.update(chunk)
        if held:
            yield held
        held = chunk
    if digest.hexdigest() != file_id:
        if source is None:
            raise CorruptFile(file_id, digest.hexdigest())
        raise ValueError(f"{source}: it changed while it was stored; store it again")
    if held:
        yield held


def synced(path: Path) -> None:
    """Return when what was written to a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
