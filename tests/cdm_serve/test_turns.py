"""Turns on a device are given in the order in which they were asked for, one at a time."""

from __future__ import annotations

import threading
import time

from cdm_serve.turns import Turns
from tests.cdm_serve.helpers import wait_until


def test_who_asked_first_is_next() -> None:
    turns, order = Turns(), []

    def work(name: int) -> None:
        with turns:
            order.append(name)

    threads = []
    with turns:
        for name in range(5):
            threads.append(threading.Thread(target=work, args=(name,)))
            threads[-1].start()
            wait_until(lambda name=name: len(turns._waiting) == name + 1)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4]
    with turns:  # and it is free again
        pass


def test_one_at_a_time_and_free_after_a_failure() -> None:
    turns, inside, most = Turns(), [], []

    def work() -> None:
        for _ in range(200):
            try:
                with turns:
                    inside.append(1)
                    time.sleep(0)  # whoever is not kept out comes in now
                    most.append(len(inside))
                    inside.pop()
                    raise OSError
            except OSError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 800
    assert set(most) == {1}
