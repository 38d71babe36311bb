"""The sweep of `cdm-bench serve`, on the event loop: every round, every rate, every variant its block."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from math import inf
from typing import Any

import httpx

from benchmarks.arrivals import Arrival
from benchmarks.blocks import Block
from benchmarks.load import VARIANTS, LoadSettings, Mix, check_sizes, for_variant, make_trace, mix_of, span
from benchmarks.openloop import Body, drive, judge
from benchmarks.scrape import BatchSizes
from benchmarks.server import ServerError
from engines.cli import UsageError

FIRST, UNLOADED = 5, 20
"""Requests one after the other: those that warm the connection up, and those whose latency counts as unloaded."""

Info = dict[str, Any]
"""What `/info` answers."""


class Sweep:
    """Drives servers. `urls`: policy → address; all serve what `info` says."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        urls: Mapping[str, str],
        info: Info,
        settings: LoadSettings,
        format: str,
    ) -> None:
        self._client = client
        self._urls = {policy: url.rstrip("/") for policy, url in urls.items()}
        self._info = info
        self._settings = settings
        self._format = format
        self._serial = count(1)
        default = _size(info["default_size"])
        self._sizes = [default, *(size for size in map(_size, info["sizes"]) if size != default)]
        self.mix: Mix = mix_of(settings, info["default_steps"], self._sizes)

    async def unloaded(self, policy: str) -> list[float]:
        """Seconds of pictures that were asked for one after the other.

        Raises:
            UsageError: the server does not offer what the settings ask for.
            ServerError: it does not serve a picture even so.
        """
        wanted = [Arrival(0.0, steps, *size) for steps in self.mix.steps for size in self.mix.sizes]
        self._check(wanted)
        loop, times, url = asyncio.get_running_loop(), [], self._urls[policy]
        for number in range(FIRST + UNLOADED):
            body = self._body(wanted[number % len(wanted)], number)
            began = loop.time()
            try:
                response = await self._client.post(f"{url}/generate", json=body)
            except httpx.HTTPError as error:
                raise ServerError(f"{url} does not answer: {error}") from error
            times.append(loop.time() - began)
            status, _, code = judge(response, body)
            if status != "served":
                raise ServerError(
                    f"{url} did not serve a picture asked for alone ({code}): {response.text[:300]}"
                )
        return times[FIRST:]

    def plan(self, rates: Sequence[float], rounds: int) -> Iterator[tuple[int, float, str, list[Arrival]]]:
        """(round, rate, variant, trace): the trace is new every round and the same for all variants, whose order
        rotates."""
        names = self._settings.variants
        for number in range(rounds):
            for index, rate in enumerate(rates):
                trace = make_trace(self._settings, self.mix, rate, number * len(rates) + index)
                self._check(trace)
                for turn in range(len(names)):
                    yield number, rate, names[(turn + number + index) % len(names)], trace

    async def block(self, number: int, rate: float, name: str, trace: Sequence[Arrival]) -> Block:
        """One variant at one rate in one round."""
        variant = VARIANTS[name]
        url = self._urls[variant.policy]
        warmup, duration = span(self._settings, trace)
        wanted = for_variant(trace, variant, self._settings)
        if wrong := [a.steps for a in wanted if a.min_steps and a.steps != self._info["default_steps"]]:
            raise UsageError(
                f'steps={wrong[0]} cannot be asked for as "auto", which begins at the default of '
                f"{self._info['default_steps']}; leave step+auto out of --variants, or --steps away"
            )
        bodies = [self._body(arrival, index) for index, arrival in enumerate(wanted)]
        before: list[BatchSizes] = []

        async def read() -> None:
            before.append(BatchSizes.read(await self._metrics(url)))

        requests = [
            (f"{url}/generate", arrival.at, body) for arrival, body in zip(wanted, bodies, strict=True)
        ]
        answers = await drive(self._client, requests, [(warmup, read)])
        batches = BatchSizes.read(await self._metrics(url)).since(before[0])
        return Block(name, number, rate, warmup, duration, bodies, answers, batches)

    def _check(self, trace: Sequence[Arrival]) -> None:
        """Raises `UsageError` for what the server does not offer: else it would be refused a thousand times."""
        check_sizes([(arrival.width, arrival.height) for arrival in trace], self._sizes)
        if wrong := [arrival.steps for arrival in trace if arrival.steps not in self._info["steps"]]:
            offered = ", ".join(map(str, self._info["steps"]))
            raise UsageError(f"steps={wrong[0]} is not offered by {self._info['model']}; allowed: {offered}")

    def _body(self, arrival: Arrival, number: int) -> Body:
        """What is posted. Every prompt is new, so that no cached embedding flatters, and that by its beginning, for its
        end may be more than the model reads; a picture that may be shortened asks for "auto"."""
        body: Body = {
            "prompt": f"{next(self._serial)} red apple",
            "seed": number,
            "steps": arrival.steps,
            "width": arrival.width,
            "height": arrival.height,
            "format": self._format,
            "priority": arrival.priority,
        }
        if arrival.min_steps is not None:
            body |= {"steps": "auto", "min_steps": arrival.min_steps}
        if arrival.deadline < inf:
            body["deadline_ms"] = max(1, round(arrival.deadline * 1e3))
        return body

    async def _metrics(self, url: str) -> str:
        return await fetch(self._client, f"{url}/metrics")


async def fetch(client: httpx.AsyncClient, url: str) -> str:
    """The text at `url`. Raises `ServerError` where it is not answered with one."""
    try:
        return (await client.get(url)).raise_for_status().text
    except httpx.HTTPError as error:
        raise ServerError(f"{url} is not answered: {error}") from error


async def fetch_info(client: httpx.AsyncClient, url: str) -> Info:
    """What is served at `url`."""
    text = await fetch(client, f"{url.rstrip('/')}/info")
    try:
        info: Info = json.loads(text)
    except ValueError as error:
        raise ServerError(f"{url} answers /info with {text[:100]!r}; is this a cdm-serve?") from error
    return info


def progress(block: Block, rounds: int) -> None:
    """One line about a block for whoever waits."""
    counts = {
        status: sum(item.status == status for item in block.measured)
        for status in ("served", "refused", "failed")
    }
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(
        f"round {block.number + 1}/{rounds}, {block.rate:.1f}/s, {block.variant}: {told}",
        file=sys.stderr,
        flush=True,
    )


def _size(size: Mapping[str, int]) -> tuple[int, int]:
    return size["width"], size["height"]
