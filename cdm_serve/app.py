"""The ASGI app: routes, page and errors around the models.

app = create_app(ServeSettings(engine="fake"), engine)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Match

from cdm_serve import admin_routes, kserve_routes, openai_routes, openai_schemas, pages, routes
from cdm_serve.costs import CostModel
from cdm_serve.errors import ServeError, error_response, http_error_response
from cdm_serve.front import Catch, Front
from cdm_serve.guard import Guard, show_keys
from cdm_serve.keys import KeyRing
from cdm_serve.limits import Limits
from cdm_serve.models import Models
from cdm_serve.settings import ServeSettings
from cdm_serve.tracing import open_tracing, telemetry
from engines.base import Engine
from engines.cli import DISTRIBUTION

EXPOSED_HEADERS = (
    "x-request-id", "x-seed", "x-steps", "x-steps-planned", "x-cache", "server-timing", "retry-after", "retry-after-ms",
    "inference-header-content-length",
)  # fmt: skip
"""What a page of another site may read of an answer's headers, beyond the few that it always may."""


ROUTERS = (
    routes.router, openai_routes.router, kserve_routes.router, admin_routes.router, pages.router
)  # fmt: skip


def create_app(settings: ServeSettings, *engines: Engine, costs: CostModel | None = None) -> FastAPI:
    """An app that serves `engines`, the first by default; its lifespan starts and drains them, and closes them at last.

    `costs`: the first one's cost model, if it shall not begin with the warm-up's measurements.

    Raises:
        BundleError: the settings' limits leave nothing of what a bundle can do.
        UsageError: a file or a function that the settings name is not there, or not what it must be; two bundles have
            the same name.
    """
    keys = None if settings.keys is None else KeyRing(settings.keys)
    tracing = open_tracing(settings.otlp_endpoint)
    models = Models(settings, engines, costs, tracing)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            async with models:
                yield
        finally:
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title=f"cdm-serve: {models.default.name}",
        version=_version(),
        description="Pictures from prompts, in a few steps.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own page loads its scripts from a CDN; pages.py has one that needs no internet
        redoc_url=None,
        telemetry=telemetry(tracing),
    )
    app.state.models = models
    app.state.keys = keys
    # From the inside out: each is around those before it.
    if keys is not None:
        app.add_middleware(Guard, keys=keys, metrics=models.metrics, metrics_open=settings.metrics_open)
    app.add_middleware(Catch)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origin, allow_methods=["*"], allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )  # fmt: skip
    app.add_middleware(Front, metrics=models.metrics, body_timeout_s=settings.body_timeout_s)
    if tracing is not None:
        app.add_middleware(tracing.described)
    app.add_exception_handler(ServeError, _serve_error)
    app.add_exception_handler(HTTPException, _http_error)
    for router in ROUTERS:
        app.include_router(router)
    _show_limits(app, models.default.limits)
    if keys is not None:
        show_keys(app.openapi(), settings.metrics_open)
    return app


async def _serve_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    return error_response(error, request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = {
        404: f"there is no {path}; /docs lists what there is",
        405: f"{request.method} is not allowed for {path}; /docs lists what is",
    }.get(error.status_code, str(error.detail))
    headers = error.headers
    if error.status_code == 405:  # the framework names the methods of the first route of this path only
        fitting = [
            route
            for router in ROUTERS
            for route in router.routes
            if route.matches(request.scope)[0] != Match.NONE
        ]
        headers = {
            "allow": ", ".join(sorted({name for route in fitting for name in getattr(route, "methods", ())}))
        }
    return http_error_response(error.status_code, message, headers, path)


def _show_limits(app: FastAPI, limits: Limits) -> None:
    """Put the bodies, with the default model's limits, into the OpenAPI document (we parse them ourselves)."""
    document = app.openapi()
    bodies = {
        "/generate": limits.schema(),
        "/v1/images/generations": openai_schemas.schema(limits),
    }
    for path, schema in bodies.items():
        document["paths"][path]["post"]["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }


def _version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:  # run from source
        return "0"
