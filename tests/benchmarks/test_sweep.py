"""What `benchmarks.sweep` asks for: every text has to be encoded, as a thousand users' would."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from benchmarks.serve import ServeBenchSettings
from benchmarks.server import ServerError
from benchmarks.sweep import Sweep

INFO = {
    "model": "emoji",
    "default_steps": 4,
    "steps": [1, 2, 4],
    "default_size": {"width": 64, "height": 64},
    "sizes": [{"width": 64, "height": 64}],
}


def test_prompts_differ_in_their_first_word() -> None:
    """What differs only behind the tokens that a model reads is found among the kept embeddings."""
    prompts: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        prompts.append(json.loads(request.content)["prompt"])
        return httpx.Response(418)

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            sweep = Sweep(client, {"step": "http://server"}, INFO, ServeBenchSettings(), "png")
            for _ in range(3):
                with pytest.raises(ServerError, match="did not serve"):
                    await sweep.unloaded("step")

    asyncio.run(ask())
    assert len(prompts) == 3
    assert len({prompt.split()[0] for prompt in prompts}) == len(prompts)
