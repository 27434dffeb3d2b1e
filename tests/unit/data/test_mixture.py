import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from stoker.data.mixture import Mixture

weights = st.lists(st.floats(0.01, 10), min_size=1, max_size=5)


@settings(deadline=None, max_examples=50)
@given(weights, st.integers(0, 5), st.integers(1, 3))
def test_each_row_of_each_source_is_used_once(shares, seed, blocks):
    mixture = Mixture(shares, seed=seed)
    sources, numbers = mixture.locate(np.arange(min(blocks * mixture.block, 20_000) // mixture.block * mixture.block))
    for source in range(len(shares)):
        mine = np.sort(numbers[sources == source])
        assert np.array_equal(mine, np.arange(len(mine)))


@pytest.mark.parametrize("shares", [(0.7, 0.3), (1, 2), (3.0, 1.0, 0.01), (0.123, 0.877)])
def test_shares_are_met(shares):
    mixture = Mixture(shares, seed=1)
    sources, _ = mixture.locate(np.arange(10 * mixture.block))
    found = np.bincount(sources) / len(sources)
    assert found == pytest.approx(np.array(shares) / sum(shares), rel=2e-3)


def test_simple_shares_hold_within_few_rows():
    sources, _ = Mixture((0.7, 0.3), seed=4).locate(np.arange(20))
    assert [np.bincount(sources[start : start + 10]).tolist() for start in (0, 10)] == [[7, 3], [7, 3]]


def test_blocks_differ_in_order_and_rows_do_not_depend_on_one_another():
    mixture = Mixture((1, 1, 2), seed=0)
    sources, numbers = mixture.locate(np.arange(400))
    assert len({tuple(block) for block in sources.reshape(-1, mixture.block).tolist()}) > 1
    alone = mixture.locate(np.array([317]))
    assert (alone[0][0], alone[1][0]) == (sources[317], numbers[317])


@pytest.mark.parametrize("shares", [[], [1.0, 0.0], [-1.0]])
def test_weights_must_be_positive(shares):
    with pytest.raises(ValueError, match="positive"):
        Mixture(shares, seed=0)
