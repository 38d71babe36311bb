"""The ASGI app: routes, page and errors around one engine.

app = create_app(ServeSettings(engine="fake"), engine)
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cdm_serve import pages, routes
from cdm_serve.costs import CostModel
from cdm_serve.errors import ServeError, error_response, http_error_response
from cdm_serve.front import Front
from cdm_serve.service import Service
from cdm_serve.settings import ServeSettings
from engines.base import Engine
from engines.cli import DISTRIBUTION


def create_app(settings: ServeSettings, engine: Engine, costs: CostModel | None = None) -> FastAPI:
    """An app that serves `engine`; its lifespan starts and drains the runner, the engine stays the caller's.

    `costs`: the scheduler's cost model, if it shall not begin with the warm-up's measurements.

    Raises:
        BundleError: the settings' limits leave nothing of what the bundle can do.
    """
    service = Service(settings, engine, costs)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service:
            yield

    app = FastAPI(
        title=f"cdm-serve: {engine.manifest.name}",
        version=_version(),
        description="Pictures from prompts, in a few steps.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own page loads its scripts from a CDN; pages.py has one that needs no internet
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(Front, metrics=service.metrics)
    app.add_exception_handler(ServeError, _serve_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.include_router(routes.router)
    app.include_router(pages.router)
    _show_limits(app, service)
    return app


async def _serve_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = {
        404: f"there is no {path}; /docs lists what there is",
        405: f"{request.method} is not allowed for {path}; /docs lists what is",
    }.get(error.status_code, str(error.detail))
    return http_error_response(error.status_code, message, error.headers)


def _show_limits(app: FastAPI, service: Service) -> None:
    """Put the body of /generate, with this server's limits, into the OpenAPI document (we parse it ourselves)."""
    document = app.openapi()
    document["paths"]["/generate"]["post"]["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": service.limits.schema()}},
    }


def _version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:  # run from source
        return "0"
