import pytest

from stoker.distributed.graph_shapes import SPARE, GraphShape, closest, ends_of, is_close, shape_of

ROWS = ((30, 34), (64,), (10, 20, 34))


def test_boundaries_are_filled_up_with_empty_documents():
    assert ends_of(ROWS, 6) == [0, 30, 64, 128, 138, 158, 192]
    assert ends_of(ROWS, 9) == [0, 30, 64, 128, 138, 158, 192, 192, 192, 192]
    with pytest.raises(ValueError, match="6 documents where there is room for 5"):
        ends_of(ROWS, 5)


def test_a_batchs_shape_says_what_it_takes():
    assert shape_of(3, 64, 150, ROWS) == GraphShape(3, 64, 150, 6, 64)
    assert shape_of(3, 64, 150) == GraphShape(3, 64, 150)


def test_documents_and_lengths_are_rounded_up_by_a_half_at_most():
    for count in range(1, 300):
        for longest in range(1, 4097, 37):
            wanted = GraphShape(4, 4096, 50 * count, count, longest)
            shape = wanted.rounded()
            assert shape.holds(wanted)
            assert shape.rounded() == shape
            assert shape.documents <= max(count + 3, 1.5 * count)
            assert shape.longest <= max(longest + 127, 1.5 * longest)
            assert wanted.trained <= shape.trained < wanted.trained + 4 * 4096 / 8
            assert wanted.roomy().holds(GraphShape(4, 4096, 4 * 4096, count * 3 // 2, 4096))
    # Of all of them few are different.
    assert len({GraphShape(4, 4096, 0, n, 1).rounded() for n in range(1, 129)}) == 10
    assert len({GraphShape(4, 4096, n).rounded() for n in range(4 * 4096 + 1)}) == 8
    assert GraphShape(2, 3000, 0, 7, 2900).rounded().longest == 3000  # a row is no longer
    assert GraphShape(2, 64, 1).roomy() == GraphShape(2, 64, 128) == GraphShape(2, 64, 128).rounded()
    assert GraphShape(1, 100, 99).rounded() == GraphShape(1, 100, 100)


def test_a_graph_holds_smaller_batches_of_the_same_rows_alone():
    shape = GraphShape(2, 64, 100, 8, 64)
    assert shape.holds(GraphShape(2, 64, 100, 2, 64))
    for other in ((2, 64, 9, 9, 64), (2, 64, 101, 2, 64), (1, 64, 9, 2, 64), (2, 32, 9, 2, 32), (2, 64, 9, 0, 0)):
        assert not shape.holds(GraphShape(*other))
    assert not GraphShape(2, 128, 8, 8, 64).holds(GraphShape(2, 128, 8, 8, 65))
    assert not GraphShape(2, 64, 128).holds(GraphShape(2, 64, 128, 2, 32))


def test_a_batch_takes_the_graph_with_least_room_which_may_be_too_much():
    wanted = GraphShape(4, 4096, 9000, 30, 2000)
    near, far, small = (GraphShape(4, 4096, 9216, *sizes) for sizes in ((32, 2560), (40, 4096), (28, 2048)))
    assert near.blocks <= SPARE * wanted.blocks < far.blocks
    assert closest(wanted, [far, near, small]) == near
    assert is_close(near, wanted)
    assert closest(wanted, [far, small]) == far
    assert not is_close(far, wanted)
    assert closest(wanted, [small]) is None


def test_some_room_is_close_enough_where_there_is_little_to_do():
    one = GraphShape(1, 4096, 0, 4, 1000)
    assert (one.blocks, one.rounded().blocks) == (32, 32)
    # A block for every 128 positions beside its own, which is more than SPARE allows; not two.
    assert is_close(one._replace(documents=4, longest=2048), one)
    assert not is_close(one._replace(documents=6, longest=2048), one)
    few = GraphShape(2, 64, 0, 2, 64)  # and no graph is closer than the next one
    assert few.rounded().blocks == 4
    assert is_close(few.rounded(), few)
    assert not is_close(few._replace(documents=8), few)


def test_a_quarter_of_all_positions_may_run_through_the_head_for_nothing():
    wanted = GraphShape(2, 64, 60)
    assert is_close(GraphShape(2, 64, 92), wanted)
    assert not is_close(GraphShape(2, 64, 96), wanted)
    # That is more work than some blocks of attention that find nothing.
    wanted = GraphShape(4, 4096, 4000, 30, 2000)
    blocks, head = wanted._replace(documents=36), wanted._replace(trained=8000)
    assert closest(wanted, [head, blocks]) == blocks
