"""An open-loop client: whoever arrives at 10.3 s asks at 10.3 s, whether or not anybody before has been answered.

    async with httpx.AsyncClient(transport=transport(), timeout=60) as client:
        answers = await drive(client, [(f"{url}/generate", arrival.at, body) for …])

A task per arrival. Latency counts from the arrival's *scheduled* time, so what the client itself is late by counts too,
and is told apart as `lag`. Pictures are decoded and their size compared; that happens after the clock has stopped, on a
thread, so that it delays nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
from aiohttp import ClientSession, TCPConnector
from httpx_aiohttp import AiohttpTransport

from benchmarks.outcomes import Outcome, Status
from benchmarks.pictures import problem_with

Body = dict[str, Any]


def transport() -> httpx.AsyncBaseTransport:
    """aiohttp's connections, without a limit, so that no request waits for another's.

    httpx's own look through all of them for every request: under overload the client then stands still for seconds.
    """
    return AiohttpTransport(
        client=lambda: ClientSession(connector=TCPConnector(limit=0, keepalive_timeout=30))
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request. `lag`: seconds from its scheduled time until it was sent; `timing`: server-timing."""

    outcome: Outcome
    lag: float
    http_status: int
    bytes: int
    timing: str


async def drive(
    client: httpx.AsyncClient,
    requests: Sequence[tuple[str, float, Body]],
    marks: Sequence[tuple[float, Callable[[], Awaitable[None]]]] = (),
) -> list[Answer]:
    """Post every (address, seconds from now, body); their answers, in the same order.

    `marks`: what else shall happen at some second, such as reading a counter where the warm-up ends.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    with ThreadPoolExecutor(1, thread_name_prefix="check") as pool:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_send(client, pool, start, *request)) for request in requests]
            for at, action in marks:
                group.create_task(_at(start, at, action))
    return [task.result() for task in tasks]


async def _at(start: float, at: float, action: Callable[[], Awaitable[None]]) -> None:
    await _until(start + at)
    await action()


async def _until(when: float) -> None:
    await asyncio.sleep(max(0.0, when - asyncio.get_running_loop().time()))


async def _send(
    client: httpx.AsyncClient, pool: ThreadPoolExecutor, start: float, url: str, at: float, body: Body
) -> Answer:
    loop = asyncio.get_running_loop()
    await _until(start + at)
    lag = loop.time() - start - at
    try:
        response = await client.post(url, json=body)
    except httpx.HTTPError as error:
        latency = loop.time() - start - at
        return Answer(Outcome(at, "failed", latency, code=type(error).__name__), lag, 0, 0, "")
    latency = loop.time() - start - at
    status, steps, code = await loop.run_in_executor(pool, judge, response, body)
    outcome = Outcome(at, status, latency, steps, code)
    timing = response.headers.get("server-timing", "")
    return Answer(outcome, lag, response.status_code, len(response.content), timing)


def judge(response: httpx.Response, body: Body) -> tuple[Status, int, str]:
    """(status, steps run, why it was not served). A picture counts only if it decodes and has the size asked for."""
    if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
        return "refused", 0, _code(response)
    if response.status_code != httpx.codes.OK:
        return "failed", 0, _code(response)
    if problem := problem_with(response.content, body["width"], body["height"], body["format"]):
        return "failed", 0, problem
    steps = response.headers.get("x-steps", "")
    return ("served", int(steps), "") if steps.isdecimal() else ("failed", 0, "no_x_steps")


def _code(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return f"http_{response.status_code}"
