"""Links that carry their own permission: a file id, an expiry and an HMAC over both.

The link is all that is needed to read the file, so that pictures go straight from the file store to a browser; it expires, and no
header or cookie of the reader is looked at or logged.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from urllib.parse import urlencode


def sign(file_id: str, expires_s: int, secret: bytes) -> str:
    """Return the signature of a link as 64 hex digits."""
    return hmac.new(secret, b"aigc-file-link-1\0%s\0%d" % (file_id.encode(), expires_s), hashlib.sha256).hexdigest()


def signed_path(file_id: str, now_s: float, ttl_s: int, secret: bytes) -> str:
    """Return the path and query of a link.

    The expiry is rounded up to a sixteenth of the life time, so that a page that is drawn again names the same link and the
    browser's cache holds.
    """
    step = max(1, ttl_s // 16)
    expires_s = -(-(int(now_s) + ttl_s) // step) * step
    return f"/files/signed/{file_id}?{urlencode({'expires': expires_s, 'signature': sign(file_id, expires_s, secret)})}"


def check(file_id: str, expires_s: int, signature: str, now_s: float, secrets: Sequence[bytes]) -> str | None:
    """Return why a link is refused, None when it is good. Every secret is tried, in constant time each."""
    good = False
    for secret in secrets:
        good |= hmac.compare_digest(sign(file_id, expires_s, secret).encode(), signature.encode())
    if not good:
        return "the link's signature is not valid"
    if now_s >= expires_s:
        return "the link has expired; ask for the file's content again to get a fresh one"
    return None
