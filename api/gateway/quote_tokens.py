"""Tokens that keep a quoted place for half a minute.

A token is an HMAC over the tenant, the request's fingerprint, the reqNo that the job will have, and the time of the quote. Because
it names the reqNo, using it twice is submitting once; because its life is short, so is the advantage that anybody can gain by it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass

from api.gateway.problems import Refused

VALID_S = 30.0


@dataclass(frozen=True, slots=True)
class Redeemed:
    """A token that is good."""

    req_no: str
    quoted_at: float


def signed(tenant: str, fingerprint: str, req_no: str, quoted_at: float, secret: bytes) -> str:
    """Return a token."""
    body = json.dumps([tenant, fingerprint, req_no, round(quoted_at, 3)], separators=(",", ":")).encode()
    return f"{_text(body)}.{_text(_mac(body, secret))}"


def read(token: str, tenant: str, fingerprint: str, secrets: Sequence[bytes]) -> Redeemed:
    """Return what a token says; raises Refused 422 when it is not ours, another tenant's, or another request's."""
    body_text, _, mac_text = token.partition(".")
    try:
        body, mac = _bytes(body_text), _bytes(mac_text)
    except (ValueError, binascii.Error):
        raise _refused("it is no quote's token; send the one of POST /v1/quotes as it is") from None
    good = False
    for secret in secrets:
        good |= hmac.compare_digest(_mac(body, secret), mac)
    if not good:
        raise _refused("its signature is not valid; ask for a new quote")
    owner, known, req_no, quoted_at = json.loads(body)
    if owner != tenant:
        raise _refused("it was given to another tenant; ask for a quote of your own")
    if known != fingerprint:
        raise _refused("it belongs to another request; submit what was quoted, or ask for a new quote")
    return Redeemed(req_no, quoted_at)


def _mac(body: bytes, secret: bytes) -> bytes:
    return hmac.new(secret, b"aigc-quote-1\0" + body, hashlib.sha256).digest()


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)


def _refused(why: str) -> Refused:
    return Refused(422, "quote_invalid", f"quote: {why}.", param="quote")
