import json
import random

import numpy as np
import pytest
import torch

from stoker.checkpoint import rng


def draw():
    return [random.random(), random.gauss(0, 1), *np.random.rand(2), np.random.randn(), *torch.rand(3).tolist()]


@pytest.mark.parametrize("warm_up", [0, 1, 700])
def test_every_generator_goes_on_where_it_was(warm_up):
    for _ in range(warm_up):
        draw()
    random.gauss(0, 1)  # Python and NumPy keep the second normal of a pair: it is part of the state.
    np.random.randn()
    tensors, values = rng.state()
    expected = draw()
    assert draw() != expected
    rng.restore(tensors, json.loads(json.dumps(values)))
    assert draw() == expected


def test_states_of_devices_that_are_not_here_are_passed_over():
    tensors, values = rng.state()
    rng.restore({**tensors, "cuda:63": torch.zeros(16, dtype=torch.uint8)}, values)
    assert torch.equal(torch.get_rng_state(), tensors["cpu"])
