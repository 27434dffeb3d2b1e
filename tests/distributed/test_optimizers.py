"""Every optimiser steps its part of weights that ranks share as one device steps the whole."""

import os

import jobs
import pytest
import torch
from optimizer_jobs import KINDS, all_kinds, given_gradients

SIZES = (2, 4) if os.environ.get("STOKER_TEST_ALL") == "1" else (2,)


@pytest.fixture(scope="module", params=SIZES)
def found(request, tmp_path_factory):
    return jobs.on_ranks(request.param, tmp_path_factory.mktemp("ranks"), all_kinds)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_gradients_make_the_same_weights_and_states(found, kind):
    state, _ = found[kind]
    expected, _ = given_gradients(None, kind, "single")
    for ours, theirs in ((state.weights, expected.weights), (state.optimizer, expected.optimizer)):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            if kind in ("adamw_8bit", "sgd"):
                assert torch.equal(ours[name], tensor), name
            else:  # means over rows, and Muon's products in bf16, are summed in another order
                bounds = {"rtol": 1e-4, "atol": 1e-6} if kind == "adafactor" else {"rtol": 0.0, "atol": 3e-3}
                torch.testing.assert_close(ours[name], tensor, **bounds, msg=name)
    assert state.values == expected.values


def test_states_take_a_part_of_their_bytes_on_each_rank(found):
    for kind in ("adamw_8bit", "adafactor"):
        _, held = found[kind]
        _, (whole,) = given_gradients(None, kind, "single")
        # Columns' means are on every rank; rows are dealt out as evenly as they can be.
        spare = {"adamw_8bit": 0.05, "adafactor": 0.5}[kind]
        assert max(held) < whole * (1 / len(held) + spare), kind
