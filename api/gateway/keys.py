"""Who is calling: API keys (kept only as keyed hashes) and signed tokens.

A key is ``aigc_<id>_<secret>``: the id finds the row, the HMAC of the whole key is compared in constant time. A revoked key stops
working at the next request, in every process that shares the file, for nothing is cached.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jwt

from api.gateway.config import JwtConfig

Role = Literal["user", "operator"]
TENANT_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_KEY = re.compile(r"aigc_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller. `scope` is the tenant that SS is asked for: ``*`` for operators."""

    tenant: str
    role: Role
    key_id: str

    @property
    def scope(self) -> str:
        """Return the tenant whose objects the caller sees."""
        return "*" if self.role == "operator" else self.tenant


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is kept about a key; never the key. Times are Unix seconds."""

    key_id: str
    tenant: str
    role: Role
    label: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None


class KeyRefused(Exception):
    """The credentials are unknown, expired or revoked; the message does not say which to a stranger."""


def load_secret(path: Path) -> bytes:
    """Return the server secret of a file, made on first use (32 random bytes, readable by the owner alone)."""
    try:
        secret = path.read_bytes()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        fresh.touch(mode=0o600)
        fresh.write_bytes(secrets.token_bytes(32))
        try:
            path.hardlink_to(fresh)
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
        secret = path.read_bytes()
    if len(secret) < 32:
        raise ValueError(
            f"{path}: a server secret needs at least 32 bytes; delete the file to have a new one made (voids all keys)"
        )
    return secret


class KeyStore:
    """API keys in SQLite; safe across threads and processes."""

    def __init__(self, path: Path, secret: bytes, clock: Callable[[], float] = time.time) -> None:
        if len(secret) < 32:
            raise ValueError("secret: at least 32 bytes are needed")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._secret = secret
        self._clock = clock
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS api_key (key_id TEXT PRIMARY KEY, digest BLOB NOT NULL, tenant TEXT NOT NULL, "
            "role TEXT NOT NULL CHECK (role IN ('user', 'operator')), label TEXT NOT NULL, created_at REAL NOT NULL, "
            "expires_at REAL, revoked_at REAL) STRICT"
        )

    def create(
        self, tenant: str, role: Role = "user", *, label: str = "", ttl_s: float | None = None
    ) -> tuple[str, KeyRecord]:
        """Make a key; the returned text is shown once and cannot be had again."""
        if not TENANT_NAME.fullmatch(tenant):
            raise ValueError("tenant: use 1-63 characters of a-z 0-9 _ . - that begin with a letter or digit")
        if role not in ("user", "operator"):
            raise ValueError("role: must be user or operator")
        if ttl_s is not None and ttl_s <= 0:
            raise ValueError("ttl_s: must be above zero; leave it out for a key that does not expire")
        key_id = secrets.token_hex(8)
        key = f"aigc_{key_id}_{secrets.token_urlsafe(32)}"
        now = self._clock()
        record = KeyRecord(key_id, tenant, role, label[:200], now, None if ttl_s is None else now + ttl_s, None)
        with self._lock:
            self._db.execute(
                "INSERT INTO api_key VALUES (?, ?, ?, ?, ?, ?, ?, NULL)",
                (key_id, self._digest(key), tenant, role, record.label, record.created_at, record.expires_at),
            )
        return key, record

    def authenticate(self, key: str) -> Caller:
        """Return the caller of a key; raises KeyRefused."""
        match = _KEY.fullmatch(key)
        row = None
        if match is not None:
            with self._lock:
                row = self._db.execute(
                    "SELECT digest, tenant, role, expires_at, revoked_at FROM api_key WHERE key_id = ?",
                    (match.group(1),),
                ).fetchone()
        kept = bytes(32) if row is None else bytes(row[0])
        same = hmac.compare_digest(kept, self._digest(key))
        if row is None or match is None or not same:
            raise KeyRefused("the API key is unknown")
        if row[4] is not None or (row[3] is not None and row[3] <= self._clock()):
            raise KeyRefused("the API key has expired or was revoked")
        return Caller(tenant=row[1], role=row[2], key_id=match.group(1))

    def revoke(self, key_id: str) -> KeyRecord | None:
        """Revoke a key from now on; None when there is no such key. Revoking twice changes nothing."""
        with self._lock:
            self._db.execute(
                "UPDATE api_key SET revoked_at = ? WHERE key_id = ? AND revoked_at IS NULL", (self._clock(), key_id)
            )
        return next((record for record in self.list() if record.key_id == key_id), None)

    def list(self) -> list[KeyRecord]:
        """Return every key's record, oldest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT key_id, tenant, role, label, created_at, expires_at, revoked_at FROM api_key ORDER BY created_at, key_id"
            ).fetchall()
        return [KeyRecord(*row) for row in rows]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _digest(self, key: str) -> bytes:
        return hmac.new(self._secret, key.encode(), hashlib.sha256).digest()


def caller_of_token(token: str, config: JwtConfig) -> Caller:
    """Return the caller that a signed token names; raises KeyRefused."""
    try:
        claims = jwt.decode(
            token,
            config.key.get_secret_value(),
            algorithms=list(config.algorithms),
            audience=config.audience,
            issuer=config.issuer,
            leeway=config.leeway_s,
            options={"require": ["exp", "aud", "iss"]},
        )
    except (jwt.PyJWTError, ValueError, RecursionError) as error:
        raise KeyRefused("the token is not valid") from error
    tenant, role = claims.get(config.tenant_claim), claims.get(config.role_claim, "user")
    if not isinstance(tenant, str) or not TENANT_NAME.fullmatch(tenant):
        raise KeyRefused(f"the token's claim {config.tenant_claim} names no tenant")
    if role not in ("user", "operator"):
        raise KeyRefused(f"the token's claim {config.role_claim} must be user or operator")
    return Caller(tenant=tenant, role=role, key_id=f"jwt:{str(claims.get('sub', ''))[:64]}")
