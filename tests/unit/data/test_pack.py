import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from stoker.data.pack import Layout, pack, split_long


def best_fit_decreasing(lengths, capacity):
    """The same rule by looking at every row."""
    free, rows = [], []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = [row for row in range(len(rows)) if free[row] >= lengths[index]]
        if fitting:
            row = min(fitting, key=lambda row: free[row])
        else:
            row = len(rows)
            rows.append([])
            free.append(capacity)
        rows[row].append(index)
        free[row] -= lengths[index]
    return rows, free


@given(st.lists(st.integers(1, 50), max_size=60))
def test_every_document_is_packed_once_and_rows_fit(lengths):
    rows = pack(lengths, 50)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 50 for row in rows)


@given(st.lists(st.integers(1, 50), max_size=60))
def test_rows_are_those_of_best_fit_decreasing(lengths):
    rows = pack(lengths, 50)
    expected, free = best_fit_decreasing(lengths, 50)
    assert len(rows) == len(expected)
    assert sorted(50 - sum(lengths[index] for index in row) for row in rows) == sorted(free)


def test_number_of_rows_depends_on_lengths_alone():
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    assert len(pack(lengths, 128)) == len(pack(lengths[::-1], 128))


@pytest.mark.parametrize("lengths", [[5, 11], [0, 5]])
def test_length_outside_the_budget_is_refused(lengths):
    with pytest.raises(ValueError, match="between 1 and 10"):
        pack(lengths, 10)


def test_packing_a_hundred_thousand_documents_takes_about_a_second():
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1, 100_000).astype(int) + 1, 4096)
    start = time.process_time()
    rows = pack(lengths, 4096)
    assert time.process_time() - start < 5.0  # 0.3 s on an idle core; wide for a busy machine
    assert lengths.sum() / (len(rows) * 4096) > 0.99


@given(length=st.integers(0, 40), limit=st.integers(2, 12), mask=st.lists(st.booleans(), min_size=40, max_size=40))
def test_pieces_train_every_target_of_the_whole_exactly_once(length, limit, mask):
    ids, trained = np.arange(length, dtype=np.uint32), np.array(mask[:length], dtype=bool)
    trained[:1] = False
    pieces = split_long(ids, trained, limit)
    targets = [token for piece, flags in pieces for token in piece[1:][flags[1:]].tolist()]
    assert targets == ids[trained].tolist()
    assert all(len(piece) <= limit and not flags[:1].any() for piece, flags in pieces)
    assert all(len(piece) >= 2 for piece, _ in pieces[1:])


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5])
def test_rows_of_log_normal_lengths_are_full(sigma):
    for count in (5_000, 50_000):
        lengths = np.clip(np.random.default_rng(1).lognormal(np.log(300), sigma, count).astype(int), 8, 4096)
        assert Layout(lengths, 4096).efficiency > 0.98


def test_ten_million_documents_take_no_longer_than_their_lengths_to_count():
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1, 10_000_000).astype(np.int32) + 1, 4096)
    start = time.process_time()
    layout = Layout(lengths, 4096)
    assert time.process_time() - start < 2.0  # 0.12 s on an idle core
    assert layout.efficiency > 0.999
    assert sum(length for length, _ in layout.row(len(layout) // 2)) <= 4096


@given(st.lists(st.integers(1, 12), min_size=1, max_size=60))
def test_layout_uses_each_document_of_each_length_once(lengths):
    layout = Layout(np.array(lengths), 24)
    used = sorted(part for index in range(len(layout)) for part in layout.row(index))
    expected = [(length, number) for length in sorted(set(lengths)) for number in range(lengths.count(length))]
    assert used == expected
