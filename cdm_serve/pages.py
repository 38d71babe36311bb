"""The page at `/`, the API's documentation at `/docs`, and their files: no build step, nothing from elsewhere."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

router = APIRouter(include_in_schema=False)

MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # a browser asks each time, and is told (304) that it has the file already
}
FILES = {
    file.name: (content, MEDIA_TYPES[suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    for file in files("cdm_serve").joinpath("page").iterdir()
    if (suffix := "." + file.name.rpartition(".")[2]) in MEDIA_TYPES
    for content in (file.read_bytes(),)
}
"""Name → content, media type, entity tag."""


@router.get("/")
async def index(request: Request) -> Response:
    """The page."""
    return _file(request, "index.html")


@router.get("/docs")
async def docs(request: Request) -> Response:
    """The API's documentation, drawn from the OpenAPI document."""
    return _file(request, "docs.html")


@router.get("/page/{name}")
async def page_file(request: Request, name: str) -> Response:
    """One of the page's files."""
    return _file(request, name)


def _file(request: Request, name: str) -> Response:
    if name not in FILES:
        raise HTTPException(404)
    content, media_type, tag = FILES[name]
    headers = {**HEADERS, "etag": tag}
    # RFC 9110, section 13.1.2: a list, and weak comparison.
    known = [
        given.strip().removeprefix("W/") for given in request.headers.get("if-none-match", "").split(",")
    ]
    if tag in known:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)
