"""Many devices that each hold a part of every weight: torch's `fully_shard` on the model's own layers.

Zhao et al. 2023, arXiv:2304.11277; each layer's weights are gathered for its forward and its backward, gradients are
reduced to the part that their rank holds, and the optimiser steps on parts. Frozen weights in a low-bit format are
gathered as the bytes that they are. Of trained fp32 weights under autocast, what products alone read is cast before it
is gathered: half the bytes pass, and no product has to cast a whole weight; its values are the same. Where a weight has
one part alone (one device, or as many replicas as devices), frozen ones are not shared: to gather them is to copy them.
"""

import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from stoker import compat
from stoker.distributed import optimizer_state
from stoker.distributed.ranks import Ranks
from stoker.distributed.single import SingleDevice
from stoker.distributed.strategy import Rows, StepResult, StrategyState

Hold = Callable[[nn.Module, str], tuple[Tensor, int]]
"""From a tensor of a module, by name, to the memory of the rows that this rank keeps and the number of the first."""


class Fill(Protocol):
    """What gives a model on the meta device its weights, in the memory that `hold` gives for them.

    Memory is taken for all of them first; with `filled`, which is called when the values of one are there, for one
    weight at a time.
    """

    def __call__(self, hold: Hold, filled: Callable[[], None] | None = None) -> None:
        """Reads the weights."""


@dataclass(frozen=True)
class Sharding:
    """How weights are shared.

    `reshard_after_forward`: a layer's weights are let go after its forward and gathered again for its backward.
    `replicas`: ranks form so many groups, each of which holds the whole model in parts (hybrid sharding): weights are
    gathered within a group, gradients also averaged between groups. Ranks of a group follow one another, so that a
    group is a machine where there are as many groups as machines. `cpu_offload`: parts wait on the host, where the
    optimiser steps. `param_dtype`: that in which trained weights are gathered (None: as they are kept, but for
    `product_weights`), `reduce_dtype` that in which gradients are reduced.
    """

    reshard_after_forward: bool = True
    replicas: int = 1
    cpu_offload: bool = False
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype = torch.float32


class Sharded(SingleDevice):
    """The `Strategy` of `ranks` that share the weights of `model`, layer by layer (`layers`, in their order).

    A model on the meta device gets its weights from `fill` once it is shared, each rank the rows that it keeps.
    Gradients are reduced after every micro-batch: they are never whole.
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
        sharding: Sharding | None = None,
        fill: Fill | None = None,
    ) -> None:
        super().__init__(device, precision=precision, on_discard=on_discard, ranks=ranks)
        self._model, self._layers, self._fill = model, layers, fill
        self._sharding = sharding = sharding or Sharding()
        if ranks.world_size % sharding.replicas:
            raise ValueError(f"{ranks.world_size} ranks are not {sharding.replicas} equal groups")
        shape, names = (ranks.world_size,), ("shard",)
        if sharding.replicas > 1:
            shape, names = (sharding.replicas, ranks.world_size // sharding.replicas), ("replicate", "shard")
        self._mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        self._num_parts, self._part = shape[-1], ranks.rank % shape[-1]
        self._options: dict[str, Any] = {"mesh": self._mesh}
        if sharding.cpu_offload:
            self._options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")

    @property
    def part(self) -> int:
        """Which part of each weight this rank holds and steps, from 0."""
        return self._part

    def _place(self, task: nn.Module) -> nn.Module:
        # Said of hidden states that a class slices out of others; nothing here writes into them (torch 2.13).
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        self._whole_ones = set[nn.Parameter]()
        self._plain: dict[nn.Parameter, nn.Parameter] = {}
        if self._holds_all:
            self._whole_ones.update(one for one in self._model.parameters() if not one.requires_grad)
        else:
            for layer in self._layers:
                buffers_to_parameters(layer)
        # What a group trains is kept in one dtype and gathered in one. So the layers' norms, and whatever else of them
        # stays fp32 (a ten-thousandth of the weights), go with embedding and head; and these have groups of their own
        # where they are in bf16.
        apart = self._mixed() or self._products()
        if apart:
            tables = self._tables(apart)
            # First, that it finds norms in layers that are not shared yet, and so a head's bias.
            self._share_rest(ignored_params={*apart, *tables, *self._whole_ones})
            self._share_tables(tables)
        rest = self._whole_ones.union(one for one in self._model.parameters() if isinstance(one, DTensor))
        policy = self._policy(self._sharding.param_dtype or (self._dtype if apart else None))
        reshards = self._sharding.reshard_after_forward
        for layer in self._layers:
            with compat.bytes_may_be_shared():
                fully_shard(
                    layer, reshard_after_forward=reshards, mp_policy=policy, ignored_params=rest, **self._options
                )
            if hasattr(layer, "recomputed"):
                # The decoder calls it in place of the layer where that is run again in the backward.
                register_fsdp_forward_method(layer, "recomputed")
        if not apart:
            self._share_rest(ignored_params=self._whole_ones)
        if self._fill is not None:
            with torch.no_grad():
                self._fill(self._hold)
        for parameter in self._model.parameters():
            if not isinstance(parameter, DTensor):  # moved in place: modules may share it
                parameter.data = parameter.data.to(self.device)
        for name, buffer in self._model.named_buffers():
            owner, _, short = name.rpartition(".")
            self._model.get_submodule(owner)._buffers[short] = buffer.to(self.device)
        return task

    @property
    def _holds_all(self) -> bool:
        """Whether each weight has one part, on the device.

        Then frozen weights are not shared: they would be copied before each layer's work (16.7 of 495 ms a step of an
        8B's adapter on one H200), and be there twice.
        """
        return self._num_parts == 1 and not self._sharding.cpu_offload

    def _stepped(self, parameter: nn.Parameter) -> nn.Parameter:
        """A part that is the whole is stepped as a plain tensor in the same memory: each operation on a DTensor takes
        its time on the host, which a GPU waits for in a step (a CPU: 8 ms for the 256 of a small adapter)."""
        if not self._holds_all or not isinstance(parameter, DTensor):
            return parameter
        self._plain[parameter] = plain = nn.Parameter(parameter.to_local().detach())
        return plain

    def step(self, learning_rate: float, *, max_gradient_norm: float | None) -> StepResult:
        """As `SingleDevice.step`."""
        with torch.no_grad():
            for parameter, plain in self._plain.items():
                if isinstance(parameter.grad, DTensor):
                    plain.grad, parameter.grad = parameter.grad.to_local(), None
        return super().step(learning_rate, max_gradient_norm=max_gradient_norm)

    def _mixed(self) -> list[nn.Parameter]:
        """Returns the layers' weights that are not fp32, where a layer or the rest trains some of both kinds."""
        of_layers = [set(layer.parameters()) for layer in self._layers]
        rest = set(self._model.parameters()).difference(*of_layers)
        if not any(map(_trains_both_kinds, [*of_layers, rest])):
            return []
        return [one for layer in self._layers for one in layer.parameters() if one.dtype != torch.float32]

    def _tables(self, apart: Sequence[nn.Parameter]) -> dict[nn.Parameter, list[nn.Module]]:
        """Returns what is not fp32 among the rest, where that trains some of both kinds, with the modules it is in: a
        tied table is in two."""
        rest, tables = set(self._model.parameters()).difference(apart, self._whole_ones), {}
        if _trains_both_kinds(rest):
            for module in self._model.modules():
                for parameter in module.parameters(recurse=False):
                    if parameter in rest and parameter.dtype != torch.float32:
                        tables.setdefault(parameter, []).append(module)
        return tables

    def _share_tables(self, tables: Mapping[nn.Parameter, list[nn.Module]]) -> None:
        """Shares tables in groups of their own, which stay gathered as the rest does."""
        policy, firsts = self._policy(self._sharding.param_dtype), []
        for modules in {tuple(modules): modules for modules in tables.values()}.values():
            others = self._whole_ones.union(
                one for each in modules for one in each.parameters() if isinstance(one, DTensor)
            )
            fully_shard(modules, reshard_after_forward=False, mp_policy=policy, ignored_params=others, **self._options)
            firsts.append(cast("FSDPModule", modules[0]))

        def gather(*_: object) -> None:
            for table in firsts:  # the loss reads the head's weight without a call of the head
                table.unshard()

        if firsts:
            self._model.register_forward_pre_hook(gather)

    def _products(self) -> list[nn.Parameter]:
        """Returns the layers' weights that are cast before they are gathered; none where it is told how to gather."""
        if self._dtype is None or self._sharding.param_dtype is not None:
            return []
        found = [one for layer in self._layers for one in product_weights(layer) if one.dtype == torch.float32]
        # Beside an adapter they are frozen, and in the compute type or bytes already.
        return found if any(one.requires_grad for one in found) else []

    def _share_rest(self, **options: Any) -> None:
        """Shares what is in no layer's group: embedding and head are read outside of the model's forward too, so it
        stays gathered until the backward has ended."""
        policy = self._policy(self._sharding.param_dtype)
        fully_shard(self._model, reshard_after_forward=False, mp_policy=policy, **self._options, **options)

    def _policy(self, param_dtype: torch.dtype | None) -> MixedPrecisionPolicy:
        reduce_dtype = self._sharding.reduce_dtype
        return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)

    def _hold(self, module: nn.Module, name: str) -> tuple[Tensor, int]:
        """Gives the part that this rank keeps of a tensor without memory some; see `Hold`."""
        parameter = module._parameters.get(name)
        if not isinstance(parameter, DTensor):
            memory = torch.empty_like(getattr(module, name), device=self.device)
            if parameter is None:
                module._buffers[name] = memory
            else:
                module._parameters[name] = nn.Parameter(memory, requires_grad=parameter.requires_grad)
            return memory, 0
        memory = torch.empty_like(parameter.to_local(), device="cpu" if self._sharding.cpu_offload else self.device)
        part = _part_of(parameter, memory, parameter.shape)
        module._parameters[name] = nn.Parameter(part, requires_grad=parameter.requires_grad)
        return memory, self._first_row(parameter)

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _kept(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        # One at a time on the device; the first rank alone keeps it, on the host.
        whole = self._on_device(tensor).full_tensor()
        return whole.cpu() if self.rank == 0 else whole.new_empty(0, device="cpu")

    def shared_state(self) -> StrategyState:
        """Returns the state with the part of each tensor that this rank holds."""
        if self._holds_all:
            return super().shared_state()
        tensors, numbers = optimizer_state.flatten(self._optimizer, self._trained)
        weights = {name: parameter.detach() for name, parameter in self._trained.items()}
        return StrategyState(weights, tensors, self._values(numbers))

    def _taken(self, tensors: Mapping[str, Tensor], name: str, parameter: nn.Parameter) -> Tensor:
        """The rows of a tensor of a state that this rank holds of `parameter`, which has as many."""
        if not isinstance(parameter, DTensor):
            return tensors[name]
        local = parameter.to_local()
        first = self._first_row(parameter)
        stop = first + (local.shape[0] if local.numel() else 0)
        rows = tensors.rows(name, first, stop) if isinstance(tensors, Rows) else tensors[name][first:stop]
        return _part_of(parameter, rows.to(local.device), torch.Size(optimizer_state.shape_of(tensors, name)))

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """As `SingleDevice.load_weights`."""
        self.let_go()  # what an evaluation left gathered would be read again as it was
        super().load_weights(weights)

    def let_go(self) -> None:
        """Frees what is gathered: layers that stay so until their backward have none after an evaluation."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _first_row(self, parameter: DTensor) -> int:
        """The first row of a parameter that this rank holds: torch.chunk's parts are as long as the first but the last
        ones."""
        return min(-(-parameter.shape[0] // self._num_parts) * self._part, parameter.shape[0])

    def _on_device(self, tensor: DTensor) -> DTensor:
        return cast("DTensor", tensor.to(self.device)) if tensor.device.type != self.device.type else tensor

    @contextmanager
    def gathered(self, *, trained_only: bool) -> Generator[None]:
        """Within it the first rank's module holds whole parameters on the host (of the trained ones if told so)."""
        self.let_go()
        held: list[tuple[nn.Module, str, nn.Parameter]] = []
        whole: dict[int, nn.Parameter] = {}  # one that several modules share is gathered once, and stays one
        try:
            for module in self._model.modules():
                for name, parameter in list(module._parameters.items()):
                    if not isinstance(parameter, DTensor) or (trained_only and not parameter.requires_grad):
                        continue
                    if id(parameter) not in whole:
                        whole[id(parameter)] = nn.Parameter(self._kept(parameter.detach()), requires_grad=False)
                    if self.rank == 0:
                        held.append((module, name, cast("nn.Parameter", parameter)))
                        module._parameters[name] = whole[id(parameter)]
            yield
        finally:
            for module, name, parameter in held:
                module._parameters[name] = parameter


def _part_of(whole: DTensor, local: Tensor, shape: torch.Size) -> DTensor:
    """Returns a tensor of `shape` whose rows are shared as those of `whole` are, and of which this rank holds `local`.

    It is contiguous, as the parts of what `fully_shard` shares are.
    """
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, whole.device_mesh, whole.placements, run_check=False, shape=shape, stride=stride)


def _trains_both_kinds(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether some of those that are trained are fp32, and others are not."""
    return len({parameter.dtype == torch.float32 for parameter in parameters if parameter.requires_grad}) > 1


def product_weights(layer: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that a layer's modules name as their `product_weights`.

    Only matrix products read them, which autocast or a kernel casts to the compute type; so it does not matter to any
    value whether that happens before or after they are gathered. Modules of other libraries name none.
    """
    named = ((module, name) for module in layer.modules() for name in getattr(module, "product_weights", ()))
    weights = (module._parameters.get(name) for module, name in named)
    return [weight for weight in weights if weight is not None]


def buffers_to_parameters(layer: nn.Module) -> None:
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
