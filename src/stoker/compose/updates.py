"""Steps of optimisers by our own kernels, as the optimisers take them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stoker.optim.base import Update
from stoker.optim.eight_bit import EightBit

if TYPE_CHECKING:
    import torch

# Of one model; the kernel counts parameters with 32 bits, which leaves room for 2,048 parts of each.
_MOST_PARAMETERS = 1 << 20


def adamw(kernels: str, *, seed: int = 0, part: int = 0) -> Update:
    """Returns AdamW's step by the implementation `kernels`.

    The random bits that round bf16 weights follow `seed` and the `part` of each weight that this process steps.
    """
    from stoker.kernels.adamw import AdamWStep, adamw_

    def update(
        weight: "torch.Tensor",
        grad: "torch.Tensor",
        average: "torch.Tensor",
        square: "torch.Tensor",
        *,
        number: int,
        betas: Sequence[float],
        **values: Any,
    ) -> None:
        numbers = AdamWStep(first_beta=betas[0], second_beta=betas[1], **values)
        # Parts draw bits of their own, as if they were other parameters.
        options: dict[str, Any] = {"seed": seed, "number": number + part * _MOST_PARAMETERS}
        adamw_(weight, grad, average, square, numbers, implementation=_where(weight, kernels), **options)

    return update


def eight_bit(kernels: str) -> EightBit:
    """Returns how averages are kept in 8 bits, stepped by the implementation `kernels`."""
    from stoker.kernels.adamw import AdamWStep
    from stoker.kernels.adamw_8bit import BLOCK_SIZE, Average, adamw_8bit_, dequantize, quantize

    def update(
        weight: "torch.Tensor",
        grad: "torch.Tensor",
        average: "tuple[torch.Tensor, torch.Tensor]",
        square: "tuple[torch.Tensor, torch.Tensor]",
        *,
        betas: Sequence[float],
        **values: Any,
    ) -> None:
        numbers = AdamWStep(first_beta=betas[0], second_beta=betas[1], **values)
        averages = Average(*average), Average(*square)
        adamw_8bit_(weight, grad, *averages, numbers, implementation=_where(weight, kernels))

    return EightBit(
        update,
        plain=adamw(kernels),
        block_size=BLOCK_SIZE,
        compress=lambda values, signed: quantize(values, signed=signed),
        expand=lambda code, scale: dequantize(Average(code, scale)),
    )


def _where(weight: "torch.Tensor", kernels: str) -> str:
    """Returns the implementation that steps a weight where it lies: on the host, if it is offloaded."""
    return "reference" if weight.device.type == "cpu" else kernels
