"""Threads give what a plain loop would: in order, no more at once than allowed, errors where they belong."""

import threading
import time

import pytest

from library.parallel import ahead, finished_behind, threads


def test_results_come_in_order_and_no_more_than_allowed_are_made_before_they_are_taken():
    begun, taken, excess = 0, 0, []

    def slowly(item: int) -> int:
        nonlocal begun
        begun += 1
        excess.append(begun - taken)
        time.sleep(0.003 * (item % 3 == 0))
        return item * item

    with threads(3) as pool:
        for item, result in enumerate(ahead(pool, slowly, range(30), limit=5)):
            assert result == item * item
            taken += 1
    assert taken == 30 and max(excess) <= 5


def test_an_error_comes_where_its_result_would_have_been_and_nothing_more_begins():
    begun = []

    def fails_at_two(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise ValueError(item)
        return item

    results = []
    with pytest.raises(ValueError), threads(1) as pool:
        for result in ahead(pool, fails_at_two, range(100), limit=4):
            results.append(result)
    assert results == [0, 1] and len(begun) <= 6


def test_calls_are_made_behind_in_order_and_wait_when_there_are_too_many():
    may_go_on, made = threading.Event(), []

    def call(number: int) -> None:
        may_go_on.wait()
        made.append(number)

    with finished_behind(2) as behind:
        behind(call, 0)
        behind(call, 1)
        assert not made
        threading.Timer(0.05, may_go_on.set).start()
        behind(call, 2)
        assert made and may_go_on.is_set()
    assert made == [0, 1, 2]


def test_what_was_given_is_still_done_where_the_block_fails():
    made = []
    with pytest.raises(KeyboardInterrupt), finished_behind(8) as behind:
        for number in range(5):
            behind(made.append, number)
        raise KeyboardInterrupt
    assert made == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("num_calls_after", [0, 5])
def test_the_error_of_a_call_is_raised(num_calls_after):
    def fail() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), finished_behind(2) as behind:
        behind(fail)
        for _ in range(num_calls_after):
            behind(time.sleep, 0)
