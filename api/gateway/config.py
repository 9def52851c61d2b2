"""What an operator may set about the gateway, with the bounds that keep a setting from doing harm."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jwt.algorithms import get_default_algorithms
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

Algorithm = Literal["HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "ES256", "ES384", "EdDSA"]
MIB = 1024 * 1024


class RatePolicy(BaseModel):
    """A GCRA rate: `per_minute` requests sustained, `burst` at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    per_minute: int = Field(default=600, ge=1, le=10_000_000)
    burst: int = Field(default=100, ge=1, le=1_000_000)


class TenantPolicy(BaseModel):
    """Limits of one tenant and its weight in the ranking before the queue."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: int = Field(default=1, ge=1, le=1000)
    submits: RatePolicy = RatePolicy(per_minute=600, burst=100)
    """Requests that make work: jobs, pictures, uploads."""
    reads: RatePolicy = RatePolicy(per_minute=6000, burst=600)
    """All other requests."""
    concurrency: int = Field(default=64, ge=1, le=100_000)
    """Requests in flight at once, open event streams included."""
    max_waiting: int = Field(default=256, ge=1, le=1_000_000)
    """Submissions in the admission window at once."""
    max_deployed_pods: int = Field(default=4, ge=0, le=1000)
    """Pods that a user of the tenant may keep warm with one model; operators may more."""
    max_wait_s: float = Field(default=0.0, ge=0, le=30 * 86_400)
    """Refuse a job that would wait for longer than this before it starts, by the look ahead; 0: never."""
    max_priority: int = Field(default=1000, ge=-1000, le=1000)
    """Highest priority the tenant may ask for; from 100 on a job is urgent."""


class JwtConfig(BaseModel):
    """Accept signed tokens besides API keys. `aud`, `iss` and `exp` are always required."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    algorithms: tuple[Algorithm, ...]
    key: SecretStr
    """The shared secret (HS*, at least 32 bytes) or the public key in PEM."""
    issuer: str = Field(min_length=1)
    audience: str = Field(min_length=1)
    tenant_claim: str = "tenant"
    role_claim: str = "role"
    leeway_s: int = Field(default=10, ge=0, le=300)

    @model_validator(mode="after")
    def _one_family(self) -> JwtConfig:
        if not self.algorithms:
            raise ValueError("algorithms: name at least one; tokens of other algorithms are refused")
        missing = sorted(set(self.algorithms) - set(get_default_algorithms()))
        if missing:
            raise ValueError(f"algorithms: {missing} need the package cryptography; install pyjwt[crypto]")
        shared = [name.startswith("HS") for name in self.algorithms]
        if any(shared) and not all(shared):
            raise ValueError(
                "algorithms: do not mix HS* with public-key ones, or the public key would serve as a shared secret"
            )
        if shared[0] and len(self.key.get_secret_value().encode()) < 32:
            raise ValueError("key: a shared secret needs at least 32 bytes; make one with `openssl rand -hex 32`")
        return self


class GatewayConfig(BaseModel):
    """Everything `create_app` needs besides its ports."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    state_dir: Path
    """Holds `gateway.sqlite` (idempotency, accepted requests, file owners)."""
    signing_secrets: tuple[SecretStr, ...]
    """Sign links: the first signs, all verify; put a new one in front to rotate."""
    public_url: str = ""
    """Address that callers reach; empty: taken from each request."""
    jwt: JwtConfig | None = None
    tenants: dict[str, TenantPolicy] = Field(default_factory=dict)
    default_tenant: TenantPolicy = TenantPolicy()
    request_queue: str = "requests"
    default_model: str = "tiny"
    public_models: tuple[str, ...] = ("tiny",)
    """Models that need no look-up before a job is queued."""
    max_json_bytes: int = Field(default=MIB, ge=1024, le=64 * MIB)
    max_json_depth: int = Field(default=32, ge=4, le=200)
    max_upload_bytes: int = Field(default=64 * MIB, ge=1024, le=4096 * MIB)
    max_picture_pixels: int = Field(default=16_777_216, ge=64, le=178_956_970)
    check_picture_s: float = Field(default=20.0, gt=0, le=120)
    link_ttl_s: int = Field(default=900, ge=1, le=7 * 86_400)
    window_size: int = Field(default=2048, ge=1, le=1_000_000)
    """Submissions that may wait for the queue at once, over all tenants."""
    ordinary_wait_s: float = Field(default=2.0, gt=0, le=600)
    """An ordinary submission that waited this long in the window goes before urgent ones."""
    put_batch: int = Field(default=32, ge=1, le=1024)
    sync_timeout_s: float = Field(default=120.0, gt=0, le=3600)
    """How long `/v1/images/generations` waits before it cancels."""
    queued_wait_s: float = Field(default=10.0, gt=0, le=600)
    """How long a cancel waits for the support service to have read the message."""
    poll_s: float = Field(default=0.05, gt=0, le=10)
    keepalive_s: float = Field(default=15.0, gt=0, le=300)
    idempotency_ttl_s: int = Field(default=86_400, ge=60, le=30 * 86_400)
    metrics_open: bool = False
    """Serve `/metrics` without a key (loopback only); otherwise an operator's key is needed."""
    failed_auth: RatePolicy = RatePolicy(per_minute=60, burst=30)
    """Failed authentications allowed per client address."""
    open_reads: RatePolicy = RatePolicy(per_minute=12_000, burst=1000)
    """Requests without a key (probes, signed links) allowed per client address."""
    watch_s: float = Field(default=5.0, ge=0, le=3600)
    """How often the gateway looks for abnormal states; 0 turns the watch off."""

    @field_validator("signing_secrets")
    @classmethod
    def _strong(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not value or any(len(secret.get_secret_value()) < 32 for secret in value):
            raise ValueError("signing_secrets: at least one secret of 32 or more characters is needed")
        return value

    def tenant(self, name: str) -> TenantPolicy:
        """Return the policy of a tenant."""
        return self.tenants.get(name, self.default_tenant)
