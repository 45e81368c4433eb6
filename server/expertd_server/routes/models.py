"""GET /v1/models and /v1/models/{id}: what is served, under the name clients use."""

from __future__ import annotations

from fastapi import APIRouter

from expertd_server.errors import declared
from expertd_server.schemas import Model, ModelList
from expertd_server.service import ServedModel, Service


def router(service: Service) -> APIRouter:
    """The routes of this module, bound to `service`."""
    routes = APIRouter()

    @routes.get("/v1/models", responses=dict(declared(401, 500, 503)))
    async def list_models() -> ModelList:
        """The models served."""
        return ModelList(data=[_entry(service.serving())])

    @routes.get("/v1/models/{model_id:path}", responses=dict(declared(401, 404, 500, 503)))
    async def get_model(model_id: str) -> Model:
        """One model by its id, which may hold slashes."""
        model = service.serving()
        service.check_model(model_id or "/", model)
        return _entry(model)

    return routes


def _entry(model: ServedModel) -> Model:
    return Model(
        id=model.name, created=model.loaded_unix_s, root=model.codec.model_name, max_model_len=model.info.max_model_len
    )
