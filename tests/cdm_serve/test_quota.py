"""Token buckets and accounts on a made-up clock."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm_serve.errors import DeadlineInfeasible, Forbidden, InvalidRequest, KeyBusy, RateLimited
from cdm_serve.keys import Key
from cdm_serve.quota import CALLER, Account, TokenBucket, charged

CAPACITIES = st.integers(1, 1000)
RATES = st.floats(0.01, 1000)
PAUSES = st.floats(0, 1000)


def key(**limits: int | None) -> Key:
    return Key(name="alice", sha256="0" * 64, **limits)  # type: ignore[arg-type]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(CAPACITIES, RATES, st.floats(0, 1e6), st.lists(st.tuples(PAUSES, st.integers(1, 1000)), max_size=40))
def test_no_window_holds_more_than_a_burst_and_what_flowed_in(
    capacity: int, rate: float, now: float, asked: list[tuple[float, int]]
) -> None:
    bucket = TokenBucket(capacity, rate, now)
    taken: list[tuple[float, int]] = []
    for pause, tokens in asked:
        now += pause
        if tokens <= capacity and bucket.take(tokens, now) == 0:
            taken.append((now, tokens))
    for i, (begin, _) in enumerate(taken):
        total = 0
        for end, tokens in taken[i:]:
            total += tokens
            assert total <= (capacity + (end - begin) * rate) * (1 + 1e-6)


@given(CAPACITIES, RATES, st.lists(st.tuples(PAUSES, st.integers(1, 1000)), min_size=1, max_size=20))
def test_told_wait_is_enough_and_half_of_it_is_not(
    capacity: int, rate: float, asked: list[tuple[float, int]]
) -> None:
    bucket, now = TokenBucket(capacity, rate, 0.0), 0.0
    for pause, tokens in asked:
        now += pause
        tokens = min(tokens, capacity)
        wait = bucket.take(tokens, now)
        assert wait >= 0
        if wait:
            if wait * rate > 1e-3:  # else within rounding
                assert bucket.take(tokens, now + wait / 2) > 0
            now += wait
            assert bucket.take(tokens, now) == 0


@given(CAPACITIES, RATES, st.lists(st.integers(1, 1000), min_size=1, max_size=40))
def test_who_always_waits_as_told_has_exactly_the_rate(capacity: int, rate: float, asked: list[int]) -> None:
    bucket, now = TokenBucket(capacity, rate, 0.0), 0.0
    taken = [min(tokens, capacity) for tokens in asked]
    for tokens in taken:
        while wait := bucket.take(tokens, now):
            now += wait
    assert now == pytest.approx(max(0.0, sum(taken) - capacity) / rate, rel=1e-6, abs=1e-9)


@given(CAPACITIES, RATES)
def test_full_bucket_gives_a_burst_and_then_makes_wait_for_one(capacity: int, rate: float) -> None:
    bucket = TokenBucket(capacity, rate, 5.0)
    assert [bucket.take(1, 5.0) for _ in range(capacity)] == [0.0] * capacity
    assert bucket.take(1, 5.0) == pytest.approx(1 / rate)
    assert bucket.take(capacity, 5.0) == pytest.approx(capacity / rate)


@given(CAPACITIES, RATES, st.integers(1, 1000))
def test_what_is_given_back_can_be_taken_again_but_no_more(capacity: int, rate: float, tokens: int) -> None:
    tokens = min(tokens, capacity)
    bucket = TokenBucket(capacity, rate, 0.0)
    for _ in range(3):
        assert bucket.take(tokens, 0.0) == 0
        bucket.give_back(tokens)
    bucket.give_back(capacity)
    assert bucket.take(capacity, 0.0) == 0
    assert bucket.take(1, 0.0) > 0


def test_account_without_limits_refuses_nothing() -> None:
    account = Account(key())
    with account.use(1000, 9, lambda _: 1), account.use(1000, 9, lambda _: 1):
        assert account.in_work == 2000
    assert account.in_work == 0


@given(st.integers(1, 8), st.lists(st.integers(1, 10), max_size=20))
def test_pictures_in_work_never_exceed_the_keys_limit(most: int, asked: list[int]) -> None:
    account, waits = Account(key(max_concurrent=most)), []
    with ExitStack() as stack:
        for pictures in asked:
            before, use = account.in_work, account.use(pictures, 0, lambda n: waits.append(n) or 7.5)
            if pictures > most:  # never, however long it waits
                with pytest.raises(InvalidRequest, match=f"max_concurrent={most} of the key 'alice'"):
                    stack.enter_context(use)
            elif before + pictures > most:
                with pytest.raises(KeyBusy) as raised:
                    stack.enter_context(use)
                assert raised.value.headers["retry-after"] == "8"
                assert waits.pop() == before + pictures - most  # so many must be finished first
            else:
                stack.enter_context(use)
                assert account.in_work == before + pictures
            assert account.in_work <= most
    assert account.in_work == 0


def test_used_up_rate_tells_when_to_come_back_and_comes_back_then() -> None:
    clock, counted = Clock(), []
    account = Account(key(rate_per_minute=30), counted.append, clock)
    with account.use(30, 0, lambda _: 1):
        pass
    with pytest.raises(RateLimited) as raised, account.use(3, 0, lambda _: 1):
        pass
    assert raised.value.headers == {"retry-after": "6", "retry-after-ms": "6000"}
    assert "rate_per_minute=30" in raised.value.message
    clock.now = 6.0
    with account.use(3, 0, lambda _: 1):
        pass
    assert counted == [30, 3]
    with pytest.raises(InvalidRequest, match="31 pictures at once exceed rate_per_minute=30"):
        account.use(31, 0, lambda _: 1).__enter__()


def test_refused_request_uses_up_nothing() -> None:
    account = Account(key(rate_per_minute=5, max_concurrent=5, max_priority=2), clock=Clock())
    for refuse in (
        lambda: account.use(5, 3, lambda _: 1),
        lambda: account.use(6, 0, lambda _: 1),
    ):
        with pytest.raises((Forbidden, InvalidRequest)), refuse():
            pass
    for _ in range(3):
        with pytest.raises(DeadlineInfeasible), account.use(5, 0, lambda _: 1):
            raise DeadlineInfeasible("too late", retry_after_s=1)
    with account.use(4, 2, lambda _: 1), pytest.raises(KeyBusy), account.use(2, 0, lambda _: 1):
        pass
    with account.use(1, 0, lambda _: 1):
        assert account.in_work == 1


def test_work_that_fails_is_over_but_was_used() -> None:
    account = Account(key(rate_per_minute=1), clock=Clock())
    with pytest.raises(ZeroDivisionError), account.use(1, 0, lambda _: 1):
        raise ZeroDivisionError
    assert account.in_work == 0
    with pytest.raises(RateLimited), account.use(1, 0, lambda _: 1):
        pass


def test_changed_limits_hold_at_once_and_what_is_in_work_stays_counted() -> None:
    clock = Clock()
    account = Account(key(rate_per_minute=2, max_concurrent=2), clock=clock)
    with account.use(2, 0, lambda _: 1):
        account.follow(key(rate_per_minute=2, max_concurrent=3))
        assert account.in_work == 2
        with (
            pytest.raises(RateLimited),
            account.use(1, 0, lambda _: 1),
        ):  # the same rate is not filled up anew
            pass
        account.follow(key(rate_per_minute=3, max_concurrent=3))
        with account.use(1, 0, lambda _: 1), pytest.raises(KeyBusy), account.use(1, 0, lambda _: 1):
            pass


def test_request_without_a_key_is_charged_to_nobody() -> None:
    assert CALLER.get() is None
    with charged(1000, 9, lambda _: 1):
        pass
    account = Account(key(max_concurrent=1))
    token = CALLER.set(account)
    try:
        with charged(1, 0, lambda _: 1):
            assert account.in_work == 1
    finally:
        CALLER.reset(token)
