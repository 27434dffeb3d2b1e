import pytest
import torch

from stoker.adapters.lora import add_lora
from stoker.arch import arithmetic, families
from stoker.compose.updates import eight_bit
from stoker.config.schema import Adafactor, AdamW, AdamW8bit, Adapter, Muon, Sgd
from stoker.models import native
from stoker.optim import optimizers
from stoker.plan.states import bytes_each, state_bytes

SHAPE = {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 512}
LLAMA = {
    "model_type": "llama",
    **SHAPE,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
MIXTURE = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def held(model, kind):
    """Bytes that the optimiser keeps after a step."""
    optimizer = optimizers.build(
        model.named_parameters(), kind=kind, learning_rate=1e-3, eight_bit=eight_bit("reference")
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in states if isinstance(value, torch.Tensor))


def test_optimizers_differ_by_their_state():
    assert bytes_each(AdamW()) == 8
    assert 2 < bytes_each(AdamW8bit()) < 2.1
    assert bytes_each(AdamW8bit(), Adapter(rank=16)) == 2 + (8 / 256 + 8 / 16) / 2
    assert bytes_each(Sgd()) == 0
    assert bytes_each(Sgd(momentum=0.9)) == 4
    assert bytes_each(Adafactor()) < 0.1
    assert bytes_each(Adafactor(), Adapter(rank=16)) == 0.25
    assert bytes_each(Muon()) <= 8


@pytest.mark.parametrize("values", [LLAMA, MIXTURE])
@pytest.mark.parametrize(("optimizer", "within"), [(AdamW(), 0.001), (AdamW8bit(), 0.02), (Adafactor(), 0.1)])
def test_what_is_counted_is_what_the_optimizer_keeps(values, optimizer, within):
    spec = families.read(values, "config.json")
    model = native.build(spec, seed=0)
    trained = arithmetic.num_parameters(spec)
    # Routers and the like count as vectors, each of whose numbers Adafactor keeps.
    assert state_bytes(spec, optimizer, trained) == pytest.approx(held(model, optimizer.kind), rel=within)


@pytest.mark.parametrize(("optimizer", "within"), [(AdamW8bit(), 0.1), (Adafactor(), 0.35)])
def test_those_of_adapters_follow_from_their_rank(optimizer, within):
    spec = families.read(LLAMA, "config.json")
    model = native.build(spec, seed=0)
    add_lora(model, rank=16, alpha=16)
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    counted = state_bytes(spec, optimizer, trained, adapter=Adapter(rank=16))
    assert counted == pytest.approx(held(model, optimizer.kind), rel=within)


def test_ranks_share_states_but_for_adafactors_means_of_columns(llama_8b):
    trained = arithmetic.num_parameters(llama_8b)
    for optimizer in (AdamW(), AdamW8bit(), Sgd(momentum=0.9)):
        whole = state_bytes(llama_8b, optimizer, trained)
        assert state_bytes(llama_8b, optimizer, trained, shards=8) == whole / 8
    whole = state_bytes(llama_8b, Adafactor(), trained)
    part = state_bytes(llama_8b, Adafactor(), trained, shards=8)
    columns = 32 * (3 * 4096 + 14336) + 2 * 4096
    assert part == pytest.approx(4 * columns + (whole - 4 * columns) / 8)
    assert whole < 0.002 * 4 * trained
