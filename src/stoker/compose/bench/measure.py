"""Trains a few steps the way `stoker train` does, and looks at the clock."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from stoker.compose.bench.profile import profiled
from stoker.compose.bench.result import Measured, fault, speed
from stoker.compose.data import Data
from stoker.compose.execution import fp8_notice
from stoker.compose.model import Base, load_decoder
from stoker.compose.trainer import Engine, add_adapter, make_engine, weight_dtype
from stoker.config.schema import RunConfig
from stoker.data.batch import Batch
from stoker.distributed.single import SingleDevice
from stoker.errors import TrainingError
from stoker.plan.plan import Plan
from stoker.train.guard import MemoryGuard
from stoker.train.step import StepOutcome, take_step

_Found = TypeVar("_Found")

WARMUP_STEPS = 3
"""Steps before the timed ones: kernels compile, caches and the allocator settle."""


@dataclass(frozen=True)
class Steps:
    """The micro-batches of every step, warm-up first, the same for every trainer."""

    batches: tuple[tuple[Batch, ...], ...]

    @property
    def is_packed(self) -> bool:
        """Whether rows hold several documents."""
        return self.batches[0][0].document_lengths is not None

    @property
    def tokens(self) -> list[int]:
        """Tokens of each step that count: trained ones of packed rows, all of full ones."""
        return [
            sum(one.num_trained_tokens if self.is_packed else one.num_tokens for one in step) for step in self.batches
        ]


def measure(
    config: RunConfig,
    plan: Plan,
    base: Base,
    data: Data,
    *,
    steps: int,
    warmup_steps: int = WARMUP_STEPS,
    profile: bool = False,
) -> tuple[Measured, Steps]:
    """Loads the model as the plan says, takes warm-up steps and `steps` timed ones; everything is freed on return.

    With `profile`, the last step is taken once more under PyTorch's profiler.

    Raises:
        TrainingError: the loss is not finite, or the gradient's norm is not above zero.
    """
    torch.set_num_threads(plan.num_threads)
    torch.manual_seed(config.train.seed)
    device = torch.device(plan.device)
    start = time.perf_counter()
    decoder = load_decoder(
        base,
        device=plan.device,
        dtype=weight_dtype(config, plan),
        kernels=plan.kernels,
        quantization=plan.quantization,
    )
    if config.adapter is not None:
        add_adapter(decoder, config.adapter, seed=config.train.seed)
    engine = make_engine(config, plan, decoder, data, pad_id=0)
    wait(device)
    load_seconds = time.perf_counter() - start
    notices = [sentence] if (sentence := fp8_notice(decoder, plan)) else []
    measured, batches, kernels = timed(
        config, engine, steps=steps, warmup_steps=warmup_steps, look=profiled if profile else None
    )
    return replace(
        measured, load_seconds=load_seconds, notices=(*notices, *measured.notices), kernels=kernels or ()
    ), batches


def timed(
    config: RunConfig,
    engine: Engine,
    *,
    steps: int,
    warmup_steps: int = WARMUP_STEPS,
    look: Callable[[Callable[[], object], torch.device], _Found] | None = None,
) -> tuple[Measured, Steps, _Found | None]:
    """Takes warm-up steps and `steps` timed ones, over all ranks of the engine's strategy, which all call it.

    Speed and losses are those of all ranks together, memory is that of the one that has most in use. `look` is given
    the last step to take once more, and the device; what it returns comes last.

    Raises:
        TrainingError: the loss is not finite, or the gradient's norm is not above zero.
    """
    device = engine.strategy.device
    batches = Steps(tuple(tuple(engine.train.step(index)) for index in range(warmup_steps + steps)))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    notices: list[str] = []
    guard = MemoryGuard(engine.strategy, notices.append)

    def take(number: int, micro_batches: Sequence[Batch]) -> StepOutcome:
        return take_step(
            engine.strategy,
            micro_batches,
            number=number,
            learning_rate=config.train.learning_rate,
            max_gradient_norm=config.train.max_gradient_norm,
            guard=guard,
            notify=notices.append,
        )

    seconds, losses, norms, tokens = [], [], [], []
    for number, micro_batches in enumerate(batches.batches, start=1):
        if number == warmup_steps + 1:
            notices += _captured_ahead(engine, batches.batches[warmup_steps:])
        wait(device)
        start = time.perf_counter()
        outcome = take(number, micro_batches)
        wait(device)
        seconds.append(time.perf_counter() - start)
        losses.append(outcome.loss)
        norms.append(outcome.gradient_norm)
        tokens.append(outcome.num_trained_tokens if batches.is_packed else outcome.num_tokens)
    if (rehearsal := engine.strategy.rehearsal) is not None:
        rest = seconds[0] - rehearsal.seconds
        notices.append(f"First step {seconds[0]:.1f} s: {rehearsal.describe()}; {rest:.1f} s the step itself.")
    peak_bytes = max(engine.strategy.gather_over_ranks(engine.strategy.peak_memory_bytes()))
    found = None if look is None else look(lambda: take(len(seconds) + 1, batches.batches[-1]), device)
    if wrong := fault(losses, min(norms)):
        raise TrainingError(f"No number is worth printing: {wrong}.")
    rate, step_seconds = speed(tokens[warmup_steps:], seconds[warmup_steps:])
    measured = Measured(
        "stoker",
        tokens_per_second=rate,
        step_seconds=step_seconds,
        first_step_seconds=seconds[0],
        peak_bytes=peak_bytes,
        losses=tuple(losses),
        gradient_norm=min(norms),
        notices=tuple(notices),
    )
    return measured, batches, found


def _captured_ahead(engine: Engine, steps: Sequence[Sequence[Batch]]) -> list[str]:
    """Captures the CUDA graphs that packed rows of the timed steps need, and says so.

    A run captures them within its first dozens of micro-batches; a few timed steps would measure little else.
    """
    if not isinstance(engine.strategy, SingleDevice):
        return []
    count = engine.strategy.capture([batch for step in steps for batch in step])
    return [f"CUDA graphs captured before the timed steps, for packed rows: {count}."] if count else []


def wait(device: torch.device) -> None:
    """Waits for the work that was given to `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def documents_of(batch: Batch) -> Sequence[int]:
    """Returns the lengths of a micro-batch's documents, padding among them."""
    if batch.document_lengths is None:
        return [batch.input_ids.shape[1]] * batch.num_rows
    return [length for row in batch.document_lengths for length in row]
