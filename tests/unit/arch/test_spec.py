import dataclasses
import json

import pytest

from stoker.arch.families import read


def spec(**changes):
    return read({"model_type": "llama", "num_hidden_layers": 2, **changes}, "config.json")


def test_a_spec_becomes_plain_json_with_the_kind_of_its_scaling():
    values = json.loads(json.dumps(spec(rope_scaling={"type": "linear", "factor": 2}).to_dict()))
    assert values["hidden_size"] == 4096
    assert len(values["layers"]) == 2
    assert values["layers"][0]["mixer"]["rope"]["scaling"] == {"kind": "linear", "factor": 2.0}


def test_specs_are_frozen_and_compare_by_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec().hidden_size = 1
    assert spec() == spec()
    assert spec() != spec(rope_theta=500000.0)
    assert hash(spec()) == hash(spec())
