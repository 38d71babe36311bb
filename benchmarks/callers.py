"""Who calls during a soak: people who ask properly, and those who leave, send rubbish or read slowly.

    callers = Callers(address, info, random, body_timeout_s=2.0)
    kind, said = await callers.call()                    # ("leaves while it is made", "left")

What a call says is one of `GOOD`; anything else names what was wrong with the answer.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from benchmarks.answers import Answers
from benchmarks.wire import Broken, Reply, Wire, get, head, post

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

GOOD = ("served", "refused", "rejected", "left")
"""A picture as asked for; 429; the status that the mistake deserves; we left before an answer was due."""

PATIENCE_S = 60.0
IDLE_S = 3.0
"""Connections are used again within this time. (uvicorn closes them after 5 s.)"""
AGAIN = 0.7
"""The share of requests that use a connection again, if one is idle."""
PROMPTS = ("red apple", "grinning face", "blue heart", "flag of japan")
SEEDS = 4
"""Prompts and seeds that come again and again: the same question must have the same picture each time."""
SMALL_BUFFER, PIECE, PAUSE_S = 4096, 1024, 0.02
"""A slow reader's: what the kernel takes for it, what it reads at once, and how long it waits between (50 KB/s)."""

Body = dict[str, Any]
Kind = Callable[[], Awaitable[str]]


@dataclass(frozen=True)
class Share:
    """A kind of caller: how many of 100, and how many pictures one of them asks for."""

    share: float
    pictures: float
    call: Kind


class Callers:
    """Calls one server. `counts`: pictures that came as asked for, and those asked for by callers who then left."""

    def __init__(
        self,
        address: tuple[str, int],
        info: Body,
        seed: int,
        body_timeout_s: float,
        max_body_bytes: int,
        exact: bool,
    ) -> None:
        self.random = random.Random(seed)
        self.answers = Answers(exact)
        self.counts = {"served": 0, "left": 0}
        self._address = address
        self._info = info
        self._body_timeout_s = body_timeout_s
        self._max_body_bytes = max_body_bytes
        self._idle: list[tuple[float, Wire]] = []
        self._numbers = count()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="check")
        self.kinds: dict[str, Share] = {
            "fixed steps": Share(34, 1, self._fixed),
            "auto steps": Share(14, 1, self._auto),
            "several pictures": Share(5, 3, self._several),
            "stream": Share(8, 1, self._stream),
            "OpenAI": Share(6, 1, self._openai),
            "OpenAI stream": Share(3, 1, self._openai_stream),
            "KServe": Share(5, 1, self._kserve),
            "leaves before asking": Share(1, 0, self._leave_before),
            "leaves in the body": Share(2, 0, self._leave_in_body),
            "leaves while it is made": Share(5, 1, self._leave_while_made),
            "leaves in mid-stream": Share(3, 1, self._leave_in_stream),
            "bad body": Share(8, 0, self._bad),
            "slow body": Share(2, 1, self._slow_body),
            "body never ends": Share(1, 0, self._endless_body),
            "slow reader": Share(3, 4, self._slow_reader),
        }

    @property
    def pictures_per_call(self) -> float:
        """On average."""
        shares = self.kinds.values()
        return sum(kind.share * kind.pictures for kind in shares) / sum(kind.share for kind in shares)

    async def call(self, kind: str | None = None) -> tuple[str, str]:
        """One call, of a kind drawn by the shares unless it is named; the kind, and what came of it."""
        if kind is None:
            [kind] = self.random.choices(list(self.kinds), [share.share for share in self.kinds.values()])
        try:
            async with asyncio.timeout(PATIENCE_S):
                return kind, await self.kinds[kind].call()
        except TimeoutError:
            return kind, f"lost: no answer within {PATIENCE_S:g} s"
        except (Broken, OSError) as error:
            return kind, f"lost: {type(error).__name__}: {error}"

    def close(self) -> None:
        """Leave the idle connections."""
        for _, wire in self._idle:
            wire.close()
        self._idle.clear()
        self._pool.shutdown()

    # Those who ask properly.

    async def one(self) -> str:
        """A plain picture of fixed steps: what capacity is measured with."""
        return await self._fixed()

    async def _fixed(self) -> str:
        body = self._wish()
        return await self._judged(body, await self._ask(post("/generate", _json(body))))

    async def _auto(self) -> str:
        body = self._wish() | {"steps": "auto", "deadline_ms": self.random.choice((250, 1000, 4000))}
        return await self._judged(body, await self._ask(post("/generate", _json(body))))

    async def _several(self) -> str:
        body = self._wish() | {"num_images": 3, "response_format": "json"}
        return await self._judged(body, await self._ask(post("/generate", _json(body))))

    async def _stream(self) -> str:
        body = self._wish() | {"stream": True}
        return await self._judged(body, await self._ask(post("/generate", _json(body))))

    async def _openai(self) -> str:
        body = self._wish()
        return await self._judged(body, await self._ask(post("/v1/images/generations", _json(_openai(body)))))

    async def _openai_stream(self) -> str:
        body = self._wish() | {"stream": True}
        asked = _openai(body) | {"stream": True, "partial_images": 1}
        return await self._judged(body, await self._ask(post("/v1/images/generations", _json(asked))))

    async def _kserve(self) -> str:
        body = self._wish()
        reply = await self._ask(post(f"/v2/models/{self._info['model']}/infer", _json(_kserve(body))))
        return await self._judged(body, reply)

    # Those who do not stay.

    async def _leave_before(self) -> str:
        async with Wire(self._address):
            await asyncio.sleep(self.random.uniform(0, 0.2))
        return "left"

    async def _leave_in_body(self) -> str:
        request = post("/generate", _json(self._wish()))
        async with Wire(self._address) as wire:
            await wire.send(request[: self.random.randrange(1, len(request))])
            await asyncio.sleep(self.random.uniform(0, 0.2))
        return "left"

    async def _leave_while_made(self) -> str:
        body = self._wish() | self.random.choice(({}, {"stream": True}, {"steps": "auto"}))
        async with Wire(self._address) as wire:
            await wire.send(post("/generate", _json(body)))
            await asyncio.sleep(self.random.expovariate(10))
        return self._left()

    async def _leave_in_stream(self) -> str:
        body = self._wish() | {"stream": True}
        async with Wire(self._address) as wire:
            await wire.send(post("/generate", _json(body)))
            await wire.receive(1)  # the head comes with the first event
        return self._left()

    # Those who cannot be served.

    async def _bad(self) -> str:
        body, long = self._wish(), self._max_body_bytes + 1
        text = _json(body)
        choices: dict[int, list[bytes]] = {
            400: [post("/generate", text[:-5]), post("/generate", text, length=len(text) - 3), b"rubbish\r\n\r\n"],
            404: [get("/nowhere"), post("/v2/models/nobody/infer", text)],
            405: [get("/generate")],
            413: [post("/generate", b" " * long + text), post("/generate", b"", length=10**9)],
            415: [post("/generate", text, {"content-type": "text/plain"})],
            422: [post("/generate", _json(body | wrong)) for wrong in ({"seed": "1"}, {"steps": 10**6}, {"x": 1})],
            431: [head("GET", "/info", {"x-long": "x" * 2**20})],
        }  # fmt: skip
        status = self.random.choice(list(choices))
        request = self.random.choice(choices[status])
        async with Wire(self._address) as wire:
            try:
                await wire.send(request)
            except OSError:
                # The server answered and closed before it had read all; what it said may be lost with the rest.
                return "rejected"
            try:
                reply = await wire.reply(
                    followed=True
                )  # what a wrong length leaves over is a request of its own
            except OSError:
                if status in (413, 431):  # as above, found out later
                    return "rejected"
                raise
        return self.answers.rejected(reply, status)

    async def _slow_body(self) -> str:
        body = self._wish()
        request = post("/generate", _json(body))
        async with Wire(self._address) as wire:
            at = sorted(self.random.sample(range(1, len(request)), 3))
            for start, end in zip([0, *at], [*at, len(request)], strict=True):
                await wire.send(request[start:end])
                await asyncio.sleep(self._body_timeout_s / 20)
            return await self._judged(body, await wire.reply())

    async def _endless_body(self) -> str:
        text = _json(self._wish())
        async with Wire(self._address) as wire:
            await wire.send(post("/generate", text, length=len(text) + 100))
            return self.answers.rejected(await wire.reply(), 408)

    async def _slow_reader(self) -> str:
        body = self._wish() | {"num_images": 4, "response_format": "json"}
        async with Wire(self._address, SMALL_BUFFER) as wire:
            await wire.send(post("/generate", _json(body)))
            return await self._judged(body, await wire.reply(PIECE, PAUSE_S))

    # What they share.

    def _left(self) -> str:
        self.counts["left"] += 1
        return "left"

    def _wish(self) -> Body:
        size = self.random.choice(self._info["sizes"])
        again = self.random.random() < 0.5
        number = next(self._numbers)
        return {
            "prompt": self.random.choice(PROMPTS) + ("" if again else f" {number}"),
            "seed": self.random.randrange(SEEDS) if again else number,
            "steps": self.random.choice(self._info["steps"]),
            "width": size["width"],
            "height": size["height"],
        }

    async def _ask(self, request: bytes) -> Reply:
        async with self._wire() as wire:
            return await wire.ask(request)

    @asynccontextmanager
    async def _wire(self) -> AsyncIterator[Wire]:
        now = time.monotonic()
        while self._idle and now - self._idle[0][0] > IDLE_S:
            self._idle.pop(0)[1].close()
        if self._idle and self.random.random() < AGAIN:
            _, wire = self._idle.pop()
        else:
            wire = await Wire(self._address).__aenter__()
        try:
            yield wire
        except BaseException:
            wire.close()
            raise
        self._idle.append((time.monotonic(), wire))

    async def _judged(self, body: Body, reply: Reply) -> str:
        said = await asyncio.get_running_loop().run_in_executor(self._pool, self.answers.judge, body, reply)
        if said == "served":
            self.counts["served"] += int(body.get("num_images", 1))
        return said


def _json(body: Body) -> bytes:
    return json.dumps(body).encode()


def _openai(body: Body) -> Body:
    return {
        "prompt": body["prompt"],
        "size": f"{body['width']}x{body['height']}",
        "seed": body["seed"],
        "num_inference_steps": body["steps"],
        "response_format": "b64_json",
    }


def _kserve(body: Body) -> Body:
    inputs = [("prompt", "BYTES", "prompt"), ("seed", "INT64", "seed"), ("steps", "INT32", "steps")]
    inputs += [("width", "INT32", "width"), ("height", "INT32", "height")]
    return {
        "inputs": [
            {"name": name, "datatype": datatype, "shape": [1], "data": [body[key]]}
            for name, datatype, key in inputs
        ],
        "outputs": [{"name": "encoded", "parameters": {"binary_data": True}}],
    }
