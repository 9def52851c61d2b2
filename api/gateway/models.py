"""Models: what a caller may generate with, and keeping one warm."""

from __future__ import annotations

from typing import Annotated

import structlog
from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict, Field

from api.gateway.context import AnyCaller, GatewayParts
from api.gateway.fields import Whole
from api.gateway.problems import Refused, declared
from api.ports import ModelView

log = structlog.get_logger("gateway")
router = APIRouter(prefix="/v1", tags=["models"])
ModelId = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}$")]


class Model(ModelView):
    """A model, with the fields the openai SDK reads."""

    id: str
    object: str = "model"
    created: int
    owned_by: str


class Models(BaseModel):
    """The models the caller may use."""

    object: str = "list"
    data: list[Model]


class Deleted(BaseModel):
    """A model that is gone."""

    id: str
    object: str = "model"
    deleted: bool = True


class Deployment(BaseModel):
    """How many Pods to keep warm."""

    model_config = ConfigDict(extra="forbid")

    pods: Whole = Field(default=1, ge=1, le=1000)


@router.get("/models", response_model=Models, responses=declared(), summary="List models")
async def list_models(known: AnyCaller, parts: GatewayParts) -> Models:
    """List the built-in models and the caller's own."""
    return Models(data=[_model(view) for view in await parts.support.models(known.scope)])


@router.post(
    "/models/{model_id:path}/deploy", response_model=Model, responses=declared(409), summary="Keep a model warm"
)
async def deploy(model_id: ModelId, known: AnyCaller, parts: GatewayParts, body: Deployment | None = None) -> Model:
    """Keep Pods with the model warm, so that generation with it starts at once."""
    pods, most = body.pods if body else 1, parts.config.tenant(known.tenant).max_deployed_pods
    if known.role != "operator" and pods > most:
        raise Refused(403, "too_many_pods", f"pods: this tenant may keep {most} warm at most.", param="pods")
    view = await parts.support.deploy(known.scope, model_id, pods)
    log.info("model_deployed", model=model_id, by=known.key_id, pods=view.deployed_pods)
    return _model(view)


@router.post(
    "/models/{model_id:path}/undeploy", response_model=Model, responses=declared(409), summary="Let a model go cold"
)
async def undeploy(model_id: ModelId, known: AnyCaller, parts: GatewayParts) -> Model:
    """Keep no Pod warm for the model any more."""
    view = await parts.support.deploy(known.scope, model_id, 0)
    log.info("model_undeployed", model=model_id, by=known.key_id)
    return _model(view)


@router.delete(
    "/models/{model_id:path}", response_model=Deleted, responses=declared(409), summary="Delete a personalised model"
)
async def delete_model(model_id: ModelId, known: AnyCaller, parts: GatewayParts) -> Deleted:
    """Delete a model that a training made; 409 while a job uses it."""
    await parts.support.delete_model(known.scope, model_id)
    log.info("model_deleted", model=model_id, by=known.key_id)
    return Deleted(id=model_id)


@router.get("/models/{model_id:path}", response_model=Model, responses=declared(), summary="Look at a model")
async def get_model(model_id: ModelId, known: AnyCaller, parts: GatewayParts) -> Model:
    """Return one model."""
    if model_id.endswith(("/deploy", "/undeploy")):
        raise Refused(405, "method_not_allowed", "Only POST is possible here.", headers={"Allow": "POST"})
    return _model(await parts.support.model(known.scope, model_id))


def _model(view: ModelView) -> Model:
    return Model(
        **view.model_dump(), id=view.model_id, created=int(view.created_at), owned_by=view.tenant or "platform"
    )
