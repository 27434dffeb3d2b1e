import pytest

from stoker.train.settings import Every


def due(every, steps_per_epoch, total):
    return [step for step in range(total + 1) if every.is_due(step, steps_per_epoch)]


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (Every(steps=4), [4, 8, 12]),
        (Every(epochs=1), [5, 10]),
        (Every(epochs=2.0), [10]),
        (Every(epochs=0.5), [3, 5, 8, 10]),
        (Every(steps=6, epochs=1), [5, 6, 10, 12]),
        (Every(), []),
    ],
)
def test_due_on_the_first_step_at_or_after_each_period(every, expected):
    assert due(every, 5, 12) == expected


def test_fractions_that_floats_cannot_hold_do_not_slip_a_step():
    assert due(Every(epochs=0.1), 10, 30) == list(range(1, 31))
    assert due(Every(epochs=1 / 3), 10, 20) == [4, 7, 10, 14, 17, 20]
    assert due(Every(epochs=1.1), 10, 44) == [11, 22, 33, 44]


def test_periods_shorter_than_a_step_are_due_at_every_step():
    assert due(Every(epochs=0.01), 10, 5) == [1, 2, 3, 4, 5]
