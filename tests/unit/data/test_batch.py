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


def _batch(rows, width, *, documents=None, trained=slice(None), unit=1):
    ids = torch.arange(rows * width).view(rows, width) % 90
    targets = torch.full_like(ids, IGNORED)
    targets[:, trained] = ids[:, trained] + 1
    return Batch(ids, targets, documents, ids.numel(), int((targets != IGNORED).sum()), documents_per_example=unit)


@pytest.mark.parametrize(
    ("rows", "width", "shortened"),
    [
        (1, 56_000, (1, 1024)),
        (1, 56_001, (1, 1009)),
        (8, 4096, (2, 1024)),
        (3, 4097, (3, 1009)),
        (32, 1001, (16, 1001)),
        (2, 512, (2, 512)),
        (1, 1, (1, 1)),
    ],
)
def test_shortened_keeps_what_kernels_are_compiled_for(rows, width, shortened):
    short = _batch(rows, width).shortened()
    assert tuple(short.input_ids.shape) == tuple(short.targets.shape) == shortened
    assert (shortened[0] * shortened[1] - rows * width) % 16 == (shortened[1] - width) % 16 == 0
    assert short.num_trained_tokens == short.num_tokens == shortened[0] * shortened[1]
    assert short.targets.max() <= 90


def test_shortened_trains_something_wherever_the_batch_does():
    # Only the last positions of a long row are trained, as after a long prompt.
    short = _batch(1, 8192, trained=slice(8000, None)).shortened()
    assert short.num_trained_tokens == 512
    assert not _batch(1, 8192, trained=slice(0)).shortened().num_trained_tokens


def test_shortened_keeps_pairs_and_documents():
    assert _batch(8, 4096, unit=2).shortened().num_rows == 2
    documents = ((3000, 1000, 96),) * 4
    short = _batch(4, 4096, documents=documents).shortened()
    assert short.document_lengths == ((341, 341, 342),) * 2
    many = _batch(1, 4080, documents=((120,) * 34,), unit=2).shortened()
    assert len(many.document_lengths[0]) == 16
    assert sum(many.document_lengths[0]) == many.input_ids.shape[1] == 1024
    assert _batch(4, 512, documents=((500, 12),) * 4).shortened().document_lengths == ((500, 12),) * 2
