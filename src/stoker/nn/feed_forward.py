"""Feed-forward modules."""

from torch import Tensor, nn

from stoker.kernels.glu import swiglu
from stoker.nn.linear import FusedLinear


class GatedFeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))` with `intermediate_size` channels inside.

    `gate_up_names`, `down_names`: the Hugging Face module names of gate and up, and of down.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        intermediate_size: int,
        gate_up_names: tuple[str, ...],
        down_names: tuple[str, ...],
        bias: bool = False,
        kernels: str = "reference",
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_up = FusedLinear(hidden_size, (intermediate_size, intermediate_size), names=gate_up_names, bias=bias)
        self.down = FusedLinear(intermediate_size, (hidden_size,), names=down_names, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down(swiglu(self.gate_up(x), implementation=self.kernels))
