"""One device of one process: a CPU, a CUDA GPU or an Apple GPU; fp32, or bf16 and fp16 autocast over fp32 weights."""

import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from stoker.distributed import optimizer_state, rehearsal
from stoker.distributed.flat_gradient import FlatGradient
from stoker.distributed.graphs import MicroBatchGraphs
from stoker.distributed.ranks import Ranks
from stoker.distributed.rehearsal import Rehearsal
from stoker.distributed.strategy import Batch, MakeOptimizer, Result, StepResult, StrategyState
from stoker.errors import CheckpointError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Detached(NamedTuple):
    loss_sum: Tensor
    num_trained_tokens: int
    metrics: dict[str, Tensor]


class SingleDevice:
    """The `Strategy` of one device.

    `precision` is "fp32", or "bf16" or "fp16" for autocast over fp32 weights; fp16 scales the loss (arXiv:1710.03740).
    `on_discard` is called when a step is broken off, to let go of what else it holds. `cuda_graphs`: micro-batches of
    one shape are captured and replayed (`graphs.MicroBatchGraphs`; the task must be one that can be); with "auto", what
    turns out not to be capturable runs as always, which the step's `notice` says. An optimiser that
    has a `layout` gets its gradient as one tensor (`flat_gradient.FlatGradient`). `rehearsing`: within it a
    shortened first micro-batch is run once before the first counts; `rehearsal` then says what that took.
    """

    device: torch.device

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        precision: str = "fp32",
        on_discard: Sequence[Callable[[], None]] = (),
        cuda_graphs: bool | Literal["auto"] = False,
        rehearsing: Callable[[], AbstractContextManager[Any]] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}; it is one of {', '.join(PRECISIONS)}")
        self.device = torch.device(device)
        self._ranks = ranks or Ranks()
        self._on_discard = tuple(on_discard)
        self._uses_graphs, self._may_fall_back = bool(cuda_graphs), cuda_graphs == "auto"
        self._refused = ""
        self._graphs: MicroBatchGraphs | None = None
        self._rehearsing = rehearsing
        self._rehearsal: Rehearsal | None = None
        self._dtype = PRECISIONS[precision]
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return self._ranks.rank

    @property
    def world_size(self) -> int:
        """How many processes take each step together."""
        return self._ranks.world_size

    @property
    def part(self) -> int:
        """Which part of each weight this rank steps: the whole of it."""
        return 0

    @property
    def splits_alone(self) -> bool:
        """Whether it is the only one; a strategy over several ranks says for itself when it needs them."""
        return self.world_size == 1

    @property
    def rehearsal(self) -> Rehearsal | None:
        """What the rehearsal took, if there was one."""
        return self._rehearsal

    def prepare(self, task: nn.Module, make_optimizer: MakeOptimizer | None = None) -> None:
        """Moves `task` to the device and makes the optimiser of the parameters that require a gradient."""
        self._task = task
        self._forward = self._place(task)
        self._trained = {name: self._stepped(one) for name, one in task.named_parameters() if one.requires_grad}
        self._make_optimizer = make_optimizer
        self._made_optimizer = None if make_optimizer is None else make_optimizer(self._trained.items())
        is_flat = hasattr(self._made_optimizer, "layout")
        self._flat = FlatGradient(cast("Any", self._made_optimizer)) if is_flat else None
        if self._uses_graphs:
            self._graphs = MicroBatchGraphs(
                cast("Any", self._task),
                device=self.device,
                autocast=self._autocast,
                gather=None if self._flat is None else self._flat.gather,
                falls_back=self._may_fall_back,
            )

    def _place(self, task: nn.Module) -> nn.Module:
        """Puts `task` on the device and returns what runs its training forward."""
        return task.to(self.device)

    def _stepped(self, parameter: nn.Parameter) -> nn.Parameter:
        """Returns a trained parameter of the task as the optimiser steps it."""
        return parameter

    def _reducing(self, *, is_last: bool) -> AbstractContextManager[None]:
        """The context of a micro-batch's forward and backward; on the last of a step gradients go over the ranks."""
        del is_last
        return nullcontext()

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        if self._made_optimizer is None:
            raise RuntimeError("prepared for evaluation only: there is no optimiser")
        return self._made_optimizer

    def forward_backward(self, batch: Batch, *, divisor: float, is_last: bool) -> Result:
        """Adds the gradient of `loss_sum / divisor`, over ranks once `is_last` has run."""
        self._task.train()
        if self._rehearsing is not None:
            rehearsing, self._rehearsing = self._rehearsing, None
            started = time.perf_counter()
            with rehearsing() as asked:
                self._rehearse(batch)
                ran = time.perf_counter()
            if asked is not None:
                seconds = ran - started, time.perf_counter() - ran
                self._rehearsal = Rehearsal(*seconds, asked.num_kernels, asked.num_threads)
        if self._graphs is not None:
            factor = self._scaler.scale(torch.full((), 1.0 / divisor, device=self.device))
            ran = self._graphs.run(cast("Any", batch.to(self.device)), factor)
            if self._flat is not None and ran.gradient is not None:
                self._flat.add(ran.gradient, is_last=is_last, is_reused=ran.is_reused)
            return detached(ran.result)
        with self._reducing(is_last=is_last):
            with self._autocast():
                result = self._forward(batch.to(self.device))
            # Reductions average over ranks, and the divisor counts the tokens of all of them.
            self._scaler.scale(result.loss_sum / (divisor / self.world_size)).backward()
        if self._flat is not None:
            self._flat.add(self._flat.gather(), is_last=is_last)
        return detached(result)

    def capture(self, batches: Sequence[Batch]) -> int:
        """Captures the graphs that packed micro-batches like these will need, of shapes that have run before.

        Returns how many that takes; nothing is computed.
        """
        if self._graphs is None:
            return 0
        self._task.train()
        return self._graphs.capture(cast("Any", batch.to(self.device)) for batch in batches)

    def _rehearse(self, batch: Batch) -> None:
        """Runs forward and backward of a short `batch` and forgets all about it, random numbers drawn included."""
        on_device = batch.shortened().to(self.device)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            if self._graphs is not None:
                self._graphs.rehearse(cast("Any", on_device))
            else:
                with self._autocast():
                    result = self._forward(on_device)
                result.loss_sum.backward()
            self._task.zero_grad(set_to_none=True)
            self._rehearse_step()

    def _rehearse_step(self) -> None:
        """Clips and steps a few small parameters that stand for the trained ones, by an optimiser of their own."""
        if self._make_optimizer is None:
            return
        stand_ins = list(rehearsal.stand_ins(self._trained, self.device))
        optimizer = self._make_optimizer(stand_ins)
        parameters = [parameter for _, parameter in stand_ins]
        norm = _total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        optimizer.step()

    def reduce_gradients(self) -> None:
        """Nothing to do on one device."""

    def discard_gradients(self) -> None:
        """Clears gradients and gives cached device memory back."""
        if self._graphs is not None:
            self._graphs.clear()
        self._task.zero_grad(set_to_none=True)
        if self._flat is not None:
            self._flat.clear()
        for let_go in self._on_discard:
            let_go()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    def step(self, learning_rate: float, *, max_gradient_norm: float | None) -> StepResult:
        """Clips to `max_gradient_norm` (None: not at all) and steps, unless the gradient's norm is not finite.

        A group of the optimiser with a `rate_scale` steps at so many times the rate.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate_scale", 1.0)
        if self._flat is not None:
            self._flat.hand_over(shown=self._scaler.is_enabled())
        self._scaler.unscale_(self._optimizer)
        parameters = [parameter for parameter in self._trained.values() if parameter.grad is not None]
        if self._flat is not None:
            norm_tensor = self._flat.norm()
        else:
            norm_tensor = _total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        norm = float(self._whole(norm_tensor))
        finite = norm < float("inf")  # Also false for NaN.
        if finite:
            if max_gradient_norm is not None:
                self._clip(parameters, max_gradient_norm, norm_tensor, norm)
            self._scaler.step(self._optimizer)
        self._scaler.update()
        # A graph adds to the gradients that were there when it was captured.
        self._optimizer.zero_grad(set_to_none=self._graphs is None or self._flat is not None)
        if self._flat is not None:
            self._flat.clear()
        scale = self._scaler.get_scale() if self._scaler.is_enabled() else None
        return StepResult(norm, skipped=not finite, loss_scale=scale, notice=self._notice())

    def _notice(self) -> str:
        """Says once that micro-batches are not captured, if they were to be."""
        refused = "" if self._graphs is None else self._graphs.refused
        if refused == self._refused:
            return ""
        self._refused = refused
        return f"CUDA graphs are not used: capturing a micro-batch failed ({refused}). Kernels are launched one by one."

    def _clip(self, parameters: Sequence[nn.Parameter], max_norm: float, norm_tensor: Tensor, norm: float) -> None:
        """Scales gradients down to `max_norm`: in the optimiser's step, where it can, or in place."""
        scale_gradients = getattr(self._optimizer, "scale_gradients", None)
        if scale_gradients is None:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm_tensor)
        else:
            scale_gradients(min(1.0, max_norm / (norm + 1e-6)))  # as clip_grads_with_norm_ does

    def evaluate(self, batch: Batch) -> Result:
        """Returns the task's result in evaluation mode, without gradients; training mode is back afterwards."""
        was_training = self._task.training
        self._task.eval()
        with torch.no_grad(), self._autocast():
            result = self._task(batch.to(self.device))
        self._task.train(was_training)
        return detached(result)

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Returns the element-wise sum of `values` over ranks."""
        return self._ranks.sum(values)

    def gather_over_ranks(self, value: Any) -> list[Any]:
        """Returns every rank's `value`, in their order."""
        return self._ranks.gather(value)

    def let_go(self) -> None:
        """Nothing to do where nothing stays gathered."""

    def gathered(self, *, trained_only: bool) -> AbstractContextManager[None]:
        """Within it the first rank's module holds whole parameters, as a device's always does."""
        del trained_only
        return nullcontext()

    def state(self) -> StrategyState:
        """Returns trained weights by their names in the task, and the optimiser's and loss scale's state."""
        tensors, numbers = optimizer_state.flatten(self._optimizer, self._trained)
        tensors = {name: self._kept(tensor) for name, tensor in tensors.items()}
        weights = {name: self._kept(parameter.detach()) for name, parameter in self._trained.items()}
        return StrategyState(weights, tensors, self._values(numbers))

    def _values(self, numbers: optimizer_state.Numbers) -> dict[str, Any]:
        values: dict[str, Any] = {"optimizer": numbers, "optimizer_class": class_of(self._optimizer)}
        if self._scaler.is_enabled():
            values["loss_scale"] = self._scaler.state_dict()
        return values

    def shared_state(self) -> StrategyState:
        """Returns the state as ranks write it together: here the first one has all of it."""
        state = self.state()
        return state if self.rank == 0 else StrategyState({}, {}, state.values)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Takes back the weights of a state alone, for example the best ones."""
        check_weights(weights, {name: parameter.shape for name, parameter in self._trained.items()})
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(self._taken(weights, name, parameter))

    def load_state(self, state: StrategyState) -> None:
        """Takes back what `state` returned."""
        check_class(state.values["optimizer_class"], self._optimizer)
        self.load_weights(state.weights)
        optimizer_state.restore(
            self._optimizer, self._trained, state.optimizer, state.values["optimizer"], take=self._taken
        )
        if self._scaler.is_enabled() and "loss_scale" in state.values:
            self._scaler.load_state_dict(state.values["loss_scale"])

    def _whole(self, tensor: Tensor) -> Tensor:
        """Returns a tensor that ranks may hold in parts as a whole one."""
        return tensor

    def _kept(self, tensor: Tensor) -> Tensor:
        """Returns a tensor of the state as it is handed out: whole where it is written."""
        return tensor

    def _taken(self, tensors: Mapping[str, Tensor], name: str, parameter: nn.Parameter) -> Tensor:
        """Returns a tensor of a state, of a parameter's shape, as this rank holds it beside `parameter`."""
        del parameter
        return tensors[name]

    def peak_memory_bytes(self) -> int:
        """Returns the device's peak of allocated memory, or the process's peak resident size on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory()
        return _peak_resident_bytes()

    @contextmanager
    def _autocast(self) -> Generator[None]:
        if self._dtype is None:
            yield
            return
        with torch.autocast(self.device.type, dtype=self._dtype):
            yield


def _peak_resident_bytes() -> int:
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Bytes on macOS, KiB elsewhere.


def _total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together; of bf16 ones, too, in fp32."""
    if not any(gradient.dtype == torch.bfloat16 for gradient in gradients):
        return nn.utils.get_total_norm(gradients)
    norms: list[Tensor] = []
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        alike = [gradient for gradient in gradients if gradient.dtype == dtype]
        norms += torch._foreach_norm(alike, 2.0, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


def class_of(optimizer: torch.optim.Optimizer) -> str:
    """The class whose state the optimiser's is: its own, or that which it says."""
    return getattr(optimizer, "state_of", type(optimizer).__name__)


def check_class(saved: str, optimizer: torch.optim.Optimizer) -> None:
    """Raises CheckpointError unless a state of class `saved` is one that the optimiser can take."""
    ours = class_of(optimizer)
    if saved != ours:
        raise CheckpointError(
            f"The checkpoint holds the state of {saved}, but this run's optimiser is {ours}.",
            fix="Resume with the optimiser that the run began with.",
        )


def detached(result: Result) -> _Detached:
    """Returns `result` without its graph."""
    metrics = {name: value.detach() for name, value in result.metrics.items()}
    return _Detached(result.loss_sum.detach(), result.num_trained_tokens, metrics)


def check_weights(saved: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raises CheckpointError unless `saved` holds the weights that are trained here, of these `shapes`."""
    missing = sorted(set(shapes) - set(saved))
    unexpected = sorted(set(saved) - set(shapes))
    both = set(shapes) & set(saved)
    misshapen = sorted(name for name in both if tuple(shapes[name]) != optimizer_state.shape_of(saved, name))
    found = {"missing": missing, "not trained here": unexpected, "of another shape": misshapen}
    faults = [f"{len(names)} {fault} (first {names[0]})" for fault, names in found.items() if names]
    if faults:
        raise CheckpointError(
            f"The checkpoint's weights are not those of this model: {'; '.join(faults)}.",
            fix="Resume with the model and adapter settings that the run began with.",
        )
