"""Weights dealt out to the ranks of DeepSpeed's stage 3 as they are read, so that no device holds the whole model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stoker.distributed.fsdp2 import Fill
from stoker.distributed.strategy import MakeOptimizer


def deal_out(
    root: nn.Module,
    settings: Mapping[str, Any],
    *,
    device: torch.device,
    fill: Fill | None = None,
) -> None:
    """Leaves each rank its part of every parameter of `root`, by DeepSpeed's `settings`, and moves buffers to `device`.

    `fill` gives those on the meta device their values. Ranks that were given other values get those of the first.
    """
    dealer = _Dealer(settings, device)
    if fill is not None:
        with torch.no_grad():
            fill(dealer.hold, dealer.deal)
    dealer.deal(*root.parameters())
    for name, buffer in root.named_buffers():
        owner, _, short = name.rpartition(".")
        root.get_submodule(owner)._buffers[short] = buffer.to(device)


class _Dealer:
    """Gives memory for the whole tensors of one weight at a time, and deals them out once their values are there."""

    def __init__(self, settings: Mapping[str, Any], device: torch.device) -> None:
        self._settings, self._device = settings, device
        self._first: Any = None
        self._filled: list[nn.Parameter] = []

    def hold(self, module: nn.Module, name: str) -> tuple[Tensor, int]:
        """Gives a tensor without memory some, all of its rows; see `Hold`."""
        memory = torch.empty_like(getattr(module, name), device=self._device)
        parameter = module._parameters.get(name)
        if parameter is None:
            module._buffers[name] = memory
        else:
            held = nn.Parameter(memory, requires_grad=parameter.requires_grad)
            module._parameters[name] = held
            self._filled.append(held)
        return memory, 0

    def deal(self, *parameters: nn.Parameter) -> None:
        """Leaves each rank its part of what has been filled, and of `parameters`."""
        import deepspeed

        waiting, self._filled = [*self._filled, *parameters], []
        waiting = [parameter for parameter in waiting if not hasattr(parameter, "ds_id")]
        if waiting and self._first is None:
            self._first = waiting.pop(0)
            deepspeed.zero.Init(module=nn.ParameterList([self._first]), config_dict_or_path=dict(self._settings))
        if waiting:
            self._first.convert_to_zero_parameters(param_list=waiting)


def make_for_parts(make_optimizer: MakeOptimizer, trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Returns the optimiser of `trained`, whose tensors have no shape while they are dealt out.

    It is made of stand-ins with their shapes and no memory, because its groups go by shape.
    """
    stand_ins = {name: _stand_in(parameter) for name, parameter in trained.items()}
    of = {id(stand_ins[name]): parameter for name, parameter in trained.items()}
    optimizer = make_optimizer(stand_ins.items())
    if hasattr(optimizer, "steps_flat_parts"):
        setattr(optimizer, "steps_flat_parts", True)  # noqa: B010 - most optimisers have no such thing
    for group in optimizer.param_groups:
        group["params"] = [of[id(stand_in)] for stand_in in group["params"]]
    return optimizer


def _stand_in(parameter: Any) -> nn.Parameter:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return nn.Parameter(torch.empty((), dtype=parameter.dtype, device=parameter.device).expand(shape))
