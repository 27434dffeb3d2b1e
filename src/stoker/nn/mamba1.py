"""The mixer of Mamba: a gated selective state space behind a short convolution (arXiv:2312.00752, figure 3)."""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stoker.kernels.selective_scan import selective_scan, selective_scan_step
from stoker.nn.causal_conv import CausalConv
from stoker.nn.linear import FusedLinear
from stoker.nn.rotary import Documents
from stoker.nn.state_cache import StateCache

ParameterNorms = tuple[nn.Module, nn.Module, nn.Module]


class Mamba1(nn.Module):
    """A state space of `inner_size` channels with `state_size` states each, whose parameters depend on the input.

    `in_names`, `x_names`, `out_names`: the Hugging Face module names of the linear layers. `norms`: of the step sizes
    while there are `time_step_rank` of them, of B and of C.

    The matrix that widens the step sizes, `dt_weight` [E, R], is a plain parameter: Transformers multiplies by it
    without calling its layer, so that an adapter there would be ignored. A_log, D and the step sizes' bias stay fp32 in
    a model of any dtype; the state is computed in fp32. `keeps_all`: the backward runs nothing again.
    """

    keeps_float32 = ("A_log", "D", "dt_bias")

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
        super().__init__()
        self.kernels = kernels
        self.keeps_all = False
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
            return self.out_proj(self._continued(projected, cache))
        if torch.is_grad_enabled() and not self.keeps_all:
            # What lies between is several times as wide as the projection, and quick to compute again. Random numbers
            # are drawn again only for an adapter's dropout: their state cannot be read while a graph is captured.
            draws = self.training and getattr(self.x_proj, "draws_random_numbers", False)
            inner = checkpoint(self._mixed, projected, document_lengths, use_reentrant=False, preserve_rng_state=draws)
            return self.out_proj(inner)
        return self.out_proj(self._mixed(projected, document_lengths))

    def reset_parameters(self) -> None:
        """Gives each channel rates of 1 to N (S4D-real, arXiv:2206.11893), a skip of one, step sizes of a hundredth."""
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1.0, self.A_log.shape[1] + 1).log())
        nn.init.ones_(self.D)
        nn.init.constant_(self.dt_bias, math.log(math.expm1(0.01)))

    def new_cache(self, *, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> StateCache:
        """An empty cache; `capacity` has no part in it, because a state has one size."""
        return StateCache(
            batch_size,
            window_shape=self.conv.window_shape,
            state_shape=tuple(self.A_log.shape),
            dtype=dtype,
            device=device,
        )

    def _decay(self) -> Tensor:
        """A [E, N], negative, fp32."""
        return -self.A_log.float().exp()

    def _mixed(self, projected: Tensor, document_lengths: Documents | None) -> Tensor:
        """The output before its projection, [B, T, E], of the input's projection [B, T, 2E]."""
        hidden, gate = projected.chunk(2, dim=-1)
        hidden = self.conv(hidden, document_lengths=document_lengths)
        dt, B, C = self._varying(hidden)
        mixed, _ = selective_scan(
            hidden,
            dt,
            self._decay(),
            B,
            C,
            D=self.D,
            z=gate,
            dt_bias=self.dt_bias,
            document_lengths=document_lengths,
            implementation=self.kernels,
        )
        return mixed

    def _continued(self, projected: Tensor, cache: StateCache) -> Tensor:
        """The same from the cache's state on; a single position, as in decoding, takes one step of the recurrence."""
        hidden, gate = projected.chunk(2, dim=-1)
        hidden = self.conv(hidden, cache=cache)
        dt, B, C = self._varying(hidden)
        constant = {"D": self.D, "dt_bias": self.dt_bias}
        if hidden.shape[1] == 1:
            x, dt, B, C, z = (one[:, 0] for one in (hidden, dt, B, C, gate))
            return selective_scan_step(cache.state, x, dt, self._decay(), B, C, z=z, **constant)[:, None]
        mixed, cache.state = selective_scan(
            hidden,
            dt,
            self._decay(),
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

    def _decay(self) -> Tensor:
        """A [E, N], negative, fp32."""
        return -self.A_log.float().exp()
