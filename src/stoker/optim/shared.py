"""Tensors of which ranks share the rows: the part that a rank holds, and states that are shared as their weight is."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard


def held(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this rank has."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def zeros_in_rows_of(parameter: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns zeros of `shape`, of which each rank holds the rows that it holds of `parameter`.

    `shape` has as many rows, whatever else it has.
    """
    if not isinstance(parameter, DTensor):
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    local = parameter.to_local()
    part = torch.zeros((local.shape[0], *shape[1:]), dtype=dtype, device=local.device)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def sum_over_parts(parameters: list[Tensor], values: list[Tensor]) -> None:
    """Adds up in place, over the ranks that share the rows of each parameter, what each has of its fp32 `values`.

    One reduction, however many parameters; what is not shared is left alone.
    """
    pairs = zip(parameters, values, strict=True)
    shared = [(parameter, value) for parameter, value in pairs if isinstance(parameter, DTensor)]
    if not shared:
        return
    first = shared[0][0]
    mesh = first.device_mesh
    (axis,) = (index for index, placement in enumerate(first.placements) if isinstance(placement, Shard))
    # Parts that wait on the host are summed where the ranks' devices are.
    flat = torch.cat([value.flatten() for _, value in shared]).to(mesh.device_type)
    dist.all_reduce(flat, group=mesh.get_group(axis))
    for (_, value), total in zip(shared, flat.split([value.numel() for _, value in shared]), strict=True):
        value.copy_(total.view_as(value))
