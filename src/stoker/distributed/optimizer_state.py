"""An optimiser's state as flat named tensors and plain numbers, by parameter name instead of by position."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stoker.distributed.strategy import Rows
from stoker.errors import CheckpointError

Numbers = dict[str, dict[str, float | int | bool]]


def flatten(
    optimizer: torch.optim.Optimizer, named_parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], Numbers]:
    """Returns tensors keyed `entry:parameter name`, and numbers as `{parameter name: {entry: value}}`.

    Rates and other group options are left out: they come from the run's configuration, anew at every step.
    """
    tensors: dict[str, Tensor] = {}
    numbers: Numbers = {}
    for name, parameter in named_parameters.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{entry}:{name}"] = value.detach()
            elif value is not None:
                numbers.setdefault(name, {})[entry] = value
    return tensors, numbers


def restore(
    optimizer: torch.optim.Optimizer,
    named_parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Mapping[str, Any]],
    *,
    take: Callable[[Mapping[str, Tensor], str, nn.Parameter], Tensor] = lambda tensors, name, parameter: tensors[name],
) -> None:
    """Puts back what `flatten` returned, copied to each parameter's device.

    `take` returns of an entry that has a row for each of its parameter's, by its name, what its rank keeps of it.
    Those are the ones that the optimiser says (`is_in_rows`), or else those with the parameter's shape.

    Raises:
        CheckpointError: the state speaks of a parameter that is not trained here.
    """
    optimizer.state.clear()
    for key in tensors:
        entry, _, name = key.partition(":")
        parameter = _parameter(named_parameters, name)
        held = take(tensors, key, parameter) if _is_in_rows(optimizer, tensors, key, parameter) else tensors[key]
        optimizer.state[parameter][entry] = held.to(_device(optimizer, parameter, entry), copy=True)
    for name, entries in numbers.items():
        optimizer.state[_parameter(named_parameters, name)].update(entries)


def _is_in_rows(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], key: str, parameter: nn.Parameter
) -> bool:
    says = getattr(optimizer, "is_in_rows", None)
    if says is None:
        return shape_of(tensors, key) == tuple(parameter.shape)
    return says(key.partition(":")[0], parameter)


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Returns the shape of the tensor `name`, which need not be read for it."""
    return tensors.shape(name) if isinstance(tensors, Rows) else tuple(tensors[name].shape)


def _parameter(named_parameters: Mapping[str, nn.Parameter], name: str) -> nn.Parameter:
    if name not in named_parameters:
        raise CheckpointError(
            f"The checkpoint holds optimiser state of {name}, which is not trained here.",
            fix="Resume with the model and adapter settings that the run began with.",
        )
    return named_parameters[name]


def _device(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, entry: str) -> torch.device:
    """AdamW keeps its step count on the CPU unless it is fused or captured in a graph; all else is with the weights."""
    if entry != "step":
        return parameter.device
    group = next(group for group in optimizer.param_groups if any(parameter is other for other in group["params"]))
    on_device = group.get("fused") or group.get("capturable")
    return parameter.device if on_device else torch.device("cpu")
