import pytest
import torch

from stoker.kernels.documents import Boundaries, boundaries_of, document_ids, positions_in_documents

CPU = torch.device("cpu")
ROWS = ((3, 1, 6), (10,), (4, 6))
# The same with room for more: empty documents at the begin, in the middle and at the end.
ENDS = torch.tensor([0, 0, 3, 4, 10, 20, 20, 24, 30, 30, 30], dtype=torch.int32)


@pytest.fixture
def boundaries():
    return Boundaries(ENDS.clone(), 16)


def test_lengths_become_where_documents_begin_and_end():
    made = boundaries_of(ROWS, CPU)
    assert made.ends.tolist() == [0, 3, 4, 10, 20, 24, 30]
    assert (made.ends.dtype, made.longest) == (torch.int32, 10)
    assert boundaries_of(ROWS, CPU) is made  # every layer asks
    whole = boundaries_of(((10,), (10,)), CPU)
    assert (whole.ends.tolist(), whole.longest) == ([0, 10, 20], 10)
    # A CUDA graph may read those, and what is kept here does not live as long as a graph.
    assert boundaries_of(((10,), (10,)), CPU) is not whole


def test_lengths_come_back_without_empty_documents(boundaries):
    assert boundaries.lengths(3, 10) == ROWS
    assert boundaries_of(boundaries, CPU) is boundaries


@pytest.mark.parametrize(("num_rows", "length"), [(2, 10), (3, 12), (1, 30), (5, 6)])
def test_boundaries_of_other_rows_are_refused(boundaries, num_rows, length):
    if (num_rows, length) == (1, 30):
        assert boundaries.lengths(1, 30) == ((3, 1, 6, 10, 4, 6),)
        return
    with pytest.raises(ValueError, match=f"{num_rows} rows of {length}"):
        boundaries.lengths(num_rows, length)


def test_positions_restart_in_every_document_and_skip_empty_ones(boundaries):
    expected = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in ROWS])
    for documents in (ROWS, boundaries):
        found = positions_in_documents(documents, 3, 10, CPU)
        assert torch.equal(found.long(), expected)
    assert positions_in_documents(((10,), (10,)), 2, 10, CPU).tolist() == [list(range(10))] * 2


def test_numbers_change_exactly_where_a_document_begins(boundaries):
    expected, found = document_ids(ROWS, 3, 10, CPU), document_ids(boundaries, 3, 10, CPU)
    assert expected is not None
    assert found is not None
    assert found.dtype == expected.dtype
    assert torch.equal(found[:, 1:] != found[:, :-1], expected[:, 1:] != expected[:, :-1])
    assert found[:, 0].tolist() == [0, 0, 0]
    assert (found.diff(dim=1) >= 0).all()


def test_what_all_layers_ask_of_boundaries_is_made_once(boundaries):
    one, other = (positions_in_documents(boundaries, 3, 10, CPU) for _ in range(2))
    assert one.data_ptr() == other.data_ptr()
    assert document_ids(boundaries, 3, 10, CPU) is document_ids(boundaries, 3, 10, CPU)
    # Not from one object to the next: a graph's boundaries change in place.
    boundaries.ends[3] = 5
    again = Boundaries(boundaries.ends, 16)
    assert not torch.equal(positions_in_documents(again, 3, 10, CPU), one)
