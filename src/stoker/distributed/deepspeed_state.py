"""Weights and optimiser states that DeepSpeed holds in flat parts, as whole tensors by name and back."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stoker.distributed.optimizer_state import Numbers
from stoker.errors import CheckpointError


class _Expanded(Mapping[str, Tensor]):
    """Tensors of a state, those with a scale (`exp_avg_scale:NAME` of `exp_avg:NAME`) as what they stand for."""

    def __init__(self, tensors: Mapping[str, Tensor], expand: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._tensors, self._expand = tensors, expand

    def __getitem__(self, key: str) -> Tensor:
        entry, _, name = key.partition(":")
        scale = f"{entry}_scale:{name}"
        if scale in self._tensors:
            return self._expand(self._tensors[key], self._tensors[scale])
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return (key for key in self._tensors if not key.partition(":")[0].endswith("_scale"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class ZeroParts:
    """What `zero`, the optimiser of an engine in `stage`, holds of the `trained` weights.

    The parts are fp32; a rank's are flat tensors, several weights in each. Every method that returns or takes whole
    tensors must be called on every rank.
    """

    def __init__(self, zero: Any, stage: int, trained: Mapping[str, nn.Parameter]) -> None:
        self._zero, self._stage, self._trained = zero, stage, trained

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Returns a weight's shape, which in stage 3 its tensor has only while it is gathered."""
        return getattr(parameter, "ds_shape", parameter.shape)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """Returns the whole weight on the device."""
        if self._stage < 3:
            return parameter.detach()
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def optimizer_state(self, keep: Callable[[Tensor], Tensor]) -> tuple[dict[str, Tensor], Numbers]:
        """Returns the state as `optimizer_state.flatten` does; `keep` is applied to each tensor as it comes.

        Averages are fp32, in whatever the optimiser keeps them.
        """
        with self._in_fp32():
            return self._optimizer_state(keep)

    def _optimizer_state(self, keep: Callable[[Tensor], Tensor]) -> tuple[dict[str, Tensor], Numbers]:
        from deepspeed.utils import safe_get_full_optimizer_state

        states = self._zero.optimizer.state
        flat = next((part for part in self._flat_parts() if states.get(part)), None)
        if flat is None:
            return {}, {}
        tensors: dict[str, Tensor] = {}
        numbers: Numbers = {}
        for name, parameter in self._trained.items():
            for entry, value in states[flat].items():
                if isinstance(value, Tensor) and value.shape == flat.shape:
                    whole: Any = safe_get_full_optimizer_state(parameter, entry)
                    tensors[f"{entry}:{name}"] = keep(whole.view(self.shape(parameter)))
                elif isinstance(value, Tensor):
                    tensors[f"{entry}:{name}"] = value.detach().clone()
                elif value is not None:
                    numbers.setdefault(name, {})[entry] = value
        return tensors, numbers

    @contextmanager
    def _in_fp32(self) -> Generator[None]:
        """Within it the state's averages are fp32, also those that the optimiser keeps in less: DeepSpeed gathers
        nothing else. For that time they take what they would in fp32."""
        optimizer = self._zero.optimizer
        if not hasattr(optimizer, "expand"):
            yield
            return
        held = [part for part in self._flat_parts() if optimizer.state.get(part)]
        for part in held:
            optimizer.expand(part)
        self._link(held)
        try:
            yield
        finally:
            for part in held:
                optimizer.compress(part)
            self._link(held)

    def _link(self, held: Sequence[Tensor]) -> None:
        """Tells DeepSpeed's stages 1 and 2 of the state's tensors, parts of which they keep with each weight."""
        if self._stage < 3 and held:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Takes whole weights, which every rank has, by the names of the trained ones."""
        from deepspeed.runtime.zero import GatheredParameters

        for name, parameter in self._trained.items():
            if self._stage < 3:
                parameter.data.copy_(weights[name])
                continue
            with GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(weights[name])
            self._set_part(parameter, weights[name], None)
        if self._stage < 3:
            self._zero.refresh_fp32_params()

    def load_optimizer_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes the state that `optimizer_state` returned, here or under another strategy.

        Raises:
            CheckpointError: it speaks of a parameter that is not trained here.
        """
        unknown = {key.partition(":")[2] for key in tensors} | set(numbers)
        for name in sorted(unknown - set(self._trained)):
            raise CheckpointError(
                f"The checkpoint holds optimiser state of {name}, which is not trained here.",
                fix="Resume with the model and adapter settings that the run began with.",
            )
        if hasattr(self._zero.optimizer, "expanded"):
            tensors = _Expanded(tensors, self._zero.optimizer.expanded)
        state = self._zero.optimizer.state
        state.clear()
        if not tensors and not numbers:
            return
        first = next(iter(self._trained))
        shape = self.shape(self._trained[first])
        pairs = (key.partition(":") for key in tensors)
        ours = {entry: tensors[f"{entry}:{name}"] for entry, _, name in pairs if name == first}
        shaped = [entry for entry, value in ours.items() if value.shape == shape]
        for part in self._flat_parts():
            state[part] = {entry: torch.zeros_like(part) for entry in shaped}
            for entry, value in ours.items():
                if entry not in shaped:
                    state[part][entry] = value.to(self._step_device(part), copy=True)
            state[part] |= numbers.get(first, {})
        self._link(self._flat_parts())
        for name, parameter in self._trained.items():
            for entry in shaped:
                self._set_part(parameter, tensors[f"{entry}:{name}"], entry)

    def _flat_parts(self) -> Sequence[Tensor]:
        if self._stage < 3:
            return self._zero.single_partition_of_fp32_groups
        return self._zero.fp32_partitioned_groups_flat

    def _step_device(self, part: Tensor) -> torch.device:
        """Where AdamW counts its steps: on the CPU unless it is fused."""
        fused = any(group.get("fused") or group.get("capturable") for group in self._zero.optimizer.param_groups)
        return part.device if fused else torch.device("cpu")

    def _set_part(self, parameter: Any, whole: Tensor, entry: str | None) -> None:
        """Puts this rank's part of a whole weight (`entry` None) or entry of the state where the optimiser has it."""
        from deepspeed.utils import (
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self._stage < 3:
            safe_set_full_optimizer_state(parameter, whole, entry)
            return
        size, rank = parameter.ds_tensor.ds_numel, parameter.ds_zero_partition_rank
        part = whole.new_zeros(size)  # the last ranks' parts are padded
        mine = whole.flatten()[rank * size : (rank + 1) * size]
        part[: mine.numel()] = mine
        if entry is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, entry)
