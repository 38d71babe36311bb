"""Permits bound the queue, and a refusal says when to come back."""

from __future__ import annotations

import pytest

from cdm_serve.admission import Permits
from cdm_serve.errors import QueueFull


def test_permits_come_back_when_a_request_ends_or_fails() -> None:
    permits = Permits(4, lambda _: 1)
    with permits.take(3):
        assert permits.in_use == 3
    with pytest.raises(ZeroDivisionError), permits.take(4):
        raise ZeroDivisionError
    assert permits.in_use == 0


def test_refusal_takes_nothing_and_names_value_limit_and_when() -> None:
    asked: list[int] = []

    def wait_for(pictures: int) -> int:
        asked.append(pictures)
        return 7

    permits = Permits(4, wait_for)
    with permits.take(3):
        with (
            pytest.raises(
                QueueFull, match=r"3 pictures are in work and 2 more exceed --queue-limit=4"
            ) as full,
            permits.take(2),
        ):
            pass
        assert permits.in_use == 3
    assert asked == [1]  # so many must leave
    assert full.value.headers["retry-after"] == "7"
