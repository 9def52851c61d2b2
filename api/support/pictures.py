"""A request's pictures, looked at before the task is queued: a file that cannot be used costs its sender a message, not GPU time.

Requests that come through the gateway name files that were decoded in a limited process when they were uploaded. Those that come
straight from the queue may name anything, and a file may have been deleted since. So every file's place, size, kind and header are
looked at here; the picture itself is decoded where it is used.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence

from executors.methods.parameters import MAX_INPUT_PIXELS
from executors.ports import FileStore

MAX_PICTURE_BYTES = 64 << 20
HEAD_BYTES = 1 << 20
"""Bytes of a picture that are read to find its header."""
FORMATS = ("PNG", "JPEG", "WEBP")


def problem(files: FileStore, file_ids: Sequence[str]) -> str:
    """Return what is wrong with the first picture that cannot be trained on, as ``pictures.N: ...``; empty when nothing is."""
    return problem_of(files, {f"pictures.{index}": file_id for index, file_id in enumerate(file_ids)})


def problem_of(files: FileStore, named: Mapping[str, str]) -> str:
    """Return what is wrong with the first picture that cannot be used, as ``field: ...``; empty when nothing is."""
    for field_name, file_id in named.items():
        found = _problem(files, file_id)
        if found:
            return f"{field_name}: {found}"
    return ""


def _problem(files: FileStore, file_id: str) -> str:
    known = files.stat(file_id)
    if known is None:
        return f"there is no file {file_id}; upload it first"
    if not 0 < known.size_bytes <= MAX_PICTURE_BYTES:
        return f"the file has {known.size_bytes} bytes; send a picture of 1 to {MAX_PICTURE_BYTES}"
    head = b"".join(files.read(file_id, 0, min(HEAD_BYTES, known.size_bytes)))
    return _header_problem(head, whole=known.size_bytes <= HEAD_BYTES)


def _header_problem(head: bytes, whole: bool) -> str:
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(head)) as picture:  # Reads the header only.
                width, height, kind = picture.width, picture.height, picture.format
        except UnidentifiedImageError:
            # A header that begins with megabytes of metadata is for the Pod to judge.
            return "this is no picture; send PNG, JPEG or WebP" if whole else ""
        except Image.DecompressionBombError:
            return f"the picture has more than the {MAX_INPUT_PIXELS} pixels allowed; shrink it"
        except Exception as error:  # Crafted bytes may raise anything.
            return f"this is no sound picture ({type(error).__name__}); send PNG, JPEG or WebP"
    if kind not in FORMATS:
        return f"the picture is {kind}; send PNG, JPEG or WebP"
    if width * height > MAX_INPUT_PIXELS:
        return f"the picture has {width}x{height} pixels, more than the {MAX_INPUT_PIXELS} allowed; shrink it"
    return ""
