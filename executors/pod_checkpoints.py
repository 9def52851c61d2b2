"""Checkpoints of running attempts in the file store: whole or not at all, checked by their hash, and no more of them than needed.

A checkpoint is one archive, so its file id covers every byte of it. The archive names its request and the checkpoint before it:
no two requests ever share a file, and an attempt that goes on from one on another node still knows which older ones to remove.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

from obstore.exceptions import BaseError

from executors.dfs import ObjectFileStore

CHECKPOINT_MEDIA_TYPE = "application/x-tar"
KEPT = 2
"""Checkpoints of a request that stay: the announcement of the last one may be lost with the node, then the one before it counts."""
STORE_ERRORS = (OSError, ValueError, BaseError)
"""What a file store raises that is full, away or in disorder."""
_LINEAGE = ".lineage.json"


class CheckpointShelf:
    """The checkpoints of one attempt, and what is left of those of earlier attempts."""

    def __init__(self, store: ObjectFileStore, directory: Path, req_no: str) -> None:
        self._store = store
        self._directory = directory
        self._req_no = req_no
        self._kept: list[str] = []

    def put(self, folder: Path) -> str:
        """Put a checkpoint directory into the file store as one archive; returns its file id. Older ones than KEPT are removed.

        Raises STORE_ERRORS.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        archive = self._directory / "checkpoint.tar"
        before = self._kept[-1] if self._kept else ""
        try:
            with tarfile.open(archive, "w") as tar:
                lineage = json.dumps({"req_no": self._req_no, "before": before}).encode()
                member = tarfile.TarInfo(_LINEAGE)
                member.size = len(lineage)
                tar.addfile(member, io.BytesIO(lineage))
                for path in sorted(folder.rglob("*")):
                    tar.add(path, path.relative_to(folder).as_posix(), recursive=False, filter=_without_origin)
            file_id = self._store.put_path(archive, CHECKPOINT_MEDIA_TYPE).file_id
        finally:
            archive.unlink(missing_ok=True)
        if file_id not in self._kept:
            self._kept.append(file_id)
        self._remove(self._kept[:-KEPT])
        return file_id

    def restore(self, file_id: str, target: Path) -> Path | None:
        """Unpack the checkpoint to go on from; one that is lost or broken costs the work in it, not the task.

        A store that cannot be reached is another matter: its error ends the attempt, and the next one finds the checkpoint.
        """
        if not file_id:
            return None
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        archive = self._directory / "restored.tar"
        try:
            self._store.fetch(file_id, archive)
            with tarfile.open(archive) as tar:
                tar.extractall(target, filter="data")
            self._kept = [each for each in (_before(target), file_id) if each]
        except (OSError, ValueError, tarfile.TarError) as error:
            told = f"checkpoint {file_id[:80]} cannot be used, starting from the beginning: {error}"
            print(told, file=sys.stderr, flush=True)
            shutil.rmtree(target, ignore_errors=True)
            return None
        finally:
            archive.unlink(missing_ok=True)
        return target

    def clear(self) -> None:
        """Remove the request's checkpoints: it has its result."""
        self._remove(list(self._kept))

    def _remove(self, file_ids: list[str]) -> None:
        for file_id in file_ids:
            self._kept.remove(file_id)
            try:
                self._store.delete(file_id)
            except STORE_ERRORS as error:
                print(f"checkpoint {file_id[:80]} cannot be removed: {error}", file=sys.stderr, flush=True)


def _before(folder: Path) -> str:
    """Return the file id of the checkpoint before the one unpacked here, and take the note of it away."""
    note = folder / _LINEAGE
    try:
        before = json.loads(note.read_text(encoding="utf-8")).get("before", "")
    except (OSError, ValueError, AttributeError):
        return ""
    note.unlink()
    return before if isinstance(before, str) else ""


def _without_origin(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Equal checkpoints of a request are equal files: leave out who wrote them and when."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member
