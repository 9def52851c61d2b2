"""The scheduler process: engine, world, journal, SS and SS's internal HTTP, brought up from what the journal holds.

It ends when told (SIGTERM, SIGINT) or when storage fails under it; whoever watches it starts it again, and it goes on from the
last durable step.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from prometheus_client import CollectorRegistry, ProcessCollector

from api import elastic
from api.monitoring.fold import MetricsFold
from api.monitoring.metrics import Metrics
from api.mq.port import Queue
from api.mq.sqlite import SqliteQueue
from api.ports import SupportRefused
from api.serving import listen
from api.settings import Settings
from api.sm.capacity import NO_FLEET, CapacityMetrics, advice_to, live_demand
from api.sm.foresight import LiveForesight
from api.sm.journal import JournalBroken, SqliteJournal
from api.sm.loop import LiveWorld, SchedulerLoop, outstanding_of
from api.state_dir import StateDir
from api.support.core import SupportCore
from api.support.http import create_support_app
from api.support.intake import MethodDefaults
from api.support.jobs import Model
from api.support.service import SupportService
from api.support.store import Store
from api.whatif_request import WhatIfRequest
from engine import profiles
from engine.capacity import FleetConfigured
from engine.commands import Command
from engine.events import Event, TenantConfigured
from engine.journal import Record
from engine.limits import Limits
from engine.ports import Forecaster, NoForecast
from engine.profile import Profile
from engine.protocol.controller import Outstanding, Payloads
from engine.replay import recover
from engine.resources import Demand
from engine.scheduler import Engine
from engine.tasks import SECOND, Micros
from executors import curve
from executors.dfs import open_store
from executors.ports import FileStore
from executors.zmq_world import ZmqWorld
from predictors import demand_stored
from predictors.challenger import InBackground
from predictors.forecaster import DeclaredForecaster, OnlineForecaster
from predictors.predictor import Predictor
from predictors.stored import StateUnusable

_log = structlog.get_logger("sm")


LIMITS = Limits(remembered=10_000)
"""SS recognises every request that ever came, so the engine needs to remember only the newest of those that ended."""


@dataclass(frozen=True, slots=True)
class WorldStart:
    """What a world needs to begin, or to go on from an earlier life."""

    payloads: Payloads
    epoch: int
    not_before: Micros
    """The last time in the journal."""
    restore: Outstanding | None


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Everything a scheduler is made of; `from_settings` reads it from the configuration."""

    state: StateDir
    make_world: Callable[[WorldStart], LiveWorld]
    profile: Profile
    methods: Mapping[str, MethodDefaults]
    forecaster: Callable[[Sequence[Record]], Forecaster] = lambda _: NoForecast()
    """Makes the forecaster; gets the recovered records to learn from."""
    forecaster_file: Path | None = None
    """Where an online forecaster is kept between two lives."""
    limits: Limits = LIMITS
    models: Sequence[Model] = ()
    """Builtin and local models."""
    default_model: str = "tiny"
    tenants: Sequence[TenantConfigured] = ()
    files: FileStore | None = None
    fleet: FleetConfigured | None = None
    """Nodes that can be had and given back; None: there are those that join."""
    demand_file: Path | None = None
    """Where the demand forecast is kept between two lives."""
    queue: Queue | None = None
    """The message queue; None: the embedded one in the state directory."""
    host: str = "127.0.0.1"
    port: int = 8081
    snapshot_every: int = 20_000


class _Metrics(Metrics):
    """The registry of this process: its own figures and the scheduler's, none of the gateway's."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)


class Scheduler:
    """A running scheduler. `start` brings it up from the journal, `close` ends it cleanly; `failed` is set when it must end."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.failed = threading.Event()
        self.error: BaseException | None = None
        config.state.create()
        self.journal = SqliteJournal(config.state.journal)
        self.store = Store(config.state.journal)
        self.queue: Queue = config.queue or SqliteQueue(config.state.queue)
        began = time.perf_counter()
        body, records = self.journal.load()
        self.engine: Engine = recover(body, records, config.profile, config.limits)
        self.core = SupportCore(
            self.journal,
            self.store,
            self.queue,
            methods=config.methods,
            default_model=config.default_model,
            files=config.files,
            failed=self._fail,
            # A copy of the keys: it is asked from another thread.
            largest_card=lambda: max((size for _, size in list(self.engine.state.cluster.cards)), default=0),
        )
        self.journal.within = self.core.within
        self.journal.published = self.core.published
        state = self.engine.state
        restore = outstanding_of(state) if state.now else None
        self.world = config.make_world(WorldStart(self.core.payloads, self.journal.epoch, state.now, restore))
        self.metrics = _Metrics()
        self.figures = MetricsFold(self.metrics)
        self.forecaster = config.forecaster(records)
        self.demand = live_demand(self.forecaster, config.profile, config.fleet, config.demand_file, records)
        self.capacity = CapacityMetrics(self.metrics.registry)
        self.capacity.begin(state.wanted_nodes, [node.name for node in state.cluster.nodes if node.up])
        self.foresight = LiveForesight(
            self.engine, self.forecaster, self.metrics.registry, config.state.root / "foresight.json"
        )
        self.loop = SchedulerLoop(
            self.engine,
            self.world,
            self.journal,
            self.forecaster,
            observe=self._observed,
            save=self._save_learned,
            look=self.foresight.look_if_due,
            snapshot_every=config.snapshot_every,
            failed=self._fail,
            demand=self.demand,
        )
        self.support = SupportService(
            self.core,
            self.loop,
            heard=self._heard,
            figures=self._figures,
            foresee=self._foresee,
            foresight=self.foresight,
        )
        _log.info(
            "recovered",
            epoch=self.journal.epoch,
            steps=self.journal.seq,
            tail=len(records),
            jobs=len(self.core.fold.live),
            ms=round((time.perf_counter() - began) * 1000),
        )

    def start(self) -> None:
        """Write the configured models and tenants, then run."""
        with self.journal.transaction() as db:
            self.store.write_fixed_models(db, self.config.models)
        for tenant in self.config.tenants:
            self.world.post(tenant)
        if self.config.fleet != self.engine.state.fleet.config:
            self.world.post(self.config.fleet or NO_FLEET)
        self.loop.start()
        self.core.start(self.loop.post)

    def close(self) -> None:
        """End: take nothing in, finish the step under way, send what is owed, let go of everything."""
        self.core.stop_intake()
        self.loop.stop()
        try:
            self.core.stop()
        except JournalBroken:
            _log.error("journal_broken_at_stop")
        self.world.close()
        self.queue.close()
        self.store.close()
        self.journal.close()

    def _observed(self, now: Micros, events: Sequence[Event], commands: Sequence[Command], duration_s: float) -> None:
        self.figures.step(now, events, commands, duration_s)
        self.foresight.step(now, events, commands)
        self.capacity.step(events, commands)

    def _save_learned(self) -> None:
        self.foresight.save()
        if self.config.demand_file is not None:
            demand_stored.save(self.demand.model, self.config.demand_file)
        if self.config.forecaster_file is not None and isinstance(self.forecaster, OnlineForecaster):
            self.forecaster.save(self.config.forecaster_file)

    def _heard(self) -> Mapping[str, float]:
        """Return when each node was heard last, in Unix seconds, where the world knows."""
        if not isinstance(self.world, ZmqWorld):
            return {}
        return {status.name: status.heard_at / SECOND for status in self.world.nodes()}

    def _figures(self) -> Mapping[str, Any]:
        """Return the loop's figures for `SupportPort.queue`."""
        steps = {"steps": self.journal.seq, "epoch": self.journal.epoch, "live_jobs": len(self.core.fold.live)}
        return {"scheduler": steps, "predictions": self.figures.summary(), "promises": self.foresight.figures()}

    async def _foresee(self, request: WhatIfRequest) -> Mapping[str, Any]:
        """Have a worker simulate two futures of the journal."""
        from api.whatif import WhatIfRefused, WhatIfTooLong, ask_worker

        try:
            return await ask_worker(self.config.state.journal, request, self.config.profile)
        except WhatIfRefused as error:
            raise SupportRefused(422, "invalid_whatif", str(error)) from error
        except WhatIfTooLong as error:
            raise SupportRefused(504, "whatif_too_long", str(error)) from error

    def _fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self.failed.set()


def run_scheduler(config: SchedulerConfig, *, on_ready: Callable[[str, str], None] | None = None) -> int:
    """Run until SIGTERM or SIGINT (returns 0) or until storage or the world fails (returns 1); call in the main thread.

    `on_ready` is told where agents connect and the URL of SS's internal HTTP, once both answer.
    """
    gc.disable()  # recovery only makes what stays; walking it while it grows costs a fifth of the time
    scheduler = Scheduler(config)
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(
        200_000, 50, 1_000
    )  # what lives is not garbage: walk it seldom (benchmarks/engine.py does the same)
    try:
        scheduler.start()
        asyncio.run(_serve(scheduler, on_ready))
    finally:
        scheduler.close()
    if scheduler.error is not None:
        _log.error("ended_by_failure", error=str(scheduler.error))
        return 1
    return 0


class _Server(uvicorn.Server):
    """Leaves the signals to the scheduler."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(scheduler: Scheduler, on_ready: Callable[[str, str], None] | None) -> None:
    config = scheduler.config
    token = config.state.secret("internal")
    app = create_support_app(scheduler.support, token, scheduler.metrics.exposition)
    server = _Server(
        uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2)
    )
    with listen(config.host, config.port, "scheduler.internal_port") as listener:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while on_ready is not None and not (server.started or serving.done()):
            await asyncio.sleep(0.005)
        if on_ready is not None and server.started:
            agents = scheduler.world.endpoint if isinstance(scheduler.world, ZmqWorld) else ""
            on_ready(agents, f"http://{config.host}:{listener.getsockname()[1]}")
        while not (stop.is_set() or scheduler.failed.is_set() or serving.done()):
            try:
                await asyncio.wait_for(stop.wait(), 0.1)
            except TimeoutError:
                pass
        scheduler.core.board.close()
        server.should_exit = True
        await serving


def scheduler_config(settings: Settings) -> SchedulerConfig:
    """Return the scheduler that the configuration describes: agents over ZeroMQ, embedded queue, configured file store."""
    section = settings.scheduler
    state = StateDir(settings.state_dir)
    state.create()

    fleet = elastic.configured(settings.fleet)

    def make_world(begin: WorldStart) -> LiveWorld:
        return ZmqWorld(
            section.bind,
            curve.load_or_generate(state.curve / "scheduler.key"),
            curve.Authorized(state.curve / "authorized"),
            begin.payloads,
            epoch=begin.epoch,
            not_before=begin.not_before,
            restore=begin.restore,
            lease_us=section.lease_ms * 1000,
            heartbeat_us=section.heartbeat_ms * 1000,
            on_advice=advice_to(elastic.FleetFile(state.fleet) if fleet is not None else None),
        )

    forecaster_file = settings.state_dir / "forecaster.json"
    profile_path = Path(section.profile)
    named = profile_path.suffix == ".toml" and profile_path.is_file()
    return SchedulerConfig(
        state=state,
        make_world=make_world,
        profile=profiles.load(profile_path.read_text() if named else section.profile),
        methods=method_defaults(settings),
        forecaster=lambda records: make_forecaster(section.forecaster, records, forecaster_file),
        forecaster_file=forecaster_file,
        demand_file=settings.state_dir / "demand.npz" if section.forecaster == "online" else None,
        fleet=fleet,
        models=fixed_models(settings.models_dir),
        default_model=settings.default_model,
        tenants=[
            TenantConfigured(name, tenant.weight, tenant.max_pending, tenant.max_running)
            for name, tenant in sorted(settings.tenants.items())
        ],
        files=open_store(settings.files_url()),
        host=section.internal_host,
        port=section.internal_port,
        snapshot_every=section.snapshot_every,
    )


def make_forecaster(kind: str, records: Sequence[Record], file: Path | None = None) -> Forecaster:
    """Return the forecaster of a configured kind: what it had learned, and what the recovered records teach beyond that."""
    if kind == "none":
        return NoForecast()
    if kind == "declared":
        return DeclaredForecaster()
    refit = InBackground()
    forecaster = OnlineForecaster(Predictor(refit=refit))
    if file is not None and file.is_file():
        try:
            forecaster = OnlineForecaster.load(file, refit)
        except StateUnusable as error:
            _log.warning("forecaster_begins_anew", file=str(file), error=str(error))
    known = forecaster.predictor.watermark_us
    for record in records:
        if record.now > known:
            forecaster.recall(record.now, record.events, record.commands)
    return forecaster


def method_defaults(settings: Settings) -> dict[str, MethodDefaults]:
    """Return what each method's Pods ask for, from the configuration."""
    return {
        name: MethodDefaults(
            demand=Demand(
                gpus=section.gpus,
                gpu_share=section.gpu_share,
                gpu_memory_bytes=section.gpu_memory_bytes,
                cpu_milli=section.cpu_milli,
                memory_bytes=section.memory_bytes,
            ),
            slots=section.slots,
            urgent_slots=section.urgent_slots,
            max_attempts=section.max_attempts,
            run_limit_us=section.run_limit_s * SECOND,
        )
        for name, section in settings.methods.items()
    }


def fixed_models(models_dir: Path | None) -> list[Model]:
    """Return the bundled model, and one for each diffusers pipeline under `models_dir`, named by its path there."""
    models = [Model("tiny", "builtin")]
    if models_dir is not None:
        if not models_dir.is_dir():
            raise ValueError(
                f"models_dir: {models_dir} is no directory; give the directory that holds one directory per model"
            )
        for index in sorted(models_dir.rglob("model_index.json")):
            path = index.parent
            name = path.relative_to(models_dir).as_posix()
            if name not in (".", "tiny"):
                models.append(Model(name, "local", metadata={"path": str(path.resolve())}))
    return models
