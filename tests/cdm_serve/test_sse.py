"""Server-sent events: how they are written, and what a stream does when it fails, waits, or is left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm_serve.errors import GenerationFailed, QueueFull, ServeError
from cdm_serve.sse import KEEP_ALIVE, EventStream, event
from tests.cdm_serve.helpers import PATIENCE_S, read_events

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=8,
)


async def drive(
    drawing: AsyncGenerator[bytes, None],
    leave: asyncio.Event | None = None,
    stall: asyncio.Event | None = None,
    keep_alive_s: float = PATIENCE_S,
    heard: Callable[[bytes], None] = lambda _: None,
) -> tuple[list[bytes], dict[str, Any]]:
    """Send a stream to a client that leaves, or begins to read, when told to; what it got, and the request's state."""
    got: list[bytes] = []
    scope: dict[str, Any] = {"type": "http"}

    async def receive() -> dict[str, Any]:
        await (leave or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if stall is not None:
            await stall.wait()
        if message["type"] == "http.response.body":
            got.append(message["body"])
            heard(message["body"])

    await asyncio.wait_for(EventStream(drawing, keep_alive_s=keep_alive_s)(scope, receive, send), PATIENCE_S)
    return got, scope.get("state", {})


@settings(max_examples=50)
@given(data=st.dictionaries(st.text(), JSON_VALUES))
def test_any_data_is_read_back_as_one_event(data: dict[str, Any]) -> None:
    assert read_events(event("preview", data) + event("picture", {})) == [("preview", data), ("picture", {})]


def test_silence_is_filled_with_comments_that_no_client_sees() -> None:
    async def run() -> list[bytes]:
        commented = asyncio.Event()

        def heard(body: bytes) -> None:
            if body == KEEP_ALIVE:
                commented.set()

        async def drawing() -> AsyncGenerator[bytes, None]:
            yield event("preview", {})
            await commented.wait()
            yield event("picture", {})

        return (await drive(drawing(), keep_alive_s=0.01, heard=heard))[0]

    got = asyncio.run(run())
    assert KEEP_ALIVE in got
    assert read_events(b"".join(got)) == [("preview", {}), ("picture", {})]


def test_failure_before_the_first_event_is_raised_and_after_it_is_an_event() -> None:
    async def drawing(events: int, error: Exception) -> AsyncGenerator[bytes, None]:
        for _ in range(events):
            yield event("preview", {})
        raise error

    full = QueueFull("full", retry_after_s=1)
    with pytest.raises(QueueFull):
        asyncio.run(drive(drawing(0, full)))
    got, state = asyncio.run(drive(drawing(2, GenerationFailed("the engine failed"))))
    *previews, (name, answer) = read_events(b"".join(got))
    assert previews == [("preview", {})] * 2
    assert (name, answer["error"]["code"], answer["error"]["message"]) == (
        "error",
        "generation_failed",
        "the engine failed",
    )
    assert state["ended"] == 500


def test_unforeseen_failure_in_mid_stream_keeps_its_details_to_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def drawing() -> AsyncGenerator[bytes, None]:
        yield event("preview", {})
        raise RuntimeError("a secret detail")

    got, state = asyncio.run(drive(drawing()))
    name, answer = read_events(b"".join(got))[-1]
    assert (name, answer["error"]["type"]) == ("error", "server_error")
    assert "secret" not in answer["error"]["message"]
    assert "a secret detail" in caplog.text
    assert state["ended"] == 500


@pytest.mark.parametrize("events", [0, 1])
def test_leaving_cancels_the_work(events: int) -> None:
    ends: list[str] = []

    async def run() -> tuple[list[bytes], dict[str, Any]]:
        leave = asyncio.Event()

        async def drawing() -> AsyncGenerator[bytes, None]:
            try:
                for _ in range(events):
                    yield event("preview", {})
                leave.set()
                await asyncio.Event().wait()
            finally:
                ends.append("cancelled")

        return await drive(drawing(), leave=leave)

    if events:
        assert asyncio.run(run())[1]["ended"] == 499
    else:
        with pytest.raises(ServeError, match="left"):
            asyncio.run(run())
    assert ends == ["cancelled"]


def test_slow_reader_does_not_hold_the_work_back() -> None:
    async def run() -> list[bytes]:
        stall = asyncio.Event()

        async def drawing() -> AsyncGenerator[bytes, None]:
            for number in range(3):
                yield event("preview", {"number": number})
            stall.set()  # only now the client begins to read

        return (await drive(drawing(), stall=stall))[0]

    assert [data["number"] for _, data in read_events(b"".join(asyncio.run(run())))] == [0, 1, 2]
