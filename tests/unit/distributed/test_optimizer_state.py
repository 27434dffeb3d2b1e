import pytest
import torch
from torch import nn

from stoker.distributed import optimizer_state
from stoker.errors import CheckpointError


def stepped(parameter, **options):
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, **options)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_entries_are_keyed_by_parameter_name():
    parameter = nn.Parameter(torch.zeros(3))
    tensors, numbers = optimizer_state.flatten(stepped(parameter), {"layer.weight": parameter})
    assert set(tensors) == {"step:layer.weight", "exp_avg:layer.weight", "exp_avg_sq:layer.weight"}
    assert numbers == {}


def test_restoring_copies_so_that_the_saved_tensors_stay_as_they_are():
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = stepped(parameter)
    tensors, numbers = optimizer_state.flatten(optimizer, {"layer.weight": parameter})
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    optimizer_state.restore(optimizer, {"layer.weight": parameter}, saved, numbers)
    optimizer.step()
    assert saved["step:layer.weight"] == 1
    assert optimizer.state[parameter]["step"] == 2


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
def test_step_count_is_where_adamw_wants_it(fused, device):
    parameter = nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = torch.optim.AdamW([parameter], foreach=False)
    optimizer.param_groups[0]["fused"] = fused
    tensors = {"step:w": torch.tensor(4.0), "exp_avg:w": torch.zeros(3)}
    optimizer_state.restore(optimizer, {"w": parameter}, tensors, {})
    assert optimizer.state[parameter]["step"].device.type == device
    assert optimizer.state[parameter]["exp_avg"].device.type == "meta"


@pytest.mark.parametrize("state", [({"exp_avg:gone": torch.zeros(3)}, {}), ({}, {"gone": {"step": 1}})])
def test_state_of_a_parameter_that_is_not_trained_is_refused(state):
    parameter = nn.Parameter(torch.zeros(3))
    with pytest.raises(CheckpointError, match="optimiser state of gone"):
        optimizer_state.restore(torch.optim.AdamW([parameter]), {"w": parameter}, *state)
