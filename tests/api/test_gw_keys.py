"""API keys and signed tokens."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import jwt
import pytest

from api.gateway.config import JwtConfig
from api.gateway.fake import GatewayFake
from api.gateway.keys import KeyRefused, KeyStore, caller_of_token, load_secret

SHARED = "0123456789abcdef0123456789abcdef"
JWT = {"algorithms": ["HS256"], "key": SHARED, "issuer": "https://idp.example", "audience": "aigc"}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_key_names_its_tenant_and_role_and_is_not_in_the_file(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.sqlite", b"k" * 32)
    key, record = store.create("ana", "operator", label="ci")
    assert store.authenticate(key).tenant == "ana"
    assert store.authenticate(key).scope == "*"
    assert store.authenticate(store.create("bob")[0]).scope == "bob"
    assert store.list()[0] == record
    store.close()
    secret = key.rsplit("_", 1)[1] if key.count("_") == 2 else key[22:]
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes()


def test_keys_are_different_and_256_bits_long(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.sqlite", b"k" * 32)
    made = {store.create("ana")[0] for _ in range(50)}
    assert len(made) == 50
    assert all(len(key) == len("aigc_") + 16 + 1 + 43 for key in made)


def test_wrong_revoked_and_expired_keys_are_refused(tmp_path: Path) -> None:
    clock = Clock()
    store = KeyStore(tmp_path / "keys.sqlite", b"k" * 32, clock)
    key, _ = store.create("ana", ttl_s=10)
    other, record = store.create("ana")
    for wrong in ["", "aigc_", key[:-1], key[:-1] + ("A" if key[-1] != "A" else "B"), key + "A", other[:22] + key[22:]]:
        with pytest.raises(KeyRefused):
            store.authenticate(wrong)
    clock.now += 11
    with pytest.raises(KeyRefused):
        store.authenticate(key)
    store.authenticate(other)
    second = KeyStore(tmp_path / "keys.sqlite", b"k" * 32, clock)
    assert second.revoke(record.key_id).revoked_at == clock.now
    with pytest.raises(KeyRefused):
        store.authenticate(other)
    clock.now += 5
    assert second.revoke(record.key_id).revoked_at == clock.now - 5
    assert second.revoke("0" * 16) is None


def test_keys_of_another_server_secret_are_worthless(tmp_path: Path) -> None:
    key, _ = KeyStore(tmp_path / "keys.sqlite", b"k" * 32).create("ana")
    with pytest.raises(KeyRefused):
        KeyStore(tmp_path / "keys.sqlite", b"j" * 32).authenticate(key)


@pytest.mark.parametrize("tenant", ["", "*", "Ana", "a/b", "a" * 64, "a b", "ä"])
def test_tenant_names_that_could_be_mistaken_are_refused(tmp_path: Path, tenant: str) -> None:
    with pytest.raises(ValueError, match="tenant"):
        KeyStore(tmp_path / "keys.sqlite", b"k" * 32).create(tenant)


def test_the_server_secret_is_made_once_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "api-keys"
    secret = load_secret(path)
    assert len(secret) == 32
    assert load_secret(path) == secret
    assert path.stat().st_mode & 0o077 == 0
    assert [one.name for one in path.parent.iterdir()] == ["api-keys"]
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="32 bytes"):
        load_secret(path)


def token(key: str = SHARED, algorithm: str = "HS256", **changes: object) -> str:
    claims = {"iss": JWT["issuer"], "aud": "aigc", "exp": time.time() + 60, "tenant": "ana", "sub": "u1", **changes}
    return jwt.encode({name: value for name, value in claims.items() if value is not None}, key, algorithm)


def test_a_good_token_names_its_caller() -> None:
    caller = caller_of_token(token(role="operator"), JwtConfig(**JWT))
    assert (caller.tenant, caller.role, caller.key_id) == ("ana", "operator", "jwt:u1")


@pytest.mark.parametrize(
    "wrong",
    [
        token(exp=time.time() - 60),
        token(exp=None),
        token(aud="other"),
        token(aud=None),
        token(iss="https://evil.example"),
        token(iss=None),
        token(key="f" * 32),
        token(algorithm="HS512", key=SHARED * 2),
        token(tenant="*"),
        token(tenant=None),
        token(tenant=["ana"]),
        token(role="god"),
        token(nbf=time.time() + 600),
        jwt.encode({"iss": JWT["issuer"], "aud": "aigc", "exp": time.time() + 60, "tenant": "ana"}, None, "none"),
        "a.b.c",
        "",
    ],
)
def test_tokens_that_are_not_wholly_right_are_refused(wrong: str) -> None:
    with pytest.raises(KeyRefused):
        caller_of_token(wrong, JwtConfig(**JWT))


def test_shared_secrets_and_public_keys_cannot_be_mixed_and_must_be_long() -> None:
    with pytest.raises(ValueError, match="mix"):
        JwtConfig(**{**JWT, "algorithms": ["HS256", "RS256"]})
    with pytest.raises(ValueError, match="32 bytes"):
        JwtConfig(**{**JWT, "key": "short"})
    with pytest.raises(ValueError, match="algorithms"):
        JwtConfig(**{**JWT, "algorithms": ["none"]})


def test_tokens_work_over_http_only_where_they_are_configured(tmp_path: Path) -> None:
    headers = {"Authorization": f"Bearer {token()}"}
    with_tokens = GatewayFake(tmp_path / "a", jwt=JWT)
    assert with_tokens.client.get("/v1/jobs", headers=headers).status_code == 200
    assert with_tokens.client.get("/v1/jobs", headers=with_tokens.ana).status_code == 200
    assert with_tokens.client.get("/v1/nodes", headers=headers).status_code == 403
    without = GatewayFake(tmp_path / "b")
    refused = without.client.get("/v1/jobs", headers=headers)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"


def test_operators_make_list_and_revoke_keys(tmp_path: Path) -> None:
    gw = GatewayFake(tmp_path)
    made = gw.client.post("/v1/keys", json={"tenant": "eve", "label": "laptop", "ttl_s": 3600}, headers=gw.ops)
    assert made.status_code == 201
    eve = {"Authorization": f"Bearer {made.json()['key']}"}
    assert gw.client.get("/v1/jobs", headers=eve).status_code == 200
    listed = gw.client.get("/v1/keys", headers=gw.ops).json()["data"]
    assert {"eve"} == {row["tenant"] for row in listed if row["label"] == "laptop"}
    assert all("key" not in row and "digest" not in row for row in listed)
    assert gw.client.delete(f"/v1/keys/{made.json()['key_id']}", headers=gw.ops).json()["revoked_at"] is not None
    assert gw.client.get("/v1/jobs", headers=eve).status_code == 401
    assert gw.client.delete(f"/v1/keys/{'0' * 16}", headers=gw.ops).status_code == 404


def test_a_key_file_holds_only_digests_of_its_keys(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.sqlite", b"k" * 32)
    store.create("ana")
    rows = sqlite3.connect(tmp_path / "keys.sqlite").execute("SELECT length(digest) FROM api_key").fetchall()
    assert rows == [(32,)]


def test_tokens_signed_by_a_private_key_are_checked_with_the_public_one() -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    ours, theirs = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    public = ours.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    config = JwtConfig(**{**JWT, "algorithms": ["ES256"], "key": public})
    assert caller_of_token(token(key=ours, algorithm="ES256"), config).tenant == "ana"
    for wrong in (token(key=theirs, algorithm="ES256"), token()):
        with pytest.raises(KeyRefused):
            caller_of_token(wrong, config)
