import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from stoker.data.shuffle import shuffled


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 5))
def test_every_element_comes_once(size, key, salt):
    order = shuffled(np.arange(size), size, key, salts=salt)
    assert np.array_equal(np.sort(order), np.arange(size))


def test_any_part_of_an_order_is_computed_on_its_own():
    whole = shuffled(np.arange(1000), 1000, 3, 1)
    some = np.array([999, 0, 517])
    assert np.array_equal(shuffled(some, 1000, 3, 1), whole[some])
    sizes = np.array([1000, 10, 1000])
    mixed = shuffled(np.array([999, 4, 517]), sizes, 3, 1)
    assert mixed[[0, 2]].tolist() == whole[[999, 517]].tolist()
    assert mixed[1] == shuffled(np.arange(10), 10, 3, 1)[4]


def test_key_and_salt_choose_the_order():
    orders = {tuple(shuffled(np.arange(50), 50, *key, salts=salt).tolist()) for key, salt in KEYS}
    assert len(orders) == len(KEYS)


KEYS = [((1,), 0), ((2,), 0), ((1,), 1), ((1, 0), 0), ((0, 1), 0)]


def test_each_element_is_as_likely_at_each_place():
    size, draws = 12, 6000
    keys = np.arange(draws).repeat(size)
    order = shuffled(np.tile(np.arange(size), draws), size, 7, salts=keys).reshape(draws, size)
    counts = np.stack([np.bincount(order[:, place], minlength=size) for place in range(size)])
    expected = draws / size
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # 121 degrees of freedom: mean 121, standard deviation 15.6; six of them above the mean.
    assert chi_square < 121 + 6 * 15.6


def test_neighbours_do_not_stay_neighbours():
    size = 10_000
    steps = np.abs(np.diff(shuffled(np.arange(size), size, 5)))
    assert (steps == 1).mean() < 10 / size  # two of 10,000 in a random order
    assert abs(steps.mean() / (size / 3) - 1) < 0.05
