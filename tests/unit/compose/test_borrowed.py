import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from stoker.compose.execution import borrowed_notices, set_up_layers, take_apart
from stoker.compose.model import load_decoder, open_base, read_facts
from stoker.errors import ModelError
from stoker.plan.ladder import Ladder


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    return open_base(str(tmp_path))


@pytest.fixture
def decoder(base):
    return load_decoder(base, device="cpu", dtype=torch.float32, kernels="reference")


def test_a_run_is_told_what_a_class_does_otherwise(decoder):
    assert borrowed_notices(decoder, packing=False) == []
    (sentence,) = borrowed_notices(decoder, packing=True)
    assert sentence.startswith("Packed rows run document by document, because BloomForCausalLM computes attention")


class FakePlan:
    layers, keep, kernels = "op by op", ("input", "all"), "reference"
    ladder = Ladder(keep, offload=False, layers=layers)


def test_the_plans_rungs_are_set_on_the_classes_own_layers_and_taken_back(decoder):
    set_up_layers(decoder, FakePlan())
    assert [block.recompute for block in decoder.blocks] == [True, False]
    take_apart(decoder)
    assert [block.recompute for block in decoder.blocks] == [False, False]


def test_a_quantised_folder_of_such_a_model_is_refused_with_what_to_do(base, tmp_path):
    config = base.config | {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    with pytest.raises(ModelError, match=r"read for native architectures only.*unquantised model"):
        read_facts(tmp_path, config)
