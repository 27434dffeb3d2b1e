from functools import partial

import pytest
import torch
from torch import nn

from stoker.compose.updates import eight_bit
from stoker.optim import optimizers

build_any = partial(optimizers.build, eight_bit=eight_bit("reference"))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(96, 64)
        self.hidden = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 96, bias=False)

    def loss(self):
        ids = torch.arange(96)
        return nn.functional.cross_entropy(self.head(self.norm(self.hidden(self.embedding(ids)))), ids)


def take_steps(optimizer, model, count=3):
    for _ in range(count):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", optimizers.KINDS)
def test_every_kind_lowers_the_loss(kind):
    model = Model()
    optimizer = build_any(model.named_parameters(), kind=kind, learning_rate=0.5 if kind == "sgd" else 1e-2)
    before = model.loss().item()
    take_steps(optimizer, model)
    assert model.loss().item() < before - 0.05


def test_adamw_equals_torch_with_the_same_options():
    ours, theirs = Model(), Model()
    build = optimizers.build(
        ours.named_parameters(), kind="adamw", learning_rate=1e-2, betas=(0.8, 0.95), epsilon=1e-6, weight_decay=0.1
    )
    decayed = [theirs.hidden.weight, theirs.head.weight]
    others = [theirs.embedding.weight, theirs.hidden.bias, *theirs.norm.parameters()]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, foreach=False)
    take_steps(build, ours)
    take_steps(reference, theirs)
    for name, parameter in ours.named_parameters():
        # The fused kernel orders operations differently; three steps of 1e-2 in fp32 differ by a few ulp.
        torch.testing.assert_close(parameter, dict(theirs.named_parameters())[name], atol=1e-6, rtol=1e-5)
    assert build.param_groups[0]["fused"]


@pytest.mark.parametrize("kind", optimizers.KINDS)
def test_weight_decay_shrinks_matrices_and_leaves_norms_and_embeddings(kind):
    model = Model()
    optimizer = build_any(model.named_parameters(), kind=kind, learning_rate=0.1, weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in ("hidden.weight", "head.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name], atol=1e-6, rtol=1e-5, msg=name)


def test_frozen_parameters_are_left_out():
    model = Model()
    model.embedding.weight.requires_grad_(False)
    optimizer = optimizers.build(model.named_parameters(), kind="adamw", learning_rate=1e-2)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == 5
    assert not any(parameter is model.embedding.weight for parameter in held)


def test_adafactor_trains_at_the_rate_that_it_is_given():
    parameter = nn.Parameter(torch.full((4, 4), 0.01))
    optimizer = optimizers.build([("hidden.weight", parameter)], kind="adafactor", learning_rate=0.1)
    parameter.grad = torch.ones(4, 4)
    optimizer.step()
    # The first update has root mean square 1, so the weight moves by the rate, whatever the weight's own size.
    torch.testing.assert_close(parameter.detach(), torch.full((4, 4), 0.01 - 0.1), atol=1e-5, rtol=0)


class TestMuon:
    def build(self, model):
        return optimizers.build(model.named_parameters(), kind="muon", learning_rate=1e-2, momentum=0.9)

    def test_hidden_matrices_are_muons_and_the_rest_is_adamws(self):
        model = Model()
        muon, adamw = self.build(model).parts
        assert [parameter for group in muon.param_groups for parameter in group["params"]] == [model.hidden.weight]
        assert muon.param_groups[0]["momentum"] == 0.9
        assert sum(len(group["params"]) for group in adamw.param_groups) == 5

    def test_equals_its_two_parts_run_apart(self):
        ours, theirs = Model(), Model()
        take_steps(self.build(ours), ours)
        muon = torch.optim.Muon(
            [theirs.hidden.weight], lr=1e-2, momentum=0.9, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        others = [parameter for parameter in theirs.parameters() if parameter is not theirs.hidden.weight]
        adamw = torch.optim.AdamW(others, lr=1e-2, weight_decay=0.0, fused=True)
        for _ in range(3):
            theirs.zero_grad()
            theirs.loss().backward()
            muon.step()
            adamw.step()
        for ours_parameter, theirs_parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(ours_parameter, theirs_parameter)

    def test_state_dict_of_the_whole_goes_on_exactly(self):
        unbroken, broken = Model(), Model()
        take_steps(self.build(unbroken), unbroken, 4)
        first = self.build(broken)
        take_steps(first, broken, 2)
        second = self.build(broken)
        second.load_state_dict(first.state_dict())
        for group in second.param_groups:
            group["lr"] = 1e-2
        take_steps(second, broken, 2)
        for expected, parameter in zip(unbroken.parameters(), broken.parameters(), strict=True):
            assert torch.equal(expected, parameter)


def test_eight_bits_must_be_told_how_averages_are_kept():
    with pytest.raises(ValueError, match="eight_bit"):
        optimizers.build(Model().named_parameters(), kind="adamw_8bit", learning_rate=1e-3)


def test_unknown_kind_and_nothing_to_train_are_refused():
    with pytest.raises(ValueError, match="unknown optimiser 'adam'"):
        optimizers.build(Model().named_parameters(), kind="adam", learning_rate=1e-3)
    with pytest.raises(ValueError, match="no parameter"):
        optimizers.build([], kind="adamw", learning_rate=1e-3)


def test_parameters_may_have_a_multiple_of_the_rate():
    model = Model()
    scales = {"embedding.weight": 0.1, "head.weight": 0.1}

    optimizer = optimizers.build(
        model.named_parameters(),
        kind="adamw",
        learning_rate=1e-2,
        weight_decay=0.1,
        rate_scale=lambda name: scales.get(name, 1.0),
    )

    found = {
        name: (group.get("rate_scale", 1.0), group["weight_decay"])
        for name, parameter in model.named_parameters()
        for group in optimizer.param_groups
        if any(parameter is other for other in group["params"])
    }
    assert found == {
        "embedding.weight": (0.1, 0.0),
        "hidden.weight": (1.0, 0.1),
        "hidden.bias": (1.0, 0.0),
        "norm.weight": (1.0, 0.0),
        "norm.bias": (1.0, 0.0),
        "head.weight": (0.1, 0.1),
    }
