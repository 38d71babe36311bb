"""OpenAI's Images API: `POST /v1/images/generations`, plain and streamed, and the models that can be named there.

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
client.images.generate(prompt="red apple", n=2).data[1].b64_json
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from cdm_serve.delivery import Preview
from cdm_serve.front import read_json_body
from cdm_serve.limits import Order
from cdm_serve.models import Models
from cdm_serve.openai_schemas import ImagesRequest, order_of, usage_of
from cdm_serve.routes import ERROR_DOCS, NO_MODEL_DOCS, base64_of, made_headers, spent, unless_gone
from cdm_serve.schemas import parse_fields
from cdm_serve.service import Service
from cdm_serve.sse import MEDIA_TYPE, EventStream, event

router = APIRouter(prefix="/v1")

OWNER = "cdm-serve"

IMAGES_DOCS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "{created, data: [{b64_json, seed, steps}], background, output_format, quality, size, usage}; "
        "with stream, events: `image_generation.partial_image`, then `image_generation.completed`, or `error`",
        "content": {"application/json": {}, MEDIA_TYPE: {}},
    },
    **{status: docs for status, docs in ERROR_DOCS.items() if status != 422},
    400: {
        "description": "The body is not JSON, or a field has a value that cannot be served (param names the field), or "
        "the content policy refuses the prompt or the picture"
    },
}


@router.post("/images/generations", response_class=Response, responses=IMAGES_DOCS)
async def generate_images(request: Request) -> Response:
    """Make pictures from a prompt, as OpenAI's clients ask for them."""
    models: Models = request.app.state.models
    wish = parse_fields(ImagesRequest, await read_json_body(request, models.settings.max_body_bytes))
    service = models.find(wish.model)
    order = order_of(wish, service.limits)
    if wish.stream:
        drawing = _drawing(service, order, wish.partial_images or 0)
        return EventStream(drawing, {"x-seed": str(order.seeds[0]), "x-steps-planned": str(order.steps)})
    made = await unless_gone(request, service.generate(order))
    answer = {
        "created": int(time.time()),
        "data": [{"b64_json": base64_of(image), "seed": image.seed, "steps": image.steps} for image in made],
        **_settings(order),
        "usage": usage_of(service.engine, order),
    }
    return JSONResponse(answer, headers=made_headers(order, made, spent(request, made)))


@router.get("/models", responses={})
async def list_models(request: Request) -> dict[str, Any]:
    """The served models, the default first."""
    models: Models = request.app.state.models
    return {"object": "list", "data": [_model(service) for service in models.services]}


@router.get(
    "/models/{model:path}",  # a name may have slashes
    responses=NO_MODEL_DOCS,
    openapi_extra={
        "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    },
)
async def retrieve_model(request: Request) -> dict[str, Any]:
    """A served model, by its name."""
    models: Models = request.app.state.models
    return _model(models.find(request.path_params["model"]))


async def _drawing(service: Service, order: Order, previews: int) -> AsyncGenerator[bytes, None]:
    """The events of one picture."""
    sent = 0
    async with aclosing(service.stream(order, previews)) as drawing:
        async for made in drawing:
            data = {"b64_json": base64_of(made), "created_at": int(time.time()), **_settings(order)}
            if isinstance(made, Preview):
                kind = "image_generation.partial_image"
                yield event(kind, {"type": kind, "partial_image_index": sent, **data})
                sent += 1
            else:
                kind = "image_generation.completed"
                extra = {"usage": usage_of(service.engine, order), "seed": made.seed, "steps": made.steps}
                yield event(kind, {"type": kind, **data, **extra})


def _settings(order: Order) -> dict[str, str]:
    """How the pictures were made, in OpenAI's words. No quality of theirs is claimed: there is one, the model's."""
    return {
        "background": "opaque",
        "output_format": order.format,
        "quality": "auto",
        "size": f"{order.width}x{order.height}",
    }


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.began, "owned_by": OWNER}
