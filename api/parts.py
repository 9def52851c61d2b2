"""The composition root: builds gateway, scheduler and agent from the configuration and runs them, one per process.

Each `run_*` serves until SIGTERM or SIGINT and returns when everything it started has ended.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr

from api.settings import GatewaySection, Settings, TenantSection
from api.state_dir import StateDir, write_private

if TYPE_CHECKING:
    from api.gateway import GatewayConfig
    from engine.resources import GpuSpec
    from executors.dfs import ObjectFileStore

INTERNAL_TOKEN = "internal"  # noqa: S105 - the name of a file, not a secret
LINK_SECRET = "links"  # noqa: S105
KEY_SECRET = "api-keys"  # noqa: S105
LOCAL_TENANT = "local"
"""Tenant of the key that `aigc up` makes for this machine's command line."""


def open_files(settings: Settings) -> ObjectFileStore:
    """Open the file store."""
    from executors.dfs import open_store

    return open_store(settings.files_url())


def gateway_config(settings: Settings) -> GatewayConfig:
    """Translate the configuration for the gateway."""
    from api.gateway import GatewayConfig, RatePolicy, TenantPolicy

    section = settings.gateway
    submits = RatePolicy(per_minute=max(int(section.rate_per_second * 60), 1), burst=section.burst)
    reads = RatePolicy(per_minute=submits.per_minute * 10, burst=submits.burst * 10)

    def policy(tenant: TenantSection) -> TenantPolicy:
        return TenantPolicy(
            weight=tenant.weight,
            submits=submits,
            reads=reads,
            concurrency=section.max_concurrent,
            max_priority=tenant.max_priority,
            max_deployed_pods=tenant.max_deployed_pods,
        )

    public = [settings.default_model, "tiny"]
    if settings.models_dir is not None:
        public += [
            str(path.parent.relative_to(settings.models_dir)) for path in settings.models_dir.rglob("model_index.json")
        ]
    return GatewayConfig(
        state_dir=settings.state_dir,
        signing_secrets=(SecretStr(StateDir(settings.state_dir).secret(LINK_SECRET)),),
        public_url=section.public_url,
        jwt=_jwt(section),
        tenants={name: policy(tenant) for name, tenant in settings.tenants.items()},
        default_tenant=policy(TenantSection()),
        default_model=settings.default_model,
        public_models=tuple(dict.fromkeys(public)),
        max_upload_bytes=section.max_body_bytes,
        link_ttl_s=section.link_ttl_s,
        sync_timeout_s=section.sync_timeout_s,
        metrics_open=section.host in {"127.0.0.1", "::1", "localhost"},
    )


def _jwt(section: GatewaySection):  # type: ignore[no-untyped-def]
    from api.gateway import JwtConfig

    if not section.jwt_algorithm or not section.jwt_key:
        return None
    return JwtConfig(
        algorithms=(section.jwt_algorithm,),
        key=SecretStr(section.jwt_key),
        issuer=section.jwt_issuer,
        audience=section.jwt_audience,
    )


def run_gateway(settings: Settings, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve the REST API; `on_ready` is told the URL once it answers there. Raises OSError when it cannot listen."""

    from api.gateway import create_app
    from api.monitoring.logs import FileTail, LogRing, configure_logging
    from api.mq.sqlite import SqliteQueue
    from api.serving import listen, serve
    from api.support.client import SupportClient

    state = StateDir(settings.state_dir)
    state.create()
    ring = LogRing()
    configure_logging("gw", level=settings.log_level, ring=ring)
    support = SupportClient(settings.internal_url(), state.secret(INTERNAL_TOKEN))
    queue = SqliteQueue(state.queue)
    keys = open_keys(settings)
    app = create_app(
        gateway_config(settings), support, queue, open_files(settings), keys, logs=ring, tail=FileTail(state.logs, ring)
    )
    try:
        with listen(settings.gateway.host, settings.gateway.port, "gateway.port") as listener:
            url = settings.gateway.public_url or f"http://{settings.gateway.host}:{listener.getsockname()[1]}"
            write_private(state.url, url)
            try:
                serve(app, listener, on_ready=None if on_ready is None else partial(on_ready, url))
            finally:
                state.url.unlink(missing_ok=True)
    finally:
        queue.close()
        keys.close()


def open_keys(settings: Settings):  # type: ignore[no-untyped-def]
    """Open the store of API keys."""
    from api.gateway import KeyStore

    state = StateDir(settings.state_dir)
    state.create()
    return KeyStore(state.keys, bytes.fromhex(state.secret(KEY_SECRET)))


def ensure_operator_key(settings: Settings) -> str:
    """Return this machine's operator key, making it the first time."""
    from api.gateway.keys import KeyRefused

    state = StateDir(settings.state_dir)
    keys = open_keys(settings)
    try:
        if state.operator_key.is_file():
            key = state.operator_key.read_text().strip()
            try:
                keys.authenticate(key)
            except KeyRefused:
                pass
            else:
                return str(key)
        key, _ = keys.create(LOCAL_TENANT, "operator", label="made by aigc up")
        write_private(state.operator_key, key)
        return str(key)
    finally:
        keys.close()


def authorize_agent(settings: Settings, name: str, directory: Path) -> Path:
    """Make (or find) an agent's keys in `directory` and let it speak for the node `name`; returns the directory.

    It then holds ``agent.key`` (the agent's own pair) and ``scheduler.pub``; both go to the agent's machine.
    """
    from executors import curve

    state = StateDir(settings.state_dir)
    state.create()
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    pair = curve.load_or_generate(directory / "agent.key")
    curve.authorize(state.curve / "authorized", name, pair.public)
    scheduler = curve.load_or_generate(state.curve / "scheduler.key")
    (directory / "scheduler.pub").write_text(scheduler.public + "\n")
    return directory


def run_agent(
    settings: Settings,
    keys: Path,
    *,
    die_with_parent: bool = False,
    on_joined: Callable[[Sequence[GpuSpec]], None] | None = None,
) -> None:
    """Offer this machine's devices to the scheduler; `on_joined` is told them once the scheduler has taken the node in."""
    from api.monitoring.logs import configure_logging
    from executors import curve
    from executors.agent import AgentOptions
    from executors.agent import run_agent as serve
    from executors.devices import open_plugin
    from executors.limits import host_resources
    from executors.pod_models import ModelCache
    from executors.pod_watch import Patience
    from executors.pods import LocalPodHost

    configure_logging("agent", level=settings.log_level)
    name = settings.agent.name or socket.gethostname()
    pair, public = curve.load(keys / "agent.key"), curve.load_public(keys / "scheduler.pub")
    home = StateDir(settings.state_dir).agent(name)
    home.mkdir(parents=True, exist_ok=True)
    plugin = open_plugin(settings.agent.devices)
    store = open_files(settings)
    cache = ModelCache(
        home / "models", settings.files_url(), settings.models_dir, round(settings.agent.model_cache_gib * 2**30)
    )
    floor_s = settings.agent.hung_after_s
    patience = Patience(first_s=3 * floor_s, floor_s=floor_s, factor=settings.agent.hung_after_steps)
    host = LocalPodHost(plugin, store, home / "work", cache, warm=("torch",), patience=patience)
    resources = host_resources(home)
    options = AgentOptions(
        connect=settings.agent.connect,
        node=name,
        keys=pair,
        scheduler_public_key=public,
        state_dir=home,
        cpu_milli=resources.cpu_milli,
        memory_bytes=resources.memory_bytes,
        disk_bytes=resources.disk_bytes,
        network_bps=resources.network_bps,
        die_with_parent=die_with_parent,
        models=host.stock,
        on_joined=on_joined,
    )
    serve(options, plugin, host)


def run_scheduler(settings: Settings, *, on_ready: Callable[[str, str], None] | None = None) -> int:
    """Run SS and the scheduler; returns 0 when told to end, 1 when storage or the world failed.

    `on_ready` is told the agents' address and SS's internal URL once both answer.
    """
    from api.monitoring.logs import configure_logging
    from api.sm.process import run_scheduler as serve
    from api.sm.process import scheduler_config

    configure_logging("sm", level=settings.log_level)
    return serve(scheduler_config(settings), on_ready=on_ready)
