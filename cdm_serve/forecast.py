"""When the accepted pictures should be finished, and the steps under which most deadlines hold. Pure arithmetic.

    forecast = Forecast(costs, max_batch=8)
    forecast.look(waiting=5, steps=20, now=3.0)            # from here on with the costs of this moment
    forecast.least(task)                                   # seconds, if it is in every call from now on
    forecast.cap(forecast.rows(order), 3.0, 0.01, 4, 8)    # steps; 0.01: seconds until the running call ends

A picture is finished after what is before it in order, served in full batches and as much later than those as queues
have lately been, and never before it would be if it were in every call. Both are stretched by what deadlines have
taught.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import inf

from cdm_serve.costs import TEXT, Bucket, CostModel
from cdm_serve.tasks import Task

BROKEN = 0.005
"""Lessons per deadline that predictions may lead to, each of a few that break: fewer would refuse what could have been
served."""
LEARN = 0.1
PACE = 0.02
"""Weight of the newest call in what the queue takes beyond full calls."""
MOST = 2.0
"""The most by which predictions grow in all: a pause of the whole machine makes everybody late, which says nothing
about the next hour."""
HALF_S = 60.0
"""Seconds in which a lesson loses half its weight: who is refused teaches nothing, so time must."""

Row = tuple[int, int, int, float, float, float, float, float]
"""A picture: (least steps left, most, done; its step, and all else, in a full batch; its step, decoding, if it is in
every call; its deadline if that can be met, else infinity), in seconds."""


class Forecast:
    """Predictions by a cost model. `stretch` is what they are multiplied by, at least 1."""

    def __init__(self, costs: CostModel, max_batch: int) -> None:
        self.stretch = 1.0
        self._at = 0.0
        self._broke = -inf
        self._slack = self._wide = 1.0
        self._costs = costs
        self._max_batch = max_batch
        self._batch = 1
        self._turnover = 0.0
        self._encode = (0.0, 0.0)
        self._shapes: dict[Bucket, tuple[float, float, float, float, float]] = {}

    def look(self, waiting: int, steps: int, now: float) -> None:
        """Take the costs of this moment, with `waiting` pictures of so many steps in all."""
        kept = 0.5 ** (max(0.0, now - self._at) / HALF_S)
        self.stretch = 1 + (self.stretch - 1) * kept
        self._slack = 1 + (self._slack - 1) * kept
        self._at = now
        self._wide = min(self._slack, MOST / self.stretch)
        self._batch = max(1, min(waiting, self._max_batch))
        self._turnover = (self._batch - 1) * waiting / max(1, steps)
        self._encode = (
            self._costs.seconds("encode", TEXT, 1),
            self._costs.each("encode", TEXT, self._max_batch),
        )
        self._shapes = {}

    def spent(self, seconds: float, full: float) -> None:
        """Take in that a call, with its wait before it, took `seconds` when there was enough to fill it, for what full
        calls of the cost model do in `full`.

        It is more where calls are not full, begin late, or are slower than usual. Never less than 1 each, so that what
        varies leaves a margin.
        """
        if full:
            self._slack += PACE * (min(MOST, max(1.0, seconds / full)) - self._slack)

    def learn(self, late: bool, arrival: float, now: float) -> None:
        """Let predictions grow when deadlines break, and shrink when they hold, until `BROKEN` of them break.

        Who came before the last break was let in by what was known then: the ten that one pause makes late are one
        lesson.
        """
        if late and arrival < self._broke:
            return
        if late:
            self._broke = now
        self.stretch = min(MOST, max(1.0, self.stretch + LEARN * (late - BROKEN)))

    def least(self, task: Task) -> float:
        """Seconds until the picture is finished if it is in every call from now on, in as few steps as it allows."""
        step, _, decode, _, _ = self._shapes.get(task.bucket) or self._shape(task.bucket)
        return (0.0 if task.encoded else self._encode[0]) + task.fewest * step + decode

    def rows(self, order: Iterable[Task]) -> list[Row]:
        """The pictures, in order."""
        made = []
        for task in order:
            _, pace, decode, each, rest = self._shapes.get(task.bucket) or self._shape(task.bucket)
            done = task.done
            least = most = task.planned - done
            if task.running:  # its call is counted in `busy`
                if not task.encoded:
                    pass
                elif most:
                    least, most, done = least - 1, most - 1, done + 1
                else:
                    decode = rest = 0.0
            elif task.min_steps is not None and most:  # `Task.fewest`, in the loop that edges wait for
                least, most = task.min_steps - done, task.steps - done
                if least < 1:
                    least = 1
            if not (task.encoded or task.running):
                rest += self._wide * self._encode[1]
            made.append((least, most, done, each, rest, pace, decode, task.deadline if task.live else inf))
        return made

    def finishes(self, rows: list[Row], busy: float, cap: int) -> Iterator[float]:
        """Seconds until each is finished if nobody takes more than `cap` steps, unless it must."""
        ahead = busy
        for least, most, done, each, rest, step, decode, _ in rows:
            steps = min(max(cap - done, least), most)
            ahead += steps * each + rest
            yield self.stretch * max(ahead, busy + steps * step + decode)

    def cap(self, rows: list[Row], now: float, busy: float, first: int, top: int) -> int:
        """The most steps, up to `top`, under which the most deadlines hold; tried from `first` on.

        Fewer steps finish everybody sooner, so that no cap breaks more deadlines than a higher one.
        """
        while rows and rows[-1][-1] == inf:  # who comes after the last deadline breaks none
            rows.pop()
        cap, allowed = min(first, top), 0
        if self._broken(rows, now, busy, cap, 0):
            allowed = self._broken(rows, now, busy, 1, len(rows))
        while cap < top and self._broken(rows, now, busy, cap + 1, allowed) <= allowed:
            cap += 1
        while cap > 1 and self._broken(rows, now, busy, cap, allowed) > allowed:
            cap -= 1
        return cap

    def _broken(self, rows: list[Row], now: float, busy: float, cap: int, enough: int) -> int:
        """How many deadlines break under `cap`; more than `enough` are not told apart."""
        broken, ahead, stretch = 0, busy, self.stretch
        for least, most, done, each, rest, step, decode, deadline in rows:
            steps = cap - done
            if steps > most:
                steps = most
            if steps < least:
                steps = least
            ahead += steps * each + rest
            own = busy + steps * step + decode
            if now + stretch * (ahead if ahead > own else own) > deadline:
                broken += 1
                if broken > enough:
                    break
        return broken

    def _shape(self, bucket: Bucket) -> tuple[float, float, float, float, float]:
        """Seconds of a step, of that and the calls between two steps, of decoding alone; a step's and decoding's share
        in a full batch."""
        step = self._costs.seconds("denoise", bucket, self._batch)
        each = self._costs.each("denoise", bucket, self._max_batch)
        decode = self._costs.each("decode", bucket, self._max_batch)
        pace = step + self._turnover * (self._encode[1] + decode)
        alone = self._costs.seconds("decode", bucket, 1)
        found = self._shapes[bucket] = (step, pace, alone, self._wide * each, self._wide * decode)
        return found
