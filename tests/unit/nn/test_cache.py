import pytest
import torch

from stoker.nn.cache import KVCache, LayerCache


def make(capacity=5):
    options = {"dtype": torch.float32, "device": torch.device("cpu")}
    shapes = [(2, capacity, 2, 3), (2, capacity, 1, 4)]
    return KVCache([LayerCache.empty(shape, **options) for shape in shapes], capacity=capacity)


def test_written_keys_and_values_come_back_in_order():
    cache = make()
    first, second = torch.randn(2, 3, 2, 3), torch.randn(2, 1, 2, 3)
    cache.layers[0].write(0, first, -first)
    cache.advance(3)
    keys, values = cache.layers[0].write(cache.length, second, -second)
    assert torch.equal(keys, torch.cat([first, second], 1))
    assert torch.equal(values, -keys)
    assert cache.layers[1].keys.shape == (2, 5, 1, 4)


def test_more_than_the_capacity_is_refused():
    cache = make()
    cache.require(5)
    cache.advance(4)
    with pytest.raises(ValueError, match="4 of 5 positions; 2 more do not fit"):
        cache.require(2)
