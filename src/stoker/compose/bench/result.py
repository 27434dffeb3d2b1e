"""What one trainer's measurement found."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from stoker.compose.bench.profile import KernelTime


@dataclass(frozen=True)
class Measured:
    """One trainer on one job; `error` instead of numbers when it could not run it.

    `tokens_per_second` counts positions of full rows and trained tokens of packed ones. `losses`: of each step, warm-up
    included. `gradient_norm`: the smallest that was looked at. `peak_bytes`: of the device, from after loading on (of
    the process, on a CPU). `first_step_seconds` holds what is compiled on the way. `kernels`: those of one step.
    """

    name: str
    tokens_per_second: float = math.nan
    step_seconds: float = math.nan
    first_step_seconds: float = math.nan
    load_seconds: float = math.nan
    peak_bytes: int = 0
    losses: tuple[float, ...] = ()
    gradient_norm: float = math.nan
    versions: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    error: str = ""
    kernels: tuple[KernelTime, ...] = ()


def speed(tokens: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Returns the median tokens a second and the median seconds of steps of so many `tokens`."""
    rates = [count / duration for count, duration in zip(tokens, seconds, strict=True)]
    return statistics.median(rates), statistics.median(seconds)


def fault(losses: Sequence[float], gradient_norm: float) -> str:
    """Returns why these numbers mean nothing, or "": a loss that is not finite, or a gradient that is not above 0."""
    if not all(map(math.isfinite, losses)):
        return f"the loss is not finite: {next(loss for loss in losses if not math.isfinite(loss))}"
    if not (math.isfinite(gradient_norm) and gradient_norm > 0):
        return f"the gradient norm is {gradient_norm}, so nothing was trained"
    return ""
