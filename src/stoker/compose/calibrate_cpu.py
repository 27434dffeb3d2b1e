"""Measures what a plan wants of a CPU besides products and copies: calls, elementwise work, heads, the loss.

Each is the least of many short turns. On one thread the processor's time is taken, not the clock's, so that what else
the machine does counts little.
"""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from stoker.plan.cpu import ATTENTION_HEAD, ATTENTION_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

Say = Callable[[str], None]
_MIB = 2**20
_TURNS, _SECONDS = 200, 0.6
# Small operations forward and backward in `_chain`, as PyTorch's dispatcher counts them.
_LINKS, _CALLS_A_LINK = 20, 16.0


def least_seconds(run: Callable[[], object], *, at_most: float = _SECONDS) -> float:
    """Returns the seconds of `run`, the least of as many turns as `at_most` seconds allow, three at least."""
    import torch

    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    run()
    taken: list[float] = []
    end = time.perf_counter() + at_most
    while len(taken) < 3 or (len(taken) < _TURNS and time.perf_counter() < end):
        start = clock()
        run()
        taken.append(clock() - start)
    return max(min(taken), 1e-9)


def measure(attention_rate: Callable[[int, int], float], *, logits_mib: int = 64, say: Say = print) -> dict[str, float]:
    """Returns the fields of `plan.cpu.CpuRates`, and by which power attention's rate grows with heads (`head_power`).

    `attention_rate`: FLOP/s with so many tokens and channels of a head.
    """
    long, short = (attention_rate(tokens, ATTENTION_HEAD) for tokens in (ATTENTION_TOKENS, ATTENTION_TOKENS // 4))
    small = attention_rate(ATTENTION_TOKENS // 4, ATTENTION_HEAD // 4)
    found = {
        "call_seconds": least_seconds(_chain) / (_LINKS * _CALLS_A_LINK),
        "in_caches": _elementwise(1),
        "in_memory": _elementwise(logits_mib),
        "logit_seconds": _logit(logits_mib),
        "attention_half": _half(short / long) * ATTENTION_TOKENS,
        "head_power": max(0.0, math.log(short / small) / math.log(4)),
    }
    say(f"  a call           {found['call_seconds'] * 1e6:10,.2f} us under autograd")
    say(
        f"  elementwise      {found['in_caches'] / 1e9:10,.1f} GB/s in caches, "
        f"{found['in_memory'] / 1e9:,.1f} GB/s of new memory"
    )
    say(f"  loss             {found['logit_seconds'] * 1e9:10,.2f} ns a logit")
    return found


def _half(ratio: float) -> float:
    """Returns h of x / (x + h), of which the value at 1/4 is `ratio` r of that at 1: (1 - r) / (4 r - 1), 4 at most."""
    return min(4.0, max(0.0, (1.0 - ratio) / max(4.0 * ratio - 1.0, 1e-6)))


def _chain() -> None:
    """Small operations, views among them, forward and backward."""
    import torch

    value = leaf = torch.ones(4, 8, requires_grad=True)
    weight = torch.ones(8)
    for _ in range(_LINKS):
        turned = value.reshape(8, 4).transpose(0, 1).reshape(4, 8)
        value = torch.nn.functional.silu(turned * weight) + value
    torch.autograd.grad(value.sum(), leaf)


def _elementwise(mib: int) -> float:
    """Bytes a second that a product and an activation read and write, each into a new result."""
    import torch

    one = torch.ones(mib * _MIB // 4)
    seconds = least_seconds(lambda: one * one) + least_seconds(lambda: torch.nn.functional.silu(one))
    return 5 * one.nbytes / seconds


def _logit(mib: int) -> float:
    """Seconds of a logit's part in the loss and its gradient; the products are too narrow to count."""
    import torch

    from stoker.kernels.linear_cross_entropy import linear_cross_entropy

    vocabulary, channels = 8192, 16
    rows = max(16, mib * _MIB // 4 // vocabulary)
    hidden = torch.randn(rows, channels, requires_grad=True)
    weight, targets = torch.randn(vocabulary, channels), torch.randint(0, vocabulary, (rows,))

    def run() -> "Tensor":
        return torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden)[0]

    return least_seconds(run) / (rows * vocabulary)
