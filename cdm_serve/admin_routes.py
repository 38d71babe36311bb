"""What operators change while the server runs: `/admin/models`. For admins' keys, or `--admin-open`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from cdm_serve.errors import Forbidden
from cdm_serve.front import read_json_body
from cdm_serve.models import Models, Status
from cdm_serve.routes import BODY_ERROR_DOCS
from cdm_serve.schemas import parse_fields


def _open(request: Request) -> None:
    """Where no key is asked for, whoever reaches the server would be its admin."""
    settings = request.app.state.models.settings
    if settings.keys is None and not settings.admin_open:
        raise Forbidden("/admin is closed; restart with --keys, and send an admin's, or with --admin-open")


router = APIRouter(prefix="/admin", dependencies=[Depends(_open)])


class LoadRequest(BaseModel):
    """The body of `POST /admin/models`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bundle: Annotated[
        str, Field(min_length=1, description="folder of an exported model, on the server's disk")
    ]


CLOSED: dict[int | str, dict[str, Any]] = {403: {"description": "/admin is closed, or the key is no admin's"}}
STATUS: dict[str, Any] = {
    "type": "object",
    "required": ["name", "state", "warmed"],
    "properties": {
        "name": {"type": "string"},
        "state": {"enum": ["loading", "warming", "ready", "draining", "failed"]},
        "warmed": {"type": "array", "items": {"type": "integer"}},
    },
}


@router.get(
    "/models",
    responses={
        **CLOSED,
        200: {
            "description": "Every model that is served (the default first), comes or goes; `warmed`: warm-up calls "
            "made, and how many there are",
            "content": {
                "application/json": {
                    "schema": {"type": "object", "properties": {"models": {"type": "array", "items": STATUS}}}
                }
            },
        },
    },
)
async def list_models(request: Request) -> dict[str, Any]:
    """The models and their states."""
    models: Models = request.app.state.models
    return {"models": [_entry(status) for status in models.statuses()]}


@router.post(
    "/models",
    responses={
        **CLOSED,
        **BODY_ERROR_DOCS,
        200: {
            "description": "It is served now; if the name was served before, by this bundle from now on",
            "content": {"application/json": {"schema": STATUS}},
        },
        422: {"description": "There is no such bundle, or not one that this server can run"},
        500: {"description": "Its engine failed in the warm-up"},
        503: {"description": "The server is stopping"},
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": LoadRequest.model_json_schema()}},
        }
    },
)
async def load_model(request: Request) -> dict[str, Any]:
    """Load a bundle and warm it up beside what is served; then serve it. Answers when it is served."""
    models: Models = request.app.state.models
    wish = parse_fields(LoadRequest, await read_json_body(request, models.settings.max_body_bytes))
    service = await models.load(Path(wish.bundle))
    return _entry(Status(service.name, "ready", service.runner.warmed))


@router.delete(
    "/models/{model:path}",
    responses={
        **CLOSED,
        200: {"description": "It is served no more; everybody it had accepted is answered"},
        404: {"description": "No such model is served"},
        422: {"description": "It is the only one"},
    },
    openapi_extra={
        "parameters": [
            {
                "name": "model",
                "in": "path",
                "required": True,
                "schema": {"type": "string"},
            }
        ]
    },
)
async def unload_model(request: Request) -> dict[str, str]:
    """Refuse newcomers to a model, finish what it accepted, free it."""
    models: Models = request.app.state.models
    name = request.path_params["model"]
    await models.unload(name)
    return {"unloaded": name}


def _entry(status: Status) -> dict[str, Any]:
    return {"name": status.name, "state": status.state, "warmed": list(status.warmed)}
