import numpy as np

from stoker.compose.bench.rows import MEDIAN_TOKENS, random_data
from stoker.compose.data import loader


def test_full_rows_are_as_many_and_as_long_as_the_steps_need(config):
    chosen = config()
    data = random_data(chosen, 512, steps=5)
    assert data.train.lengths.tolist() == [32] * 20
    batches = loader(chosen, data.train, micro_batch_size=2, pad_id=0)
    first = batches.step(4)[0]
    assert batches.steps_per_epoch == 5
    assert first.document_lengths is None
    assert first.num_tokens == 64
    assert first.num_trained_tokens == 62
    assert 0 <= first.input_ids.min() < first.input_ids.max() < 512


def test_packed_rows_hold_documents_of_real_lengths(config):
    chosen = config("data.packing=true", "data.sequence_length=4096")
    data = random_data(chosen, 512, steps=12)
    lengths = data.train.lengths
    assert 0.8 * MEDIAN_TOKENS < np.median(lengths) < 1.2 * MEDIAN_TOKENS
    assert lengths.max() == 4096  # cut there
    batches = loader(chosen, data.train, micro_batch_size=4, pad_id=0)
    assert batches.steps_per_epoch >= 12
    assert batches.padding_share < 0.05
    assert all(step[0].num_rows == 4 for step in map(batches.step, range(12)))


def test_the_same_configuration_gives_the_same_rows(config):
    one, same = (random_data(config(), 512, steps=2).train for _ in range(2))
    other = random_data(config("train.seed=1"), 512, steps=2).train
    assert np.array_equal(one.ids, same.ids)
    assert not np.array_equal(one.ids, other.ids)
