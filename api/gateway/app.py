"""Puts the gateway together: one FastAPI application around the ports it is given."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi

from api.gateway import console, files, image_edits, images, jobs, models, operators, problems, quotes
from api.gateway.config import GatewayConfig
from api.gateway.context import Gateway, known_query
from api.gateway.gate import Envelope, Gate
from api.gateway.intake import Intake, QueuePort
from api.gateway.keys import KeyStore
from api.gateway.ranking import AdmissionWindow
from api.gateway.records import Records
from api.gateway.submissions import Submissions, Validate, validate_parameters
from api.monitoring.logs import FileTail, LogRing
from api.monitoring.metrics import Metrics
from api.monitoring.watch import Watch
from api.ports import SupportPort
from executors.ports import FileStore

_DESCRIPTION = """Image generation and model training on a GPU cluster.

Every error is `application/problem+json` with the fields of RFC 9457 and an `error` object as the openai SDK reads it. Every answer
carries `x-request-id`; give one in the request to have it used."""


def create_app(
    config: GatewayConfig,
    support: SupportPort,
    queue: QueuePort,
    store: FileStore,
    keys: KeyStore,
    *,
    metrics: Metrics | None = None,
    logs: LogRing | None = None,
    tail: FileTail | None = None,
    validate: Validate = validate_parameters,
) -> FastAPI:
    """Return the gateway's application. Serve it with access logs off: links carry signatures in their query."""
    metrics = metrics if metrics is not None else Metrics()
    logs = logs if logs is not None else LogRing()
    records = Records(config.state_dir / "gateway.sqlite")
    window: AdmissionWindow[Any] = AdmissionWindow(config.window_size, int(config.ordinary_wait_s * 1e6))
    intake = Intake(queue, config.request_queue, window, metrics, _now_us, config.put_batch)
    submissions = Submissions(config, support, intake, records, time.time, validate)
    watch = Watch(support, metrics, time.time, every_s=config.watch_s, tail=tail)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        app.openapi()
        watch.start()
        try:
            yield
        finally:
            await watch.stop()

    app = FastAPI(
        title="AIGC platform",
        version=_version(),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Depends(known_query)],
    )
    app.state.gateway = Gateway(config, support, store, keys, records, submissions, metrics, logs, watch, time.time)
    problems.install(app)
    for router in (
        jobs.router,
        quotes.router,
        images.router,
        image_edits.router,
        files.router,
        models.router,
        operators.router,
        operators.probes,
        console.router,
    ):
        app.include_router(router)
    app.add_middleware(Gate, config=config, keys=keys, metrics=metrics, clock_us=_now_us)
    app.add_middleware(Envelope, metrics=metrics)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document, with the one error body in place of the framework's."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        problem = problems.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(problem.pop("$defs", {}))
        schemas["Problem"] = problem
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        app.openapi_schema = document
    return app.openapi_schema


def _now_us() -> int:
    return time.monotonic_ns() // 1000


def _version() -> str:
    try:
        return version("aigc-platform")
    except PackageNotFoundError:
        return "0"
