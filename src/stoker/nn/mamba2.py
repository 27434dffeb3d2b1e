"""The mixer of Mamba-2: a state space with a scalar decay a head, behind a short convolution (arXiv:2405.21060)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stoker.kernels.chunked_scan import chunked_scan, chunked_scan_step
from stoker.kernels.gated_norm import gated_rms_norm
from stoker.nn.causal_conv import CausalConv
from stoker.nn.linear import FusedLinear
from stoker.nn.rotary import Documents
from stoker.nn.state_cache import StateCache
from stoker.nn.state_space import StateSpace


class GatedNorm(nn.Module):
    """A root-mean-square norm of each of `groups` equal parts of `size` channels, with a gate before or after it."""

    def __init__(
        self, size: int, *, epsilon: float, groups: int = 1, gate_first: bool = True, kernels: str = "reference"
    ) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.groups = groups
        self.gate_first = gate_first
        self.kernels = kernels
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """y and the gate before its SiLU [..., size], to the same shape and the dtype of y."""
        return gated_rms_norm(
            y,
            gate,
            self.weight,
            self.epsilon,
            groups=self.groups,
            gate_first=self.gate_first,
            implementation=self.kernels,
        )

    def reset_parameters(self) -> None:
        """Makes the norm multiply by one."""
        nn.init.ones_(self.weight)


class Mamba2(StateSpace):
    """A state space of `num_heads` heads of `head_dim` channels, each channel with `state_size` states.

    B and C are shared by the heads of each of `num_groups`. `in_names`, `out_names`: the Hugging Face module names of
    the linear layers. `norm`: of the result, gated; None: the gate alone. `multipliers` of z, x, B, C and the step
    sizes as they leave the input projection.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        state_size: int,
        num_groups: int,
        conv_kernel: int,
        in_names: tuple[str, ...],
        out_names: tuple[str, ...],
        norm: GatedNorm | None = None,
        conv_bias: bool = True,
        bias: bool = False,
        time_step_limit: tuple[float, float] = (0.0, math.inf),
        multipliers: Sequence[float] | None = None,
        kernels: str = "reference",
    ) -> None:
        super().__init__(kernels=kernels)
        self.head_dim = head_dim
        self.state_size = state_size
        self.time_step_limit = time_step_limit
        inner_size, group_size = num_heads * head_dim, num_groups * state_size
        self.sizes = [inner_size, inner_size, group_size, group_size, num_heads]
        self.multipliers = None if multipliers is None or set(multipliers) == {1.0} else tuple(multipliers)
        self.in_proj = FusedLinear(hidden_size, (sum(self.sizes),), names=in_names, bias=bias)
        self.conv = CausalConv(inner_size + 2 * group_size, conv_kernel, bias=conv_bias, kernels=kernels)
        self.dt_bias = nn.Parameter(torch.zeros(num_heads))
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.D = nn.Parameter(torch.ones(num_heads))
        self.norm = norm
        self.out_proj = FusedLinear(inner_size, (hidden_size,), names=out_names, bias=bias, by_name_only=True)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Heads, channels of a head, states."""
        return self.sizes[-1], self.head_dim, self.state_size

    def mixed(self, projected: Tensor, document_lengths: Documents | None) -> Tensor:
        """[B, T, all sizes] to [B, T, H P]."""
        gate, convolved, dt = self._split(projected)
        x, B, C = self._convolved(convolved, document_lengths=document_lengths)
        mixed, _ = chunked_scan(
            x,
            dt,
            self.decay(),
            B,
            C,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_limits=self.time_step_limit,
            document_lengths=document_lengths,
            implementation=self.kernels,
        )
        return self._gated(mixed, gate)

    def continued(self, projected: Tensor, cache: StateCache) -> Tensor:
        """The same with a cache."""
        gate, convolved, dt = self._split(projected)
        x, B, C = self._convolved(convolved, cache=cache)
        constant = {"D": self.D, "dt_bias": self.dt_bias, "dt_limits": self.time_step_limit}
        if x.shape[1] == 1:
            x, dt, B, C = (one[:, 0] for one in (x, dt, B, C))
            mixed = chunked_scan_step(cache.state, x, dt, self.decay(), B, C, **constant)[:, None]
        else:
            mixed, cache.state = chunked_scan(
                x, dt, self.decay(), B, C, initial_state=cache.state, implementation=self.kernels, **constant
            )
        return self._gated(mixed, gate)

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate, what the convolution reads (x, B and C side by side), and the step sizes."""
        if self.multipliers is not None:
            parts = projected.split(self.sizes, dim=-1)
            projected = torch.cat([part * scale for part, scale in zip(parts, self.multipliers, strict=True)], dim=-1)
        gate, convolved, dt = projected.split([self.sizes[0], sum(self.sizes[1:4]), self.sizes[4]], dim=-1)
        return gate, convolved, dt

    def _convolved(
        self, inputs: Tensor, *, document_lengths: Documents | None = None, cache: StateCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, H, P], B and C [B, T, G, N] after the convolution."""
        out = self.conv(inputs, document_lengths=document_lengths, cache=cache)
        x, B, C = out.split(self.sizes[1:4], dim=-1)
        sizes = (self.head_dim, self.state_size, self.state_size)
        x, B, C = (part.unflatten(-1, (-1, size)) for part, size in zip((x, B, C), sizes, strict=True))
        return x, B, C

    def _gated(self, mixed: Tensor, gate: Tensor) -> Tensor:
        mixed = mixed.flatten(2)
        return mixed * nn.functional.silu(gate) if self.norm is None else self.norm(mixed, gate)
