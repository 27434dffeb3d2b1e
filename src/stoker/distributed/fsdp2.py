"""Many devices that each hold a part of every weight: torch's `fully_shard` on the model's own layers.

Zhao et al. 2023, arXiv:2304.11277; each layer's weights are gathered for its forward and its backward, gradients are
reduced to the part that their rank holds, and the optimiser steps on parts. Frozen weights in a low-bit format are
gathered as the bytes that they are.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from stoker.distributed.ranks import Ranks
from stoker.distributed.single import SingleDevice


class Sharded(SingleDevice):
    """The `Strategy` of `ranks` that share the weights of `model`, layer by layer (`layers`, in their order).

    `reshard_after_forward`: a layer's weights are let go after its forward and gathered again for its backward.
    `gathered_dtype`: that in which trained fp32 weights are gathered (None: as they are). `cpu_offload`: parts wait on
    the host, where the optimiser steps. Gradients are reduced in fp32, after every micro-batch: they are never whole.
    """

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device | str = "cpu",
        *,
        model: nn.Module,
        layers: Sequence[nn.Module],
        precision: str = "fp32",
        on_discard: Sequence[Callable[[], None]] = (),
        reshard_after_forward: bool = True,
        gathered_dtype: torch.dtype | None = None,
        cpu_offload: bool = False,
    ) -> None:
        if precision == "fp16":
            raise ValueError("parts of gradients in fp16 have no common loss scale: use bf16 or fp32")
        super().__init__(device, precision=precision, on_discard=on_discard, ranks=ranks)
        self._model, self._layers = model, layers
        self._mesh = init_device_mesh(self.device.type, (ranks.world_size,))
        self._options: dict[str, Any] = {
            "mesh": self._mesh,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=gathered_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
        }
        self._reshard_after_forward = reshard_after_forward

    def _place(self, task: nn.Module) -> nn.Module:
        for layer in self._layers:
            _buffers_to_parameters(layer)
            fully_shard(layer, reshard_after_forward=self._reshard_after_forward, **self._options)
            if hasattr(layer, "recomputed"):
                # The decoder calls it in place of the layer where that is run again in the backward.
                register_fsdp_forward_method(layer, "recomputed")
        # What is left, embedding and head, is read outside of the model's forward too: it stays gathered until the
        # backward has ended.
        fully_shard(self._model, reshard_after_forward=False, **self._options)
        for name, buffer in self._model.named_buffers():
            owner, _, short = name.rpartition(".")
            self._model.get_submodule(owner)._buffers[short] = buffer.to(self.device)
        return task

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _kept(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        # One at a time on the device; the first rank alone keeps it, on the host.
        whole = self._on_device(tensor).full_tensor()
        return whole.cpu() if self.rank == 0 else whole.new_empty(0, device="cpu")

    def _like(self, parameter: nn.Parameter, tensor: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor):
            return tensor
        whole = tensor.to(parameter.device_mesh.device_type, parameter.dtype)
        # Every rank has the whole tensor: each takes its part, and nothing is sent.
        part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return part.to(parameter.device)

    def _on_device(self, tensor: DTensor) -> DTensor:
        return cast("DTensor", tensor.to(self.device)) if tensor.device.type != self.device.type else tensor

    @contextmanager
    def gathered(self, *, trained_only: bool) -> Generator[None]:
        """Within it the first rank's module holds whole parameters on the host (of the trained ones if told so)."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        held: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for module in self._model.modules():
                for name, parameter in list(module._parameters.items()):
                    if not isinstance(parameter, DTensor) or (trained_only and not parameter.requires_grad):
                        continue
                    whole = self._kept(parameter.detach())
                    if self.rank == 0:
                        held.append((module, name, cast("nn.Parameter", parameter)))
                        module._parameters[name] = nn.Parameter(whole, requires_grad=False)
            yield
        finally:
            for module, name, parameter in held:
                module._parameters[name] = parameter


def _buffers_to_parameters(layer: nn.Module) -> None:
    """Makes parameters of the stored forms of frozen weights: of buffers every rank would keep the whole.

    Only those of modules with a `num_bytes` (the quant room's): other buffers are tables that a forward reads whole.
    """
    for module in layer.modules():
        if not hasattr(module, "num_bytes"):
            continue
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.dim() > 0:
                del module._buffers[name]
                module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
