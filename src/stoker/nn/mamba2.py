"""The mixer of Mamba-2: a state space with a scalar decay a head, behind a short convolution (arXiv:2405.21060)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stoker.kernels.chunked_scan import chunked_scan, chunked_scan_step
from stoker.kernels.gated_norm import gated_rms_norm
from stoker.nn.causal_conv import CausalConv
from stoker.nn.linear import FusedLinear
from stoker.nn.rotary import Documents
from stoker.nn.state_cache import StateCache


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


class Mamba2(nn.Module):
    """A state space of `num_heads` heads of `head_dim` channels, each channel with `state_size` states.

    B and C are shared by the heads of each of `num_groups`. `in_names`, `out_names`: the Hugging Face module names of
    the linear layers. `norm`: of the result, gated; None: the gate alone. `multipliers` of z, x, B, C and the step
    sizes as they leave the input projection.

    A_log, D and the step sizes' bias stay fp32 in a model of any dtype; the state is computed in fp32.
    """

    keeps_float32 = ("A_log", "D", "dt_bias")

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
        super().__init__()
        self.kernels = kernels
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
        if torch.is_grad_enabled():
            # What lies between is several times as wide as the projection, quick to compute again and draws nothing.
            inner = checkpoint(self._mixed, projected, document_lengths, use_reentrant=False, preserve_rng_state=False)
            return self.out_proj(inner)
        return self.out_proj(self._mixed(projected, document_lengths))

    def reset_parameters(self) -> None:
        """Gives the heads rates of 1 to H, a skip of one, and step sizes of a hundredth."""
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1.0, self.A_log.shape[0] + 1).log())
        nn.init.ones_(self.D)
        nn.init.constant_(self.dt_bias, math.log(math.expm1(0.01)))

    def new_cache(self, *, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> StateCache:
        """An empty cache; `capacity` has no part in it, because a state has one size."""
        return StateCache(
            batch_size,
            window_shape=self.conv.window_shape,
            state_shape=(self.sizes[-1], self.head_dim, self.state_size),
            dtype=dtype,
            device=device,
        )

    def _mixed(self, projected: Tensor, document_lengths: Documents | None) -> Tensor:
        """The output before its projection, [B, T, H P], of the input's projection."""
        gate, convolved, dt = self._split(projected)
        x, B, C = self._convolved(convolved, document_lengths=document_lengths)
        mixed, _ = chunked_scan(
            x,
            dt,
            self._decay(),
            B,
            C,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_limits=self.time_step_limit,
            document_lengths=document_lengths,
            implementation=self.kernels,
        )
        return self._gated(mixed, gate)

    def _continued(self, projected: Tensor, cache: StateCache) -> Tensor:
        """The same from the cache's state on; a single position, as in decoding, takes one step of the recurrence."""
        gate, convolved, dt = self._split(projected)
        x, B, C = self._convolved(convolved, cache=cache)
        constant = {"D": self.D, "dt_bias": self.dt_bias, "dt_limits": self.time_step_limit}
        if x.shape[1] == 1:
            x, dt, B, C = (one[:, 0] for one in (x, dt, B, C))
            mixed = chunked_scan_step(cache.state, x, dt, self._decay(), B, C, **constant)[:, None]
        else:
            mixed, cache.state = chunked_scan(
                x, dt, self._decay(), B, C, initial_state=cache.state, implementation=self.kernels, **constant
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

    def _decay(self) -> Tensor:
        """A [H], negative, fp32."""
        return -self.A_log.float().exp()
