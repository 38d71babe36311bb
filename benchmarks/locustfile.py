"""cdm-serve under Locust, open loop or closed loop; docs/load.md explains both.

    locust -f benchmarks/locustfile.py --headless --host http://127.0.0.1:8000 --mode open --rate 20 --duration 60
    locust -f benchmarks/locustfile.py --headless --host … --mode closed --most-users 50 --csv load --html load.html

Step counts and sizes come from the server's `/info`. `CDM_API_KEY` holds the key of a server that wants one,
or several, with commas between, that are used in turn.
"""

from __future__ import annotations

import json
import random
import time
from argparse import ArgumentParser
from dataclasses import dataclass, field
from itertools import count
from math import ceil
from typing import Any, cast

import gevent  # type: ignore[import-untyped]
import numpy as np
from gevent.lock import Semaphore  # type: ignore[import-untyped]
from gevent.pool import Group  # type: ignore[import-untyped]
from locust import FastHttpUser, LoadTestShape, events, task
from locust.env import Environment
from locust.exception import StopUser

from benchmarks.arrivals import TIMES, Arrival, draw
from benchmarks.load import key_headers
from benchmarks.pictures import problem_with

CONNECTIONS = 10_000
"""Of one generator: no request waits for another's connection."""
STAGES = 5
"""Equal parts of a closed loop's duration, each with more users."""
REPLAYED = "cdm_replayed"
"""The message by which a generator says that all its requests are answered."""
GAVE_UP = "cdm_gave_up"
"""The message by which a user says that there is no such server: failures are all that could follow."""
GRACE_S = 10.0


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _arguments(parser: ArgumentParser) -> None:
    def add(flag: str, default: Any, help: str, **more: Any) -> None:
        variable = f"CDM_LOAD_{flag.upper().replace('-', '_')}"
        parser.add_argument(  # a configargparse parser, whose arguments have variables
            f"--{flag}", default=default, type=type(default), help=help, env_var=variable, **more
        )

    add(
        "mode",
        "open",
        "open: arrivals drawn beforehand; closed: users who wait for their picture",
        choices=("open", "closed"),
    )
    add("rate", 10.0, "open: pictures per second, of all generators together")
    add("trace", "poisson", "open: how arrivals bunch", choices=tuple(TIMES))
    add("generators", 1, "open: users that send the arrivals; with --processes or workers, one for each")
    add("most-users", 20, f"closed: users in the last of {STAGES} stages")
    add("think-s", 1.0, "closed: mean seconds between a picture and the next request")
    add("duration", 60.0, "seconds of arrivals, or of the ramp")
    add("picture-steps", "", "step counts, as 1,4; empty: all that the server offers")
    add("picture-sizes", "", "sizes, as 512x512; empty: all that the server offers")
    add("auto", 0.0, 'share of requests with steps="auto", which allow fewer steps')
    add("deadline-ms", 0, "deadline of every request; 0: none")
    add("load-seed", 0, "seed of everything drawn")
    add("answer-timeout", 60.0, "seconds after which a request has failed")


@dataclass
class _Heard:
    """What users have sent to whoever shapes the load, across processes."""

    replayed: set[str] = field(default_factory=set)
    gave_up: bool = False


_heard = _Heard()


@events.init.add_listener  # type: ignore[untyped-decorator]
def _listen(environment: Environment, **_: Any) -> None:
    assert environment.runner is not None
    environment.runner.register_message(REPLAYED, lambda msg, **_: _heard.replayed.add(msg.data))
    environment.runner.register_message(GAVE_UP, lambda **_: setattr(_heard, "gave_up", True))
    if environment.parsed_options is not None:
        # A closed loop's last requests are waited for: to cut them off would lose the slowest.
        environment.stop_timeout = environment.parsed_options.answer_timeout


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def _begin(**_: Any) -> None:
    _heard.replayed, _heard.gave_up = set(), False
    Painter.numbers, Painter.offer = count(), None


class Load(LoadTestShape):
    """Open: the generators, until all have been answered. Closed: `STAGES` stages up to `--most-users`."""

    def tick(self) -> tuple[int, float, list[Any]] | None:
        """How many users of which kind there shall be now; None ends the run."""
        assert self.runner is not None
        options: Any = self.runner.environment.parsed_options
        now: float = self.get_run_time()  # type: ignore[no-untyped-call]
        if options.mode == "open":
            patience = options.duration + options.answer_timeout + GRACE_S
            over = len(_heard.replayed) >= options.generators or now > patience or _heard.gave_up
            return None if over else (options.generators, float(options.generators), [OpenLoop])
        if now >= options.duration or _heard.gave_up:
            return None
        users = ceil(options.most_users * (1 + int(now / options.duration * STAGES)) / STAGES)
        return users, float(users), [ClosedLoop]


class Painter(FastHttpUser):
    """Somebody who asks for pictures and looks at what comes back."""

    abstract = True
    concurrency = CONNECTIONS
    default_headers = key_headers()

    offer: dict[str, Any] | None = None
    _asking = Semaphore()
    numbers = count()

    def __init__(self, environment: Environment) -> None:
        self.options = cast("Any", environment.parsed_options)
        self.network_timeout = self.connection_timeout = self.options.answer_timeout
        super().__init__(environment)
        worker = cast("Any", environment.runner).worker_index
        self.seed = (self.options.load_seed, worker, next(Painter.numbers))  # nobody else's
        self.id = "-".join(map(str, self.seed))
        self.random = random.Random(self.id)

    def on_start(self) -> None:
        """Learn what the server offers; the first user asks for all."""
        with Painter._asking:
            if Painter.offer is None:
                Painter.offer = self._learn()
        self.steps = [int(part) for part in self.options.picture_steps.split(",") if part] or Painter.offer[
            "steps"
        ]
        sizes = [part.split("x") for part in self.options.picture_sizes.split(",") if part]
        offered = [(size["width"], size["height"]) for size in Painter.offer["sizes"]]
        self.sizes = [(int(width), int(height)) for width, height in sizes] or offered

    def _learn(self) -> dict[str, Any]:
        with self.client.get("/info", name="/info", catch_response=True) as response:
            if response.status_code == 200:
                offer: dict[str, Any] = json.loads(response.content)
                return offer
            response.failure(_told(response))
        cast("Any", self.environment.runner).send_message(GAVE_UP)
        raise StopUser(
            f"{self.host}/info answers {response.status_code}; is this a cdm-serve, and is CDM_API_KEY its key?"
        )

    def ask(self, arrival: Arrival, index: int, due: float | None = None) -> None:
        """Ask for a picture and judge it. `due` (by `perf_counter`): when it was to be sent, whence latency counts."""
        auto = self.random.random() < self.options.auto
        size = f"{arrival.width}x{arrival.height}"
        name = f"/generate {size}, {'auto' if auto else arrival.steps} steps"
        body = {
            "prompt": f"red apple {self.id} {index}",
            "seed": index,
            "steps": "auto" if auto else arrival.steps,
            "width": arrival.width,
            "height": arrival.height,
        }
        if self.options.deadline_ms:
            body["deadline_ms"] = self.options.deadline_ms
        if due is not None:
            self._report_lag(time.perf_counter() - due)
        headers = key_headers(index)  # several keys are used in turn
        with self.client.post(
            "/generate", json=body, name=name, headers=headers, catch_response=True
        ) as response:
            if due is not None:
                response.request_meta["response_time"] = (time.perf_counter() - due) * 1e3
            if response.status_code == 429:
                # An entry of its own: quick refusals would flatter the latency of what was served.
                response.request_meta["name"] = f"{name}: refused (429)"
                response.success()
            elif response.status_code != 200:
                response.failure(_told(response))
            # On a thread: decoding must not hold the other greenlets up.
            elif problem := gevent.get_hub().threadpool.apply(
                problem_with, (response.content, arrival.width, arrival.height, "png")
            ):
                response.failure(problem)
            else:
                if auto:
                    response.request_meta["name"] = f"{name}: ran {response.headers['x-steps']}"
                response.success()

    def _report_lag(self, seconds: float) -> None:
        self.environment.events.request.fire(
            request_type="LAG", name="sent after its time by", response_time=seconds * 1e3, response_length=0,
            exception=None, context={},
        )  # fmt: skip


class OpenLoop(Painter):
    """A generator: a greenlet per arrival, whether or not those before have been answered."""

    @task
    def replay(self) -> None:
        """Send this generator's share. Poisson processes add up to one of the summed rate; the others nearly so."""
        options = self.options
        times = TIMES[options.trace](
            options.rate / options.generators, options.duration, np.random.default_rng([*self.seed, 1])
        )
        trace = draw(times, self.steps, self.sizes, np.random.default_rng([*self.seed, 2]))
        start, asked = time.perf_counter(), Group()
        for index, arrival in enumerate(trace):
            due = start + arrival.at
            gevent.sleep(max(0.0, due - time.perf_counter()))
            asked.spawn(self.ask, arrival, index, due)
        asked.join()
        self.environment.runner.send_message(REPLAYED, self.id)
        raise StopUser


class ClosedLoop(Painter):
    """A person: thinks, asks, waits for the picture. Asks less often the slower the server is."""

    def wait_time(self) -> float:
        """Exponential: independent people."""
        return self.random.expovariate(1 / self.options.think_s) if self.options.think_s else 0.0

    @task
    def picture(self) -> None:
        """One picture."""
        size = self.random.choice(self.sizes)
        self.ask(Arrival(0.0, self.random.choice(self.steps), *size), self.random.randrange(2**32))


def _told(response: Any) -> str:
    return f"{response.status_code}: {(response.text or '')[:300]}"
