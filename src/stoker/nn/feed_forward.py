"""Feed-forward modules."""

from torch import Tensor, nn

from stoker.kernels.glu import swiglu
from stoker.nn.linear import FusedLinear


class GatedFeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))` with `intermediate_size` channels inside.

    `names`: the Hugging Face module names of gate, up and down.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        intermediate_size: int,
        names: tuple[str, str, str],
        bias: bool = False,
        kernels: str = "reference",
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_up = FusedLinear(hidden_size, (intermediate_size, intermediate_size), names=names[:2], bias=bias)
        self.down = FusedLinear(intermediate_size, (hidden_size,), names=names[2:], bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down(swiglu(self.gate_up(x), implementation=self.kernels))
