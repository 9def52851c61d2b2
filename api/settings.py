"""Configuration: defaults, then a TOML file, then ``AIGC_*`` environment variables, then flags; later ones win.

Nested fields are spelled with two underscores in the environment: ``AIGC_GATEWAY__PORT=9000``.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from api.misconfigured import described, misspelt

GIB = 1 << 30


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


_AnySection = TypeVar("_AnySection", bound=_Section)


def _address(value: str) -> str:
    """Return an address of agents as it is; raises ValueError where ZeroMQ could make nothing of it."""
    if not re.fullmatch(r"tcp://(\[[^\]]+\]|[^:/\s]+):(\d{1,5}|\*)", value):
        raise ValueError("write tcp://HOST:PORT")
    return value


class GatewaySection(_Section):
    """The gateway (GW): what faces customers."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(8080, ge=0, le=65535)
    """Port to listen on; 0: any free one."""
    public_url: str = ""
    """Base of links handed to customers; empty: the address the gateway listens on."""
    rate_per_second: float = Field(20.0, gt=0)
    """Requests a tenant may send per second, sustained."""
    burst: int = Field(60, ge=1)
    """Requests a tenant may send at once after a pause."""
    max_concurrent: int = Field(64, ge=1)
    """Requests a tenant may have in flight at the gateway."""
    max_body_bytes: int = Field(32 << 20, ge=1024)
    """Largest request body."""
    link_ttl_s: int = Field(3600, ge=1)
    """Life of a signed link to a picture."""
    sync_timeout_s: float = Field(300.0, gt=0)
    """Longest wait of the synchronous images route."""
    jwt_algorithm: Literal["", "HS256", "RS256", "ES256"] = ""
    """The one algorithm that tokens may use."""
    jwt_key: str = ""
    """Secret (HS256) or public key (PEM); empty: JWT is off."""
    jwt_issuer: str = ""
    """Required `iss` of tokens."""
    jwt_audience: str = "aigc"
    """Required `aud` of tokens."""


class SchedulerSection(_Section):
    """The support service (SS) and the scheduler (SM), one process."""

    profile: str = "aigc"
    """Name of a profile, or path of a TOML file with one."""
    bind: Annotated[str, AfterValidator(_address)] = "tcp://127.0.0.1:5570"
    """Where agents connect; CURVE is always on."""
    internal_host: str = "127.0.0.1"
    """Address of SS's internal HTTP; keep it on loopback or a private network."""
    internal_port: int = Field(8081, ge=0, le=65535)
    """Loopback HTTP from the gateway to SS."""
    forecaster: Literal["online", "declared", "none"] = "online"
    """What stamps predictions on tasks: the online predictor, the declared durations, or nothing."""
    lease_ms: int = Field(10_000, ge=500)
    """How long an agent may run on without a heartbeat being answered."""
    heartbeat_ms: int = Field(1_000, ge=50)
    """How often an agent sends a heartbeat."""
    snapshot_every: int = Field(20_000, ge=100)
    """Steps between two snapshots of the journal."""


class AgentSection(_Section):
    """A node agent."""

    connect: Annotated[str, AfterValidator(_address)] = "tcp://127.0.0.1:5570"
    """The scheduler's `bind`, as this machine reaches it."""
    name: str = ""
    """Node name; empty: the host's name."""
    devices: str = "auto"
    """``auto``, ``nvml``, ``cpu:N`` or ``file:PATH`` (a JSON inventory)."""
    model_cache_gib: float = Field(20.0, gt=0, le=1_000_000)
    """What personalised models that were fetched may take of the node's disk."""
    hung_after_s: float = Field(300.0, gt=0, le=86_400)
    """A Pod in which something runs counts as hung when it gives no sign of life for so long, at least."""
    hung_after_steps: float = Field(20.0, ge=2, le=100_000)
    """And for so many times the longest step seen lately; three times `hung_after_s` while steps are not known."""


class FleetSection(_Section):
    """Nodes that come and go with the demand: agents that `aigc up` starts and stops on this machine."""

    nodes_max: int = Field(0, ge=0, le=1000)
    """Most nodes; 0: there is no fleet, and `aigc up` runs one agent."""
    nodes_min: int = Field(1, ge=0, le=1000)
    """Fewest nodes."""
    gpus: int = Field(1, ge=1)
    """GPUs (or CPU slots) of one node."""
    devices: str = "cpu:1"
    """Devices of each node: ``cpu:N`` or ``file:PATH``; nodes on one machine must not offer the same GPUs twice."""
    start_s: float = Field(15.0, ge=0, le=86_400)
    """How long a node takes to join, usually: the forecast looks so far ahead."""
    cool_down_s: float = Field(300.0, ge=0, le=86_400)
    """How long less must have been in use before nodes go."""
    price_per_hour: float = Field(0.0, ge=0)
    """Of one node; for reports."""
    prefix: str = Field("elastic-", pattern="^[a-z][a-z0-9-]*$")
    """Its nodes' names: this and a number."""

    @model_validator(mode="after")
    def _fits(self) -> FleetSection:
        if self.nodes_max and self.nodes_min > self.nodes_max:
            raise ValueError(f"nodes_min ({self.nodes_min}) must not be above nodes_max ({self.nodes_max})")
        if self.nodes_max and not self.devices.startswith(("cpu:", "file:")):
            raise ValueError(f"devices: {self.devices!r} would be offered by every node; use cpu:N or file:PATH")
        return self


class MethodSection(_Section):
    """What a Pod of one AI method asks for by default."""

    gpus: int = Field(1, ge=0)
    """GPUs of a Pod."""
    gpu_share: int = Field(1000, ge=1, le=1000)
    """Share of each GPU in thousandths; 1000: the whole device."""
    gpu_memory_bytes: int = Field(0, ge=0)
    """Memory on each GPU; 0: as predicted, the whole card at most."""
    cpu_milli: int = Field(0, ge=0)
    """CPU in thousandths of a core; 0: no limit."""
    memory_bytes: int = Field(0, ge=0)
    """Host memory; 0: no limit."""
    slots: int = Field(1, ge=1)
    """Tasks a Pod may hold at once."""
    urgent_slots: int = Field(0, ge=0)
    """Urgent tasks that a Pod takes beyond its slots when all are taken, as many as `slots` at most."""
    max_attempts: int = Field(3, ge=1, le=20)
    """Attempts before a task goes to the dead letter."""
    run_limit_s: int = Field(3600, ge=1)
    """Longest run of one attempt."""


def _default_methods() -> dict[str, MethodSection]:
    return {
        "text_to_image": MethodSection(slots=4, urgent_slots=2, run_limit_s=1800),
        "dreambooth": MethodSection(run_limit_s=6 * 3600),
        "sleep": MethodSection(run_limit_s=24 * 3600),
    }


class TenantSection(_Section):
    """Weight and limits of one tenant in the scheduler; 0 means no limit."""

    weight: int = Field(1, ge=1)
    """Share of the cluster relative to other tenants."""
    max_pending: int = Field(0, ge=0)
    """Waiting tasks at most."""
    max_running: int = Field(0, ge=0)
    """Running tasks at most."""
    max_priority: int = Field(1000, ge=-1000, le=1000)
    """Highest priority the tenant may ask for; 100 and above is urgent."""
    max_deployed_pods: int = Field(4, ge=0, le=1000)
    """Warm Pods the tenant may keep deployed."""


class Settings(BaseSettings):
    """Everything that can be configured; `docs/configuration.md` is checked against this class."""

    model_config = SettingsConfigDict(
        env_prefix="AIGC_", env_nested_delimiter="__", extra="forbid", use_attribute_docstrings=True
    )

    state_dir: Path = Path("aigc-state")
    """Everything durable lies here: queue, journal, store, keys, files."""
    store_url: str = ""
    """File store: ``file:///dir``, ``memory://`` or ``s3://bucket/prefix``; empty: ``files/`` under `state_dir`."""
    models_dir: Path | None = None
    """Each subdirectory is a model in diffusers' format, used by its name; the bundled ``tiny`` is always there."""
    default_model: str = "tiny"
    """Model of generation requests that name none."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log line that is written."""
    gateway: GatewaySection = Field(default_factory=GatewaySection)
    scheduler: SchedulerSection = Field(default_factory=SchedulerSection)
    agent: AgentSection = Field(default_factory=AgentSection)
    fleet: FleetSection = Field(default_factory=FleetSection)
    methods: dict[str, MethodSection] = Field(default_factory=_default_methods)
    tenants: dict[str, TenantSection] = Field(default_factory=dict)

    def files_url(self) -> str:
        """Return the file store's URL with the default filled in."""
        return self.store_url or (self.state_dir.resolve() / "files").as_uri()

    def gateway_url(self) -> str:
        """Return the base URL customers use."""
        return self.gateway.public_url or f"http://{self.gateway.host}:{self.gateway.port}"

    def internal_url(self) -> str:
        """Return the base URL of SS's internal HTTP."""
        return f"http://{self.scheduler.internal_host}:{self.scheduler.internal_port}"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: flags, environment, TOML file."""
        toml = _toml_path
        sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
        if toml is not None:
            sources.append(TomlConfigSettingsSource(settings_cls, toml_file=toml))
        return tuple(sources)


_toml_path: Path | None = None


class ConfigurationError(ValueError):
    """The configuration is wrong; the message names each field and what it should be."""


def load_settings(config: Path | None = None, **flags: Any) -> Settings:
    """Read the configuration; `config` (or ``AIGC_CONFIG``, or ``aigc.toml`` where present) is the TOML file.

    Raises ConfigurationError naming the fields that are wrong.
    """
    global _toml_path
    path = config or (Path(os.environ["AIGC_CONFIG"]) if os.environ.get("AIGC_CONFIG") else None)
    if path is None and Path("aigc.toml").is_file():
        path = Path("aigc.toml")
    if path is not None and not path.is_file():
        raise ConfigurationError(
            f"configuration file {path} does not exist; give the path of a TOML file or leave it out"
        )
    if lines := misspelt(sorted(os.environ), Settings, "AIGC_"):
        raise ConfigurationError("the environment is wrong:\n" + "\n".join(lines))
    _toml_path = path
    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: not valid TOML: {error}") from error
    except ValidationError as error:
        raise ConfigurationError("the configuration is wrong:\n" + "\n".join(described(error, Settings))) from error
    finally:
        _toml_path = None
    settings.methods = {**_default_methods(), **settings.methods}
    return settings


def changed(section: _AnySection, name: str, /, **values: Any) -> _AnySection:
    """Return a section, called `name`, with the values that are not None in place; raises ConfigurationError."""
    kind = type(section)
    try:
        return kind(
            **{**section.model_dump(), **{field: value for field, value in values.items() if value is not None}}
        )
    except ValidationError as error:
        raise ConfigurationError("this is wrong:\n" + "\n".join(described(error, kind, name))) from error


def settings_table() -> str:
    """Return a Markdown table of every field: name, type, default, meaning."""
    rows = ["| field | default | meaning |", "|---|---|---|"]

    def visit(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                visit(kind, f"{prefix}{name}.")
            elif name in {"methods", "tenants"}:
                section, key = (MethodSection, "NAME") if name == "methods" else (TenantSection, "TENANT")
                visit(section, f"{prefix}{name}.{key}.")
            else:
                default = field.get_default(call_default_factory=True, validated_data={})
                shown = "" if default in ("", None) else f"`{default}`"
                rows.append(f"| `{prefix}{name}` | {shown} | {' '.join((field.description or '').split())} |")

    visit(Settings, "")
    return "\n".join(rows) + "\n"
