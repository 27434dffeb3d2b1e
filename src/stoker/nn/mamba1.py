"""The mixer of Mamba: a gated selective state space behind a short convolution (arXiv:2312.00752, figure 3)."""

import torch
from torch import Tensor, nn

from stoker.kernels.selective_scan import selective_scan, selective_scan_step
from stoker.nn.causal_conv import CausalConv
from stoker.nn.linear import FusedLinear
from stoker.nn.rotary import Documents
from stoker.nn.state_cache import StateCache
from stoker.nn.state_space import StateSpace

ParameterNorms = tuple[nn.Module, nn.Module, nn.Module]


class Mamba1(StateSpace):
    """A state space of `inner_size` channels with `state_size` states each, whose parameters depend on the input.

    `in_names`, `x_names`, `out_names`: the Hugging Face module names of the linear layers. `norms`: of the step sizes
    while there are `time_step_rank` of them, of B and of C.

    The matrix that widens the step sizes, `dt_weight` [E, R], is a plain parameter: Transformers multiplies by it
    without calling its layer, so that an adapter there would be ignored.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        inner_size: int,
        state_size: int,
        conv_kernel: int,
        time_step_rank: int,
        in_names: tuple[str, ...],
        x_names: tuple[str, ...],
        out_names: tuple[str, ...],
        norms: ParameterNorms | None = None,
        conv_bias: bool = True,
        bias: bool = False,
        kernels: str = "reference",
    ) -> None:
        super().__init__(kernels=kernels)
        self.x_sizes = [time_step_rank, state_size, state_size]
        self.in_proj = FusedLinear(hidden_size, (2 * inner_size,), names=in_names, bias=bias)
        self.conv = CausalConv(inner_size, conv_kernel, bias=conv_bias, kernels=kernels)
        self.x_proj = FusedLinear(inner_size, (sum(self.x_sizes),), names=x_names)
        self.dt_norm, self.b_norm, self.c_norm = norms or (nn.Identity(), nn.Identity(), nn.Identity())
        self.dt_weight = nn.Parameter(torch.empty(inner_size, time_step_rank))
        self.dt_bias = nn.Parameter(torch.zeros(inner_size))
        self.A_log = nn.Parameter(torch.empty(inner_size, state_size))
        self.D = nn.Parameter(torch.ones(inner_size))
        self.out_proj = FusedLinear(inner_size, (hidden_size,), names=out_names, bias=bias, by_name_only=True)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Channels and states."""
        return tuple(self.A_log.shape)

    @property
    def draws_random_numbers(self) -> bool:
        """Whether an adapter of the projection inside has dropout."""
        return getattr(self.x_proj, "draws_random_numbers", False)

    def mixed(self, projected: Tensor, document_lengths: Documents | None) -> Tensor:
        """[B, T, 2E] to [B, T, E]."""
        hidden, gate = projected.chunk(2, dim=-1)
        hidden = self.conv(hidden, document_lengths=document_lengths)
        dt, B, C = self._varying(hidden)
        mixed, _ = selective_scan(
            hidden,
            dt,
            self.decay(),
            B,
            C,
            D=self.D,
            z=gate,
            dt_bias=self.dt_bias,
            document_lengths=document_lengths,
            implementation=self.kernels,
        )
        return mixed

    def continued(self, projected: Tensor, cache: StateCache) -> Tensor:
        """The same with a cache."""
        hidden, gate = projected.chunk(2, dim=-1)
        hidden = self.conv(hidden, cache=cache)
        dt, B, C = self._varying(hidden)
        constant = {"D": self.D, "dt_bias": self.dt_bias}
        if hidden.shape[1] == 1:
            x, dt, B, C, z = (one[:, 0] for one in (hidden, dt, B, C, gate))
            return selective_scan_step(cache.state, x, dt, self.decay(), B, C, z=z, **constant)[:, None]
        mixed, cache.state = selective_scan(
            hidden,
            dt,
            self.decay(),
            B,
            C,
            z=gate,
            initial_state=cache.state,
            implementation=self.kernels,
            **constant,
        )
        return mixed

    def _varying(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step sizes before their bias [B, T, E], B and C [B, T, N]."""
        dt, B, C = self.x_proj(hidden).split(self.x_sizes, dim=-1)
        dt = nn.functional.linear(self.dt_norm(dt), self.dt_weight)
        return dt, self.b_norm(B), self.c_norm(C)
