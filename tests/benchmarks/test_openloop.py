"""Laws of the open-loop client, on a virtual clock: it asks when it was told to, and hides no waiting."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable, Sequence

import httpx
import pytest
from PIL import Image

from benchmarks.openloop import Answer, Body, drive
from tests.benchmarks.virtual_loop import VirtualLoop

SERVICE_S = 0.5
BODY: Body = {"prompt": "red apple", "width": 8, "height": 4, "format": "png"}
Handler = Callable[[httpx.Request], Awaitable[httpx.Response]]


def picture(width: int = 8, height: int = 4, format: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, format)
    return file.getvalue()


def driven(times: Sequence[float], handler: Handler, loop: VirtualLoop | None = None) -> list[Answer]:
    async def main() -> list[Answer]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handler), timeout=None) as client:
            return await drive(client, [("http://server/generate", at, BODY) for at in times])

    with asyncio.Runner(loop_factory=lambda: loop or VirtualLoop()) as runner:
        return runner.run(main())


async def instant(_: httpx.Request) -> httpx.Response:
    return httpx.Response(200, content=picture(), headers={"x-steps": "4"})


def test_waiting_behind_others_is_latency_and_not_a_slower_arrival() -> None:
    """A server of one at a time: the k-th of a burst waits for k before it. A closed loop would report `SERVICE_S`."""
    arrived: list[float] = []
    free = asyncio.Lock()

    async def one_at_a_time(request: httpx.Request) -> httpx.Response:
        arrived.append(asyncio.get_running_loop().time())
        async with free:
            await asyncio.sleep(SERVICE_S)
        return await instant(request)

    times = [1.0, 1.1, 1.2, 1.3, 9.0]
    answers = driven(times, one_at_a_time)
    assert arrived == pytest.approx(times)
    ends = [1.5, 2.0, 2.5, 3.0, 9.5]
    assert [answer.outcome.latency for answer in answers] == pytest.approx(
        [end - at for end, at in zip(ends, times, strict=True)]
    )
    assert [answer.outcome.at for answer in answers] == times


def test_what_the_client_is_late_by_counts_and_is_told() -> None:
    loop = VirtualLoop()

    async def busy_at_first(request: httpx.Request) -> httpx.Response:
        if loop.now < 1:
            loop.now = 2.0  # the client's own processor was taken
        return await instant(request)

    first, second = driven([0.0, 1.0], busy_at_first, loop)
    assert first.lag == pytest.approx(0.0)
    assert second.lag == pytest.approx(1.0)
    assert second.outcome.latency == pytest.approx(1.0)


def error(status: int, code: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": "…", "code": code}})


@pytest.mark.parametrize(
    ("response", "status", "code"),
    [
        (error(429, "queue_full"), "refused", "queue_full"),
        (error(429, "deadline_infeasible"), "refused", "deadline_infeasible"),
        (error(500, "generation_failed"), "failed", "generation_failed"),
        (httpx.Response(502, text="bad gateway"), "failed", "http_502"),
        (httpx.Response(200, content=b"rubbish"), "failed", "no_picture"),
        (
            httpx.Response(200, content=picture()[: len(picture()) // 2], headers={"x-steps": "4"}),
            "failed",
            "no_picture",
        ),
        (httpx.Response(200, content=picture(4, 8), headers={"x-steps": "4"}), "failed", "wrong_size"),
        (
            httpx.Response(200, content=picture(format="jpeg"), headers={"x-steps": "4"}),
            "failed",
            "wrong_format",
        ),
        (httpx.Response(200, content=picture()), "failed", "no_x_steps"),
        (httpx.Response(200, content=picture(), headers={"x-steps": "3"}), "served", ""),
    ],
)
def test_only_the_picture_that_was_asked_for_is_served(
    response: httpx.Response, status: str, code: str
) -> None:
    async def answer(_: httpx.Request) -> httpx.Response:
        return response

    [found] = driven([0.0], answer)
    assert (found.outcome.status, found.outcome.code) == (status, code)
    assert found.outcome.steps == (3 if status == "served" else 0)


def test_connection_that_breaks_is_a_failure_of_its_own_request() -> None:
    async def broken_once(request: httpx.Request) -> httpx.Response:
        if asyncio.get_running_loop().time() < 1:
            raise httpx.ConnectError("refused")
        return await instant(request)

    first, second = driven([0.0, 1.0], broken_once)
    assert (first.outcome.status, first.outcome.code) == ("failed", "ConnectError")
    assert second.outcome.status == "served"


def test_marks_happen_at_their_time_among_the_requests() -> None:
    seen: list[float] = []

    async def main() -> None:
        async def look() -> None:
            seen.append(asyncio.get_running_loop().time())

        async with httpx.AsyncClient(transport=httpx.MockTransport(instant)) as client:
            await drive(client, [("http://server/generate", 3.0, BODY)], [(2.0, look)])

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())
    assert seen == pytest.approx([2.0])
