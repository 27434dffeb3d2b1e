"""What the mixers of Mamba and of Mamba-2 have in common: two projections, with a recurrence between them."""

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stoker.nn.causal_conv import CausalConv
from stoker.nn.linear import FusedLinear
from stoker.nn.rotary import Documents
from stoker.nn.state_cache import StateCache


class StateSpace(nn.Module):
    """A state space behind a short convolution; a subclass makes the parameters and says what lies between them.

    A_log, D and the step sizes' bias stay fp32 in a model of any dtype; the state is computed in fp32. The backward
    computes everything between the projections again, unless `keeps_all`. Both kinds are quick to compute and several
    times as wide as what the projections give and take.
    """

    keeps_float32 = ("A_log", "D", "dt_bias")

    in_proj: FusedLinear
    conv: CausalConv
    out_proj: FusedLinear
    A_log: nn.Parameter
    D: nn.Parameter
    dt_bias: nn.Parameter

    def __init__(self, *, kernels: str) -> None:
        super().__init__()
        self.kernels = kernels
        self.keeps_all = False

    @property
    @abstractmethod
    def state_shape(self) -> tuple[int, ...]:
        """Sizes of a row's state."""

    @property
    def draws_random_numbers(self) -> bool:
        """Whether what lies between the projections draws random numbers, which its second run must draw again."""
        return False

    @abstractmethod
    def mixed(self, projected: Tensor, document_lengths: Documents | None) -> Tensor:
        """What the output's projection reads, [B, T, E], from the input's projection."""

    @abstractmethod
    def continued(self, projected: Tensor, cache: StateCache) -> Tensor:
        """The same from the cache's state on, which moves on; a single position takes one step of the recurrence."""

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        *,
        document_lengths: Documents | None = None,
        cache: StateCache | None = None,
        cache_length: int = 0,
    ) -> Tensor:
        """x [B, T, D] to [B, T, D]; convolution and state start anew in every document, and there are no positions.

        With a cache, x continues the positions that it has seen, and it is brought up to date.
        """
        projected = self.in_proj(x)
        if cache is not None:
            return self.out_proj(self.continued(projected, cache))
        if self.keeps_all or not torch.is_grad_enabled():
            return self.out_proj(self.mixed(projected, document_lengths))
        # The state of random numbers cannot be read while a graph is captured, so only where some are drawn.
        inner = checkpoint(
            self.mixed,
            projected,
            document_lengths,
            use_reentrant=False,
            preserve_rng_state=self.training and self.draws_random_numbers,
        )
        return self.out_proj(inner)

    def decay(self) -> Tensor:
        """A in the shape of A_log, negative, fp32."""
        return -self.A_log.float().exp()

    def reset_parameters(self) -> None:
        """Gives rates of 1, 2, 3 and so on (S4D-real, arXiv:2206.11893), a skip of one, step sizes of a hundredth.

        Rates count the states of a channel in Mamba, the heads in Mamba-2.
        """
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1.0, self.A_log.shape[-1] + 1).log())
        nn.init.ones_(self.D)
        nn.init.constant_(self.dt_bias, math.log(math.expm1(0.01)))

    def new_cache(self, *, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> StateCache:
        """An empty cache; `capacity` has no part in it, because a state has one size."""
        return StateCache(
            batch_size,
            window_shape=self.conv.window_shape,
            state_shape=self.state_shape,
            dtype=dtype,
            device=device,
        )
