"""The native HTTP API: `POST /generate`, and what operators and the page ask for."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from cdm_serve.delivery import Made, Preview
from cdm_serve.errors import ClientGone, Unavailable
from cdm_serve.front import read_json_body
from cdm_serve.images import MEDIA_TYPES
from cdm_serve.limits import Order
from cdm_serve.metrics import CONTENT_TYPE_LATEST
from cdm_serve.models import Models
from cdm_serve.picture import STAGES
from cdm_serve.schemas import FORMATS, parse_body
from cdm_serve.service import Service
from cdm_serve.sse import MEDIA_TYPE, EventStream, event
from engines.noise import MAX_SEED

T = TypeVar("T")

router = APIRouter()

BODY_ERROR_DOCS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The body is not JSON, or the content policy refuses the prompt or the picture"},
    408: {"description": "The body took too long to arrive"},
    413: {"description": "The body is too long"},
    415: {"description": "The body does not say that it is JSON"},
    422: {
        "description": "A field has a value that cannot be served; the message names field, value and limit"
    },
}
NO_MODEL_DOCS: dict[int | str, dict[str, Any]] = {404: {"description": "No such model is served here"}}
ERROR_DOCS: dict[int | str, dict[str, Any]] = {
    **BODY_ERROR_DOCS,
    **NO_MODEL_DOCS,
    429: {
        "description": "The queue is full or the deadline cannot be met; Retry-After says when to come back"
    },
    500: {"description": "The engine failed on this picture"},
    503: {"description": "The server is stopping, or its engine is broken"},
}
DOWN_DOCS: dict[int | str, dict[str, Any]] = {503: {"description": "Not now; the message says why"}}
GENERATE_DOCS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The picture itself, or JSON with all of them. With stream, events: `preview` {step, steps, "
        "seed, b64_json} after steps before the last, then `picture` {b64_json, seed, steps, planned_steps, "
        "timings_ms}; or, where it fails after it began, `error` with the body that the answer would have had",
        "content": {media: {} for media in (*MEDIA_TYPES.values(), "application/json")} | {MEDIA_TYPE: {}},
    },
    **ERROR_DOCS,
}


@router.post("/generate", response_class=Response, responses=GENERATE_DOCS)
async def generate(request: Request) -> Response:
    """Make pictures from a prompt. One comes back as the image itself, several (or on request) as JSON."""
    models: Models = request.app.state.models
    wish = parse_body(await read_json_body(request, models.settings.max_body_bytes))
    service = models.find(wish.model)
    order = service.limits.order(wish)
    if wish.stream:
        previews = order.steps if wish.previews is None else wish.previews
        drawing = _drawing(request, service, order, previews)
        return EventStream(drawing, {"x-seed": str(order.seeds[0]), "x-steps-planned": str(order.steps)})
    made = await unless_gone(request, service.generate(order))
    timings = spent(request, made)
    headers = made_headers(order, made, timings)
    if order.as_json:
        return JSONResponse(_document(service, order, made, timings), headers=headers)
    return Response(made[0].data, headers=headers, media_type=MEDIA_TYPES[order.format])


@router.get("/info", responses=NO_MODEL_DOCS)
async def info(
    request: Request, model: Annotated[str | None, Query(description="its name; none: the default")] = None
) -> dict[str, Any]:
    """What a model is, and what it can be asked for; `models`: the names of all."""
    models: Models = request.app.state.models
    service = models.find(model)
    manifest, engine, limits = service.engine.manifest, service.engine.info, service.limits
    return {
        "model": manifest.name,
        "models": [served.name for served in models.services],
        "family": manifest.family,
        "engine": {"runtime": engine.runtime, "version": engine.version, "device": engine.device}
        | {"precision": engine.precision, "max_batch": engine.max_batch, "why": engine.why},
        "steps": list(limits.steps),
        "default_steps": limits.default_steps,
        "auto_deadline_ms": limits.auto_deadline_ms,
        "sizes": [{"width": width, "height": height} for width, height in limits.sizes],
        "default_size": dict(zip(("width", "height"), limits.default_size, strict=True)),
        "max_images": limits.max_images,
        "max_prompt_chars": limits.max_prompt_chars,
        "max_seed": str(MAX_SEED),  # JavaScript's numbers end earlier
        "formats": list(FORMATS),
        "examples": list(service.settings.examples),
        "provenance": manifest.provenance.model_dump(mode="json"),
    }


@router.get("/livez", response_class=PlainTextResponse, responses=DOWN_DOCS)
async def livez(request: Request) -> str:
    """200 while the process can make pictures or will; 503 when only a restart helps."""
    models: Models = request.app.state.models
    if reason := models.broken:
        raise Unavailable(reason)
    return "alive\n"


@router.get("/readyz", response_class=PlainTextResponse, responses=DOWN_DOCS)
async def readyz(request: Request) -> str:
    """200 when every batch size of every model has been warmed up and requests are accepted."""
    models: Models = request.app.state.models
    if reason := models.unavailable:
        raise Unavailable(reason)
    if not all(service.runner.ready.is_set() for service in models.services):
        done, total = (
            sum(counts) for counts in zip(*(s.runner.warmed for s in models.services), strict=True)
        )
        raise Unavailable(
            f"the engine is warming up, {done} of {total} calls made; requests are accepted and wait",
            headers={"retry-after": "1"},
        )
    return "ready\n"


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    models: Models = request.app.state.models
    return Response(models.metrics.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})


async def _drawing(
    request: Request, service: Service, order: Order, previews: int
) -> AsyncGenerator[bytes, None]:
    """The events of one picture."""
    async with aclosing(service.stream(order, previews)) as drawing:
        async for made in drawing:
            if isinstance(made, Preview):
                at = {"step": made.step, "steps": order.steps, "seed": made.seed}
                yield event("preview", {**at, "b64_json": base64_of(made)})
            else:
                entry = _entry(made)
                entry["timings_ms"]["total"] = _since_start(request)
                yield event("picture", entry)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; it is cancelled when the client leaves first (`ClientGone`). The body must be read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())  # after the body, the next message is the disconnect
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("the client left before its pictures were finished")
        return task.result()
    finally:
        gone.cancel()
        if task.cancel():
            await asyncio.wait((task,))  # until it has given its permits back


def _document(
    service: Service, order: Order, made: Sequence[Made], timings: dict[str, float]
) -> dict[str, Any]:
    return {
        "model": service.engine.manifest.name,
        "prompt": order.prompt,
        "width": order.width,
        "height": order.height,
        "format": order.format,
        "images": [_entry(image) for image in made],
        "timings_ms": timings,
    }


def _entry(made: Made) -> dict[str, Any]:
    return {
        "b64_json": base64_of(made),
        "seed": made.seed,
        "steps": made.steps,
        "planned_steps": made.planned_steps,
        "timings_ms": {stage: _ms(getattr(made.spans, stage)) for stage in STAGES},
    }


def base64_of(made: Made | Preview) -> str:
    """A picture's file as JSON carries it."""
    return base64.b64encode(made.data).decode("ascii")


def made_headers(order: Order, made: Sequence[Made], timings: dict[str, float]) -> dict[str, str]:
    """What an answer's headers say of its pictures; `timings`: stage → ms."""
    return {
        "x-seed": ", ".join(str(image.seed) for image in made),
        "x-steps": str(max(image.steps for image in made)),
        "x-steps-planned": str(order.steps),
        "server-timing": ", ".join(f"{stage};dur={ms}" for stage, ms in timings.items()),
        "cache-control": "no-store",
        **(
            {"x-cache": ", ".join(image.source for image in made)}
            if any(i.source != "made" for i in made)
            else {}
        ),
    }


def spent(request: Request, made: Sequence[Made]) -> dict[str, float]:
    """Stage → the longest time that one of the pictures took there, in ms (they ran side by side); total: till now.

    `others` is part of `queue`: while the engine was in calls of others.
    """
    stages = ("others", *STAGES)
    longest = {stage: _ms(max(getattr(image.spans, stage) for image in made)) for stage in stages}
    return {**longest, "total": _since_start(request)}


def _since_start(request: Request) -> float:
    """Milliseconds since the request's head was read."""
    return _ms(time.perf_counter() - request.scope["state"]["started"])


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
