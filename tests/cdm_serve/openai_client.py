"""OpenAI's own client, asked the same way whether it is the sync or the async one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from openai import (
    AsyncOpenAI,
    AsyncStream,
    DefaultAsyncHttpx2Client,
    DefaultHttpx2Client,
    OpenAI,
    Stream,
)

CAT = {"prompt": "a black cat", "extra_body": {"seed": 7}}
Ask = Callable[..., Any]


def sync_client(url: str, **options: Any) -> OpenAI:
    return OpenAI(
        base_url=f"{url}/v1",
        api_key="unused",
        **{"max_retries": 0, "http_client": DefaultHttpx2Client(trust_env=False), **options},
    )


def ask_sync(url: str, call: Callable[[Any], Any]) -> Any:
    with sync_client(url) as client:
        answer = call(client)
        return list(answer) if isinstance(answer, Stream) else answer


def ask_async(url: str, call: Callable[[Any], Any]) -> Any:
    async def run() -> Any:
        http = DefaultAsyncHttpx2Client(trust_env=False)
        async with AsyncOpenAI(
            base_url=f"{url}/v1", api_key="unused", max_retries=0, http_client=http
        ) as client:
            answer = await call(client)
            return [event async for event in answer] if isinstance(answer, AsyncStream) else answer

    return asyncio.run(run())


def generate(**wish: Any) -> Callable[[Any], Any]:
    return lambda client: client.images.generate(**wish)
