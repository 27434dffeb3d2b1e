import pytest
import torch

from stoker.data.batch import IGNORED, Batch


def plain_batch(rows, width=4):
    ids = torch.arange(rows * width).reshape(rows, width)
    targets = ids + 1
    targets[:, -1] = IGNORED
    tokens = tuple(range(1, rows + 1))
    return Batch(ids, targets, None, sum(tokens), int((targets != IGNORED).sum()), tokens)


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_split_halves_rows_and_keeps_every_target_and_count(rows):
    batch = plain_batch(rows)
    first, second = batch.split()
    assert first.num_rows - second.num_rows in (0, 1)
    assert torch.equal(torch.cat([first.input_ids, second.input_ids]), batch.input_ids)
    assert torch.equal(torch.cat([first.targets, second.targets]), batch.targets)
    assert first.num_tokens + second.num_tokens == batch.num_tokens
    assert first.num_tokens == sum(batch.row_tokens[: first.num_rows])
    assert first.num_trained_tokens + second.num_trained_tokens == batch.num_trained_tokens


def test_split_without_row_counts_keeps_the_sum():
    ids = torch.zeros(3, 4, dtype=torch.long)
    parts = Batch(ids, ids, ((4,), (3, 1), (4,)), 11, 12).split()
    assert sum(part.num_tokens for part in parts) == 11
    assert parts[0].document_lengths == ((4,), (3, 1))


def test_single_packed_row_is_cut_between_documents():
    ids = torch.arange(10)[None]
    targets = torch.tensor([[1, -100, 3, 4, 5, -100, -100, -100, -100, -100]])
    first, second = Batch(ids, targets, ((2, 4, 4),), 6, 4).split()
    assert (first.document_lengths, second.document_lengths) == (((2, 4),), ((4,),))
    assert torch.equal(torch.cat([first.targets, second.targets], 1), targets)
    assert (first.num_tokens, second.num_tokens) == (6, 0)
    assert (first.num_trained_tokens, second.num_trained_tokens) == (4, 0)


@pytest.mark.parametrize("documents", [None, ((4,),)])
def test_one_document_cannot_be_split(documents):
    ids = torch.zeros(1, 4, dtype=torch.long)
    batch = Batch(ids, ids, documents, 4, 4)
    assert not batch.can_split
    with pytest.raises(ValueError, match="cannot be split"):
        batch.split()


def test_to_moves_both_tensors_and_keeps_the_rest():
    batch = plain_batch(2).to("meta")
    assert (batch.input_ids.device.type, batch.targets.device.type) == ("meta", "meta")
    assert batch.row_tokens == (1, 2)


def test_pairs_stay_together_in_a_split():
    ids = torch.arange(20)[None]
    row = Batch(ids, ids, ((3, 4, 5, 6, 2),), 18, 20, documents_per_example=2)
    first, second = row.split()
    assert (first.document_lengths, second.document_lengths) == (((3, 4),), ((5, 6, 2),))
    assert not first.can_split
    rows = torch.arange(24).reshape(6, 4)
    first, second = Batch(rows, rows, None, 24, 24, documents_per_example=2).split()
    assert (first.num_rows, second.num_rows) == (4, 2)
    assert first.can_split
    assert not second.can_split


def test_padding_adds_positions_that_train_nothing():
    batch = plain_batch(2)
    padded = batch.padded_to(7)
    assert padded.input_ids.shape == padded.targets.shape == (2, 7)
    assert torch.equal(padded.input_ids[:, :4], batch.input_ids)
    assert torch.equal(padded.targets[:, :4], batch.targets)
    assert (padded.targets[:, 4:] == IGNORED).all()
    assert (padded.num_tokens, padded.num_trained_tokens) == (batch.num_tokens, batch.num_trained_tokens)
    assert sum(padded.row_tokens) == batch.num_tokens
    assert padded.padded_to(7) is padded
    with pytest.raises(ValueError, match="cannot be padded to 3"):
        batch.padded_to(3)
