"""How much one API key may use: pictures a minute, pictures in work at once, its highest priority.

CALLER.set(Account(key))                             # the guard, at the head of every request
with charged(pictures=4, priority=0, wait_for=...):  # the service, whichever API the request came by
    ...

Refusals are the caller's own: what the whole server can take is `admission.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from cdm_serve.errors import (
    DeadlineInfeasible,
    Forbidden,
    InvalidRequest,
    KeyBusy,
    RateLimited,
    Unavailable,
)
from cdm_serve.keys import Key


class TokenBucket:
    """At most `capacity` tokens, full at first, refilled at `per_s`. `now` is any clock that never goes back, in s.

    In any t seconds at most capacity + t·per_s tokens are taken.
    """

    def __init__(self, capacity: float, per_s: float, now: float) -> None:
        self.capacity = capacity
        self.per_s = per_s
        self._tokens = capacity
        self._at = now

    def take(self, tokens: float, now: float) -> float:
        """Take `tokens`, at most `capacity` of them, and return 0; or take none and return the seconds to wait."""
        assert tokens <= self.capacity, (tokens, self.capacity)
        self._tokens = min(self.capacity, self._tokens + (now - self._at) * self.per_s)
        self._at = now
        # Waiting exactly as long as was said must be enough, whatever the rounding of the sum above.
        if tokens > self._tokens + 1e-9 * self.capacity:
            return (tokens - self._tokens) / self.per_s
        self._tokens -= tokens
        return 0.0

    def give_back(self, tokens: float) -> None:
        """Undo a `take` that led to nothing."""
        self._tokens = min(self.capacity, self._tokens + tokens)


class Account:
    """What one key has in use. All calls come from the event loop.

    `count` is told the number of pictures whenever some are accepted.
    """

    def __init__(
        self,
        key: Key,
        count: Callable[[int], object] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.key = key
        self.in_work = 0
        self._count = count
        self._clock = clock
        self._bucket = self._new_bucket()

    def follow(self, key: Key) -> None:
        """Take over limits that were changed in the file. What is in use stays so; a new rate begins afresh."""
        before, self.key = self.key, key
        if before.rate_per_minute != key.rate_per_minute:
            self._bucket = self._new_bucket()

    def _new_bucket(self) -> TokenBucket | None:
        rate = self.key.rate_per_minute
        return None if rate is None else TokenBucket(rate, rate / 60, self._clock())

    @contextmanager
    def use(self, pictures: int, priority: int, wait_for: Callable[[int], float]) -> Iterator[None]:
        """Count `pictures` as in work for as long as the body takes.

        `wait_for`: seconds until that many of all pictures in work should be finished.

        Raises:
            Forbidden: `priority` is above the key's.
            InvalidRequest: there are more `pictures` than the key may ever have at once.
            KeyBusy: too many of its pictures are in work now.
            RateLimited: it has used up its rate for now.
        """
        key, bucket = self.key, self._bucket
        if key.max_priority is not None and priority > key.max_priority:
            raise Forbidden(
                f"priority={priority} exceeds max_priority={key.max_priority} of the key {key.name!r}; ask for less",
                param="priority",
            )
        for name, most in (("max_concurrent", key.max_concurrent), ("rate_per_minute", key.rate_per_minute)):
            if most is not None and pictures > most:
                raise InvalidRequest(
                    f"{pictures} pictures at once exceed {name}={most} of the key {key.name!r}; ask for fewer"
                )
        if key.max_concurrent is not None and (excess := self.in_work + pictures - key.max_concurrent) > 0:
            raise KeyBusy(
                f"{self.in_work} pictures of the key {key.name!r} are in work and {pictures} more exceed its "
                f"max_concurrent={key.max_concurrent}; try again when they are finished, or ask for fewer",
                retry_after_s=wait_for(excess),
            )
        if bucket is not None and (wait := bucket.take(pictures, self._clock())):
            raise RateLimited(
                f"the key {key.name!r} has used up its rate_per_minute={key.rate_per_minute} pictures; "
                f"{pictures} more can be had in {wait:.1f} s",
                retry_after_s=wait,
            )
        self.in_work += pictures
        self._count(pictures)
        try:
            yield
        except (DeadlineInfeasible, Unavailable):  # not accepted after all
            if bucket is not None:
                bucket.give_back(pictures)
            raise
        finally:
            self.in_work -= pictures


CALLER: ContextVar[Account | None] = ContextVar("caller", default=None)
"""Whose request is being answered; none where no key is asked for. Tasks that a request starts inherit it."""


@contextmanager
def charged(pictures: int, priority: int, wait_for: Callable[[int], float]) -> Iterator[None]:
    """`Account.use` for whoever's request this is."""
    account = CALLER.get()
    if account is None:
        yield
    else:
        with account.use(pictures, priority, wait_for):
            yield
