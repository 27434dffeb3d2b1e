import time
from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from stoker.data.batch import IGNORED
from stoker.data.loader import StepLoader
from stoker.data.prepared import Prepared
from stoker.errors import DataError

lengths_of_documents = st.lists(st.integers(2, 20), min_size=1, max_size=30)


def documents(lengths, trained=True):
    """Documents of distinct tokens: document i holds 1000 i, 1000 i + 1, ..."""
    return Prepared.from_documents(
        [
            ([1000 * index + offset for offset in range(length)], [trained] * length)
            for index, length in enumerate(lengths)
        ]
    )


def loader(prepared, **options):
    defaults = {"batch_size": 4, "micro_batch_size": 2, "sequence_length": 24, "packing": False, "seed": 7}
    return StepLoader(prepared, **(defaults | options))


def targets_of(batches):
    return Counter(token for batch in batches for token in batch.targets[batch.targets != IGNORED].tolist())


def expected_targets(lengths):
    return Counter(1000 * index + offset for index, length in enumerate(lengths) for offset in range(1, length))


@settings(max_examples=30, deadline=None)
@given(lengths_of_documents, st.booleans(), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_an_epoch_over_all_ranks_trains_every_target_once(lengths, packing, batch_size, micro_batch_size, world_size):
    ranks = [
        loader(
            documents(lengths),
            packing=packing,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    for epoch in range(2):
        steps = range(epoch * ranks[0].steps_per_epoch, (epoch + 1) * ranks[0].steps_per_epoch)
        taken = [[rank.step(step) for rank in ranks] for step in steps]
        assert targets_of(b for step in taken for batches in step for b in batches) == expected_targets(lengths)
        # Every rank has as many micro-batches as the others, or a collective would wait for ever.
        assert all(len({len(batches) for batches in step}) == 1 for step in taken)
        assert sum(b.num_tokens for step in taken for batches in step for b in batches) == sum(lengths)


@settings(max_examples=30, deadline=None)
@given(lengths_of_documents, st.booleans(), st.sampled_from([4, 8, 12]), st.integers(1, 3), st.integers(0, 6))
def test_a_step_holds_the_same_rows_in_the_same_order_on_any_number_of_ranks(lengths, packing, batch, micro, step):
    """So a run that is resumed on another number goes on with the rows that the first would have had."""

    def dealt(world_size):
        options = {"packing": packing, "batch_size": batch, "micro_batch_size": micro, "world_size": world_size}
        ranks = [loader(documents(lengths), rank=rank, **options).step(step) for rank in range(world_size)]
        rows = []
        for batches in zip(*ranks, strict=True):
            # The n-th row of a micro-batch went to rank n modulo the number of ranks.
            for number in range(max(one.num_rows for one in batches)):
                rows += [one.input_ids[number].tolist() for one in batches if number < one.num_rows]
        plain = [tuple(token for token in row if token) for row in rows]  # token 0 is of document 0, and padding
        return [row for row in plain if row]

    assert dealt(1) == dealt(2) == dealt(4)


@settings(max_examples=30, deadline=None)
@given(lengths_of_documents, st.booleans())
def test_targets_are_the_next_token_of_the_same_document(lengths, packing):
    for batch in loader(documents(lengths), packing=packing).step(0):
        assert batch.num_trained_tokens == int((batch.targets != IGNORED).sum())
        for row in range(batch.num_rows):
            ids, targets = batch.input_ids[row].tolist(), batch.targets[row].tolist()
            for position, target in enumerate(targets):
                if target != IGNORED:
                    assert target == ids[position] + 1 == ids[position + 1]
            if packing:
                assert sum(batch.document_lengths[row]) == batch.input_ids.shape[1] == 24
                end = 0
                for length in batch.document_lengths[row]:
                    end += length
                    assert targets[end - 1] == IGNORED


def test_micro_batch_size_does_not_change_what_a_step_trains():
    lengths = [3, 9, 4, 20, 6, 7, 5, 8]
    for packing in (False, True):
        steps = [
            [
                targets_of(loader(documents(lengths), packing=packing, micro_batch_size=size).step(step))
                for step in range(2)
            ]
            for size in (1, 2, 4)
        ]
        assert steps[0] == steps[1] == steps[2]


def test_step_is_a_function_of_seed_and_number_alone():
    lengths = list(range(2, 22))
    one, other = loader(documents(lengths)), loader(documents(lengths))
    for step in (0, 3):
        other.step(step)  # reading other steps before changes nothing
    for step in (7, 2, 11):
        for a, b in zip(one.step(step), other.step(step), strict=True):
            assert torch.equal(a.input_ids, b.input_ids)
    assert targets_of(one.step(0)) != targets_of(loader(documents(lengths), seed=8).step(0))
    assert targets_of(one.step(0)) != targets_of(one.step(one.steps_per_epoch))


def test_packed_epochs_bring_documents_of_equal_length_together_anew():
    packed = loader(documents([6] * 40), packing=True, batch_size=1)
    neighbours = [
        {
            frozenset(token // 1000 for token in batch.input_ids[0].tolist())
            for step in steps
            for batch in packed.step(step)
        }
        for steps in (range(10), range(10, 20))
    ]
    assert packed.steps_per_epoch == 10
    assert neighbours[0] != neighbours[1]


def test_last_step_is_smaller_not_dropped():
    ten = loader(documents([4] * 10))
    assert ten.steps_per_epoch == 3
    assert sum(batch.num_rows for batch in ten.step(2)) == 2


def test_plain_rows_pad_to_a_multiple_of_eight_but_not_past_the_sequence_length():
    short = loader(documents([5, 9]), micro_batch_size=1, sequence_length=12, pad_id=99)
    widths = [batch.input_ids.shape[1] for batch in short.step(0)]
    assert widths == [12, 8]
    assert short.step(0)[1].input_ids[0, 5:].tolist() == [99, 99, 99]
    assert short.step(0)[1].document_lengths is None


def test_step_rows_of_similar_length_share_a_micro_batch():
    mixed = loader(documents([20, 3, 19, 4]), micro_batch_size=2)
    assert sorted(batch.input_ids.shape[1] for batch in mixed.step(0)) == [8, 24]


def test_packed_padding_is_a_document_of_its_own():
    (batch,) = loader(documents([10, 6]), packing=True).step(0)
    assert batch.document_lengths == ((10, 6, 8),)
    assert batch.num_tokens == 16
    assert (batch.targets[0, 16:] == IGNORED).all()


def test_rank_without_rows_gets_padding_only():
    ranks = [loader(documents([4]), rank=rank, world_size=2) for rank in range(2)]
    assert [sum(batch.num_trained_tokens for batch in rank.step(0)) for rank in ranks] == [3, 0]
    assert ranks[1].step(0)[0].num_rows == 1


@pytest.mark.parametrize("packing", [False, True])
def test_all_gives_every_row_once(packing):
    lengths = [5, 3, 8, 2, 20]
    every = list(loader(documents(lengths), packing=packing).all())
    assert targets_of(every) == expected_targets(lengths)
    if not packing:
        assert [row[0] for batch in every for row in batch.input_ids.tolist()] == [0, 1000, 2000, 3000, 4000]


def test_documents_without_a_trained_token_are_passed_over():
    mixed = Prepared.from_documents([([1, 2], [True, True]), ([3, 4], [False, False]), ([5], [True])])
    assert loader(mixed).num_rows == 1


def test_no_trained_token_at_all_is_an_error():
    with pytest.raises(DataError, match="nothing to learn"):
        loader(documents([4, 5], trained=False))


def test_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="25 tokens"):
        loader(documents([25]))


def test_padding_share_of_packed_rows():
    assert loader(documents([12, 6]), packing=True).padding_share == pytest.approx(0.25)
    assert loader(documents([12, 6])).padding_share == 0.0


def test_untrained_tokens_are_context_only():
    half = Prepared.from_documents([([11, 12, 13, 14], [True, False, True, True])])
    (batch,) = loader(half, packing=False).step(0)
    assert batch.targets.tolist() == [[IGNORED, 13, 14, *[IGNORED] * 5]]
    assert batch.input_ids[0, :4].tolist() == [11, 12, 13, 14]


def pairs(lengths, sources=(0,)):
    """Chosen documents of the tokens 1000 i, ... and rejected ones of 1000 i + 500, ...; one token shorter."""
    return Prepared.from_documents(
        [
            ([1000 * index + 500 * side + offset for offset in range(length - side)], [True] * (length - side))
            for index, length in enumerate(lengths)
            for side in range(2)
        ],
        documents_per_example=2,
        source_starts=sources,
    )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(3, 12), min_size=1, max_size=20), st.integers(1, 3), st.integers(1, 2))
def test_pairs_are_neighbours_wherever_they_stand(lengths, micro_batch_size, world_size):
    for packing in (True, False):
        seen = Counter()
        for rank in range(world_size):
            one = loader(pairs(lengths), packing=packing, rank=rank, world_size=world_size, batch_size=3,
                         micro_batch_size=micro_batch_size)  # fmt: skip
            for step in range(one.steps_per_epoch):
                for batch in one.step(step):
                    assert batch.documents_per_example == 2
                    firsts = first_tokens(batch)
                    assert all(b == a + 500 for a, b in zip(firsts[::2], firsts[1::2], strict=True))
                    seen.update(first // 1000 for first in firsts[::2])
        assert seen == Counter(range(len(lengths)))


def first_tokens(batch):
    """The first token of each document that trains, in order."""
    found = []
    for row in range(batch.num_rows):
        lengths = batch.document_lengths[row] if batch.document_lengths else (batch.input_ids.shape[1],)
        start = 0
        for length in lengths:
            if batch.targets[row, start] != IGNORED:
                found.append(int(batch.input_ids[row, start]))
            start += length
    return found


def mixed(**options):
    """Three sources of 30, 6 and 12 documents, in shares of 1/2, 1/3 and 1/6."""
    prepared = Prepared.from_documents(
        [([1000 * index + offset for offset in range(6)], [True] * 6) for index in range(48)],
        source_starts=(0, 30, 36),
    )
    return loader(prepared, weights=(3.0, 2.0, 1.0), **options)


@pytest.mark.parametrize("packing", [False, True])
def test_sources_are_mixed_by_weight_and_each_is_gone_through_evenly(packing):
    one = mixed(packing=packing)
    assert one.num_rows == (48 if not packing else 13)  # four documents fill a packed row: 8 + 2 + 3
    counts = Counter()
    num_steps = 60
    for step in range(num_steps):
        for batch in one.step(step):
            counts.update(token // 1000 for token in first_tokens(batch))
    by_source = [sum(counts[index] for index in part) for part in (range(30), range(30, 36), range(36, 48))]
    shares = [count / sum(by_source) for count in by_source]
    # Rows are in exact shares; the last packed row of a pass over a source holds fewer documents.
    assert shares == pytest.approx([1 / 2, 1 / 3, 1 / 6], abs=0.06)
    for part in (range(30), range(30, 36), range(36, 48)):
        seen = [counts[index] for index in part]
        assert max(seen) - min(seen) <= 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 200), st.booleans(), st.sampled_from([1, 2, 3]))
def test_a_mixed_step_is_the_same_whatever_came_before_and_however_many_ranks(step, packing, world_size):
    whole = Counter(t for batch in mixed(packing=packing).step(step) for t in first_tokens(batch))
    ranks = [mixed(packing=packing, rank=rank, world_size=world_size) for rank in range(world_size)]
    ranks[0].step(step // 2)
    assert Counter(t for rank in ranks for batch in rank.step(step) for t in first_tokens(batch)) == whole


def test_weights_must_be_as_many_as_sources():
    with pytest.raises(ValueError, match="2 weights for 1 sources"):
        loader(documents([4, 5]), weights=(1.0, 1.0))


@pytest.mark.parametrize("packing", [False, True])
def test_without_shuffling_rows_come_in_their_order(packing):
    one = loader(documents([9, 7, 8, 5, 20, 3]), packing=packing, shuffle=False, batch_size=1, micro_batch_size=1)
    seen = [first for step in range(one.steps_per_epoch) for batch in one.step(step) for first in first_tokens(batch)]
    assert seen == [0, 1000, 2000, 3000, 4000, 5000]
    assert one.steps_per_epoch == (3 if packing else 6)


class Synthetic:
    """Ten million documents that are computed when they are asked for."""

    documents_per_example, source_starts = 1, (0, 6_000_000)

    def __init__(self):
        self.lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 10_000_000), 8, 2048).astype(np.int64)
        self.trained_counts = self.lengths

    def __len__(self):
        return len(self.lengths)

    def document(self, index):
        length = int(self.lengths[index])
        return np.full(length, index, dtype=np.uint32), np.ones(length, dtype=bool)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"packing": True}, {"packing": False}, {"packing": True, "weights": (1.0, 3.0)}])
def test_row_ten_million_is_there_at_once(options):
    ten_million = Synthetic()
    started = time.process_time()
    one = loader(ten_million, batch_size=64, sequence_length=2048, **options)
    made = time.process_time() - started
    rows = 10_000_000
    started = time.process_time()
    (batch, *_) = one.step(rows // 64)
    resumed = time.process_time() - started
    assert batch.num_trained_tokens > 0
    assert resumed < 0.5  # 0.01 s on an idle core
    assert made < 5.0  # 0.6 s: it reads all lengths once
