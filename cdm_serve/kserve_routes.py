"""The Open Inference Protocol (KServe v2) over HTTP, with the binary tensor extension: what `tritonclient` talks to.

Any answer but 200 has the body `{"error": message}`. Every model has one version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from cdm_serve.compression import decompressed
from cdm_serve.errors import ModelNotFound, Unavailable, UnsupportedMedia
from cdm_serve.front import read_body
from cdm_serve.kserve_infer import parse_infer
from cdm_serve.kserve_schemas import BODY_DOCS, INPUTS, OUTPUTS, PRIORITIES, Spec
from cdm_serve.models import Models
from cdm_serve.routes import livez, readyz, spent, unless_gone
from cdm_serve.schemas import listed
from cdm_serve.service import Service

VERSION = "1"
"""Of a name one bundle is served, so there is one version."""
EXTENSIONS = ("binary_tensor_data", "model_configuration", "schedule_policy")
JSON_LENGTH = "inference-header-content-length"
# What a page on any other site can make its visitor's browser post without asking us first.
FORMS = ("application/x-www-form-urlencoded", "multipart/form-data", "text/plain")
# model_config.proto's names for the datatypes, where they are not simply TYPE_<datatype>.
CONFIG_TYPES = {"BYTES": "TYPE_STRING"}

ERROR_SCHEMA = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
ERROR_DOCS: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": {"application/json": {"schema": ERROR_SCHEMA}}}
    for status, description in {
        400: "What was sent cannot be served, or the content policy refuses it",
        404: "No such model or version",
        408: "The body took too long to arrive",
        413: "The body is too long",
        415: "A type or encoding that is not known",
        429: "The queue is full or the deadline cannot be met; Retry-After says when to come back",
        500: "The engine failed on this picture",
        503: "The server is stopping, warming up, or its engine is broken",
    }.items()
}

BINARY_DOCS = {
    "200": {
        "description": "The outputs; raw ones lie behind the JSON, whose length is Inference-Header-Content-Length",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}

router = APIRouter(prefix="/v2")


@router.get("", responses=ERROR_DOCS)
async def server_metadata(request: Request) -> dict[str, Any]:
    """What this server is, and which extensions of the protocol it has."""
    return {"name": "cdm-serve", "version": request.app.version, "extensions": list(EXTENSIONS)}


@router.get("/health/live", responses=ERROR_DOCS)
async def live(request: Request) -> dict[str, bool]:
    """200 while the process can make pictures or will, as /livez."""
    await livez(request)
    return {"live": True}


@router.get("/health/ready", responses=ERROR_DOCS)
async def ready(request: Request) -> dict[str, bool]:
    """200 when the model is warm and requests are accepted, as /readyz."""
    await readyz(request)
    return {"ready": True}


async def model_metadata(request: Request) -> Response:
    """The model's inputs and outputs; -1 is a size that the request decides (N pictures, their height and width)."""
    service = _served(request)

    def described(specs: dict[str, Spec]) -> list[dict[str, Any]]:
        return [
            {"name": name, "datatype": spec.datatype, "shape": spec.shape} for name, spec in specs.items()
        ]

    return JSONResponse(
        {
            "name": service.engine.manifest.name,
            "versions": [VERSION],
            "platform": _platform(service),
            "inputs": described(INPUTS),
            "outputs": described(OUTPUTS),
        }
    )


async def model_ready(request: Request) -> Response:
    """200 when this model is warm and requests are accepted."""
    service = _served(request)
    if service.unavailable or not service.runner.ready.is_set():
        raise Unavailable(service.unavailable or f"model {service.name!r} is warming up")
    return JSONResponse({"name": service.name, "ready": True})


async def model_config(request: Request) -> Response:
    """The model as Triton's ModelConfig describes one; its `parameters` are the limits of this server."""
    service = _served(request)
    limits = service.limits

    def described(specs: dict[str, Spec]) -> list[dict[str, Any]]:
        return [
            {"name": name, "data_type": CONFIG_TYPES.get(spec.datatype, f"TYPE_{spec.datatype}")}
            | {"dims": spec.shape}
            for name, spec in specs.items()
        ]

    told = {
        "steps": listed(limits.steps),
        "default_steps": str(limits.default_steps),
        "sizes": listed(f"{width}x{height}" for width, height in limits.sizes),
        "max_images": str(limits.max_images),
        "max_prompt_chars": str(limits.max_prompt_chars),
    }
    return JSONResponse(
        {
            "name": service.engine.manifest.name,
            "platform": _platform(service),
            "backend": "cdm-serve",
            # by ModelConfig's rules: the shapes are whole, no batch dimension comes before them
            "max_batch_size": 0,
            "input": [given | {"optional": given["name"] != "prompt"} for given in described(INPUTS)],
            "output": described(OUTPUTS),
            "dynamic_batching": {"priority_levels": PRIORITIES, "default_priority_level": PRIORITIES},
            "parameters": {name: {"string_value": value} for name, value in told.items()},
        }
    )


async def infer(request: Request) -> Response:
    """Make a picture of each prompt: taken in together or not at all, answered when all are finished."""
    models: Models = request.app.state.models
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Browsers send an origin with every POST; tritonclient sends neither that nor a content-type.
    if media in FORMS or (not media and "origin" in request.headers):
        raise UnsupportedMedia(
            f"content-type={media!r} is what any web page can make a browser send; send application/json, or "
            "application/octet-stream with tensors behind the JSON (curl: --json '…' in place of -d '…')"
        )
    limit = models.settings.max_body_bytes
    body = decompressed(await read_body(request, limit), request.headers.get("content-encoding", ""), limit)
    service = _served(request)  # the model may have been replaced while the body came
    wanted = parse_infer(body, request.headers.get(JSON_LENGTH), service.limits)
    made = await unless_gone(request, service.generate_all(wanted.orders))
    timings = ", ".join(f"{stage};dur={ms}" for stage, ms in spent(request, made).items())
    # in a thread: raw pixels are copied here, and written out as text for those who want JSON
    content, length = await asyncio.to_thread(wanted.answer, service.engine.manifest.name, VERSION, made)
    headers = {"server-timing": timings, "cache-control": "no-store"}
    if length is not None:
        headers[JSON_LENGTH] = str(length)
    return Response(
        content,
        headers=headers,
        media_type="application/json" if length is None else "application/octet-stream",
    )


def _served(request: Request) -> Service:
    """The model of the URL, if its version is there too."""
    models: Models = request.app.state.models
    asked = request.path_params
    service = models.find(asked["model"])
    name = service.name
    if asked.get("version", VERSION) != VERSION:
        raise ModelNotFound(
            f"model {name!r} has no version {asked['version'][:80]!r}; it has {VERSION!r}, which may be left out"
        )
    return service


def _platform(service: Service) -> str:
    return f"cdm_{service.engine.info.runtime}"


def _add(suffix: str, endpoint: Callable[[Request], Awaitable[Response]], method: str, **docs: Any) -> None:
    """Route `suffix` of a model, with and without its version. A model's name may have slashes."""
    named = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    for versions, documented in (("/versions/{version}", False), ("", True)):
        router.add_api_route(
            f"/models/{{model:path}}{versions}{suffix}",
            endpoint,
            methods=[method],
            response_class=Response,
            responses={**ERROR_DOCS, 200: {"description": "The answer", "content": {"application/json": {}}}},
            include_in_schema=documented,
            openapi_extra={"parameters": [named], **docs},
        )


_add("/infer", infer, "POST", requestBody=BODY_DOCS, responses=BINARY_DOCS)
_add("/ready", model_ready, "GET")
_add("/config", model_config, "GET")
_add("", model_metadata, "GET")  # last: its {model:path} matches the others too
