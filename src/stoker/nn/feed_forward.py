"""Feed-forward modules."""

from collections.abc import Callable

from torch import Tensor, nn

from stoker.kernels.glu import ACTIVATIONS as GATES
from stoker.kernels.glu import gated
from stoker.nn.linear import FusedLinear


def _squared_relu(x: Tensor) -> Tensor:
    return nn.functional.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": nn.functional.relu,
    "relu_squared": _squared_relu,  # Primer, arXiv:2109.08668
}
"""Activations by the names that specs have for them."""


class GatedFeedForward(nn.Module):
    """`down(activation(gate(x)) * up(x))` with `intermediate_size` channels inside; "silu" makes it SwiGLU.

    `gate_up_names`, `down_names`: the Hugging Face module names of gate and up (or of the one that holds both), and of
    down. `gate_scale` multiplies what the activation reads, `down_scale` the result.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        intermediate_size: int,
        gate_up_names: tuple[str, ...],
        down_names: tuple[str, ...],
        activation: str = "silu",
        bias: bool = False,
        gate_scale: float = 1.0,
        down_scale: float = 1.0,
        kernels: str = "reference",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_scale = gate_scale
        self.down_scale = down_scale
        self.kernels = kernels
        sizes = (intermediate_size, intermediate_size)
        self.gate_up = FusedLinear(
            hidden_size, sizes if len(gate_up_names) == 2 else (sum(sizes),), names=gate_up_names, bias=bias
        )
        self.down = FusedLinear(intermediate_size, (hidden_size,), names=down_names, bias=bias)

    @property
    def has_kernel(self) -> bool:
        """Whether one kernel makes the activated product, and the layer kernel can run it."""
        return self.activation in GATES and self.gate_scale == 1.0 and self.down_scale == 1.0

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        gate_up = self.gate_up(x)
        if self.has_kernel:
            return self.down(gated(gate_up, activation=self.activation, implementation=self.kernels))
        gate, up = gate_up.chunk(2, dim=-1)
        if self.gate_scale != 1.0:
            gate = gate * self.gate_scale
        output = self.down(ACTIVATIONS[self.activation](gate) * up)
        return output if self.down_scale == 1.0 else output * self.down_scale


class PlainFeedForward(nn.Module):
    """`down(activation(up(x)))`; `up_names`, `down_names`: the Hugging Face module names of the two."""

    def __init__(
        self,
        hidden_size: int,
        *,
        intermediate_size: int,
        up_names: tuple[str, ...],
        down_names: tuple[str, ...],
        activation: str,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.up = FusedLinear(hidden_size, (intermediate_size,), names=up_names, bias=bias)
        self.down = FusedLinear(intermediate_size, (hidden_size,), names=down_names, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))
