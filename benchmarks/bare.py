"""What a server's surface is measured against: FastAPI, a body's model, and the same bytes.

    python -m benchmarks.bare --port 8001 --picture red-apple.png

`POST /generate` reads its body as `cdm-serve` does, by the same pydantic model, and answers with the file as it is.
`POST /encode` encodes the file's pixels again for every request, in a thread: a server that draws must do that.
uvicorn is set up as `cdm-serve` sets it up: the same protocol class, the same limits, no access log.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI, Response
from PIL import Image
from pydantic import Field

from cdm_serve.images import MEDIA_TYPES, encode_image, read_parameters
from cdm_serve.protocol import BoundedHttp
from cdm_serve.schemas import Format, GenerateRequest
from engines.cli import CommandSettings, run_command

FORMATS: dict[str, Format] = {".png": "png", ".jpeg": "jpeg", ".webp": "webp"}


class BareSettings(CommandSettings):
    """Answer every request with the same picture."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=1, le=65535, description="TCP port")
    picture: Path = Field(description="file to answer with: .png, .jpeg or .webp")
    max_connections: int = Field(512, ge=1, description="as cdm-serve's --max-connections")


def create_app(picture: Path) -> FastAPI:
    """An app with three routes."""
    app = FastAPI()
    data, format = picture.read_bytes(), FORMATS[picture.suffix]
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    encode = partial(encode_image, pixels, format, read_parameters(data))
    media = MEDIA_TYPES[format]

    @app.get("/readyz")
    async def readyz() -> str:
        return "ready"

    @app.post("/generate")
    async def generate(wish: GenerateRequest) -> Response:
        del wish
        return Response(data, media_type=media)

    @app.post("/encode")
    async def encoded(wish: GenerateRequest) -> Response:
        del wish
        return Response(await asyncio.to_thread(encode), media_type=media)

    return app


def main(argv: list[str] | None = None) -> int:
    """Serve until stopped."""
    return run_command(BareSettings, _serve, argv, prog="bare")


def _serve(settings: BareSettings) -> None:
    uvicorn.run(
        create_app(settings.picture),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        http=BoundedHttp,
        limit_concurrency=settings.max_connections,
    )


if __name__ == "__main__":
    raise SystemExit(main())
