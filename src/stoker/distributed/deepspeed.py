"""Many devices under DeepSpeed's ZeRO: optimiser states, gradients and, in stage 3, weights in parts.

Rajbhandari et al. 2020, arXiv:1910.02054; offloaded to the host, Ren et al. 2021, arXiv:2101.06840, or to NVMe,
Rajbhandari et al. 2021, arXiv:2104.07857. DeepSpeed's engine reduces gradients, clips them and calls the run's own
optimiser on flat parts of the trained weights, so that must be one that treats each number by itself. Weights stay in
the number format that the run keeps them in, and products run under autocast as on one device: DeepSpeed's own bf16
and fp16 modes would cast the model, and stay off.
"""

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from stoker.distributed.deepspeed_deal import deal_out, make_for_parts
from stoker.distributed.deepspeed_hooks import gather_for_logits, gather_whole_layers
from stoker.distributed.deepspeed_state import ZeroParts
from stoker.distributed.fsdp2 import Fill, buffers_to_parameters
from stoker.distributed.ranks import Place, Ranks
from stoker.distributed.single import SingleDevice, check_class, check_weights, detached
from stoker.distributed.strategy import Batch, MakeOptimizer, Result, StepResult, StrategyState
from stoker.errors import PlanError, TrainingError


class Zero(SingleDevice):
    """The `Strategy` of `ranks` under DeepSpeed; `settings` are DeepSpeed's, `layers` those of `model` in order.

    Of `settings`, batch sizes, precision, clipping and the optimiser are set here, whatever they say. In stage 3 a
    model on the meta device gets its weights from `fill`, one whole tensor at a time, of which each rank keeps its
    part. A micro-batch whose memory runs out cannot be taken back.
    """

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device | str = "cpu",
        *,
        settings: Mapping[str, Any],
        model: nn.Module,
        layers: Sequence[nn.Module],
        precision: str = "fp32",
        on_discard: Sequence[Callable[[], None]] = (),
        fill: Fill | None = None,
    ) -> None:
        if precision == "fp16":
            raise ValueError("parts of gradients in fp16 have no common loss scale: use bf16 or fp32")
        super().__init__(device, precision=precision, on_discard=on_discard, ranks=ranks)
        self._model, self._layers, self._fill = model, layers, fill
        self._settings = {
            **settings,
            "train_micro_batch_size_per_gpu": 1,  # what it makes of these is a division of the loss, which is done here
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "steps_per_print": None,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the host too
        }
        self._stage = int(settings["zero_optimization"]["stage"])

    @property
    def splits_alone(self) -> bool:
        """Never: what DeepSpeed has reduced of a micro-batch it cannot take back."""
        return False

    def prepare(self, task: nn.Module, make_optimizer: MakeOptimizer | None = None) -> None:
        """Takes over `task`: in stage 3 its weights are dealt out one by one. See `Strategy.prepare`."""
        if make_optimizer is None:
            super().prepare(task)
            return
        if any(hasattr(parameter, "ds_id") for parameter in task.parameters()):
            raise TrainingError("the model is in parts of an earlier run in this process.", fix="Load it anew.")
        deepspeed = import_deepspeed(self.device, self._ranks)
        require_disk(deepspeed, self._settings)
        self._task, root = task, _Root(task, self._autocast)
        if self._stage == 3:
            for layer in self._layers:
                buffers_to_parameters(layer)
            deal_out(root, self._settings, device=self.device, fill=self._fill)
        self._trained = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
        self._made_optimizer = make_for_parts(make_optimizer, self._trained)
        self._engine, *_ = deepspeed.initialize(
            model=root, optimizer=self._made_optimizer, config=self._settings, dist_init_required=False
        )
        if self._stage == 3:
            gather_whole_layers(self._engine, self._layers)
            heads = [getattr(self._model, name, None) for name in ("head_weight", "head_bias")]
            gather_for_logits(root, self._model, [head for head in heads if isinstance(head, nn.Parameter)])
        self._parts = ZeroParts(self._engine.optimizer, self._stage, self._trained)

    def forward_backward(self, batch: Batch, *, divisor: float, is_last: bool) -> Result:
        """Adds the gradient of `loss_sum / divisor`; it goes over the ranks as the stage has it."""
        self._task.train()
        self._engine.set_gradient_accumulation_boundary(is_last)
        loss = self._engine(batch.to(self.device))
        # The reduction averages over ranks, and the divisor counts the tokens of all of them.
        self._engine.backward(loss / (divisor / self.world_size), scale_wrt_gas=False)
        return detached(self._engine.module.last_result)

    def discard_gradients(self) -> None:
        """Ends the run: DeepSpeed has reduced a part of the gradients, and cannot take it back."""
        raise TrainingError(
            "memory ran out in the middle of a micro-batch, which DeepSpeed cannot repeat.",
            fix="Use a smaller engine.micro_batch_size, a higher stage, or offload (engine.deepspeed).",
        )

    def step(self, learning_rate: float, *, max_gradient_norm: float | None) -> StepResult:
        """Lets DeepSpeed clip and step, unless the gradient's norm is not finite. See `SingleDevice.step`."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate_scale", 1.0)
        self._engine.optimizer.clip_grad = max_gradient_norm or 0.0
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return StepResult(norm, skipped=not self._engine.was_step_applied())

    def evaluate(self, batch: Batch) -> Result:
        """Returns the task's result in evaluation mode, without gradients; training mode is back afterwards."""
        if self._made_optimizer is None:
            return super().evaluate(batch)
        was_training = self._task.training
        self._task.eval()
        with torch.no_grad():
            self._engine.module(batch.to(self.device))
        self._task.train(was_training)
        return detached(self._engine.module.last_result)

    @contextmanager
    def gathered(self, *, trained_only: bool) -> Generator[None]:
        """Within it the first rank's module holds whole parameters, in stage 3 on the host."""
        held: list[tuple[nn.Module, str, nn.Parameter]] = []
        whole: dict[int, nn.Parameter] = {}  # one that several modules share is gathered once, and stays one
        try:
            if self._stage == 3:
                for module in self._task.modules():
                    for name, parameter in list(module._parameters.items()):
                        if parameter is None or (trained_only and not parameter.requires_grad):
                            continue
                        if id(parameter) not in whole:
                            kept = self._kept(self._parts.whole(parameter))
                            whole[id(parameter)] = nn.Parameter(kept, requires_grad=False)
                        if self.rank == 0:
                            held.append((module, name, parameter))
                            module._parameters[name] = whole[id(parameter)]
            yield
        finally:
            for module, name, parameter in held:
                module._parameters[name] = parameter

    def state(self) -> StrategyState:
        """Returns trained weights by their names in the task, and the optimiser's state, as `SingleDevice` has them."""
        return self._state(self._kept)

    def shared_state(self) -> StrategyState:
        """Returns the state with the tensors, whole, that this rank is to write: as many bytes as any other."""
        given = [0] * self.world_size
        not_mine = torch.empty(0)

        def keep(tensor: Tensor) -> Tensor:
            owner = given.index(min(given))
            given[owner] += tensor.nbytes
            return tensor.cpu() if owner == self.rank else not_mine

        state = self._state(keep)

        def mine(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor for name, tensor in tensors.items() if tensor is not not_mine}

        return StrategyState(mine(state.weights), mine(state.optimizer), state.values)

    def _state(self, keep: Callable[[Tensor], Tensor]) -> StrategyState:
        """The state, of which `keep` has been given one whole tensor after the other, the same ones on every rank."""
        weights = {name: keep(self._parts.whole(parameter)) for name, parameter in self._trained.items()}
        tensors, numbers = self._parts.optimizer_state(keep)
        return StrategyState(weights, tensors, self._values(numbers))

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Takes back the weights of a state alone, for example the best ones."""
        check_weights(weights, {name: self._parts.shape(parameter) for name, parameter in self._trained.items()})
        self._parts.load_weights(weights)

    def load_state(self, state: StrategyState) -> None:
        """Takes back what `state` returned, here or under another strategy."""
        check_class(state.values["optimizer_class"], self._optimizer)
        self.load_weights(state.weights)
        self._parts.load_optimizer_state(state.optimizer, state.values["optimizer"])

    def _kept(self, tensor: Tensor) -> Tensor:
        # One at a time on the device; the first rank alone keeps it, on the host.
        return tensor.cpu() if self.rank == 0 else tensor.new_empty(0, device="cpu")


def require_disk(deepspeed: Any, settings: Mapping[str, Any]) -> None:
    """Raises PlanError where `settings` send something to NVMe and it cannot be written there and read back."""
    zero: Any = settings["zero_optimization"]
    parts = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
    folders = [Path(str(part.get("nvme_path"))) for part in parts if part.get("device") == "nvme"]
    if not folders:
        return
    if not deepspeed.ops.__compatible_ops__.get("async_io", False):
        raise PlanError(
            "offload to nvme needs DeepSpeed's operation async_io, which cannot be compiled here.",
            fix="Install libaio's headers (apt install libaio-dev, dnf install libaio-devel), a C++ compiler and ninja "
            "(elsewhere than where compilers look: name the folders in CFLAGS=-I... and LDFLAGS=-L...), or use cpu.",
        )
    for folder in folders:
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise PlanError(
                f"engine.deepspeed.nvme_path = {folder} is no folder that can be written to.",
                fix="Make it, on an NVMe disk, on every machine of the run.",
            )


class _Root(nn.Module):
    """What DeepSpeed's engine runs: the task's submodules under their own names, with the loss alone as the output.

    Its hooks look for tensors in what goes in and out of a module, and know no batches.
    """

    def __init__(self, task: nn.Module, autocast: Callable[[], Any]) -> None:
        super().__init__()
        for name, child in task.named_children():
            self.add_module(name, child)
        object.__setattr__(self, "_run", task.forward)  # not a submodule: it would be hooked
        self._autocast = autocast
        self.last_result: Any = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"  # DeepSpeed makes a text of it for its log; parts of weights have no shape

    def forward(self, batch: Any) -> Tensor:
        """Returns the loss sum of `batch`, and keeps the whole result."""
        with self._autocast():  # within: the engine turns off what is on outside of it
            self.last_result = cast("Any", self._run)(batch)
        return self.last_result.loss_sum


def package(kind: str, place: Place | None) -> Any:
    """Returns DeepSpeed, told of the kind of device and of this process's place, which it reads from the environment.

    Raises:
        TrainingError: it was imported before for another kind of device.
    """
    os.environ["DS_ACCELERATOR"] = kind
    os.environ.setdefault("LOCAL_RANK", str((place or Place()).local_rank))
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator()._name != kind:
        raise TrainingError(
            f"DeepSpeed is at work on {get_accelerator()._name} in this process, and the run is on {kind}.",
            fix="Start a new process.",
        )
    return cast("Any", deepspeed)


def import_deepspeed(device: torch.device, ranks: Ranks) -> Any:
    """Returns the package, made to speak over the process group of `ranks`; raises as `package` does."""
    deepspeed = package(device.type, ranks.place)
    from deepspeed.utils import groups

    # A run before this one in the process has left its process group, which DeepSpeed would still take.
    groups._release_process_group_references(group=None)
    deepspeed.comm.comm.cdb = None
    if device.type == "cpu":
        # Its collectives in shared memory would be compiled at the first start; gloo's are there.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", dist_init_required=False)
    return deepspeed
