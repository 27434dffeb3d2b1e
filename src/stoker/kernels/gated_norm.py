"""Root-mean-square norm of groups of channels with a gate, before or after it (Mamba-2, arXiv:2405.21060).

    gate first:  v = y · silu(z),   out = v · r · w          r = (mean(v²) + ε)^-½ over each group of channels
    gate last:   v = y,             out = v · r · w · silu(z)

    g  = dout · w (· silu(z) if last)       dv = r · g − v · (r³ / |group|) · Σ_group (g · v)
    dw = Σ_rows dout · v · r (· silu(z) if last)

Saved for backward: y, z and r (one number a group). Statistics are fp32 whatever the dtype of y.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stoker.kernels.triton_support import check_implementation


def gated_rms_norm_reference(
    y: Tensor, z: Tensor, weight: Tensor, epsilon: float, *, groups: int = 1, gate_first: bool = True
) -> Tensor:
    """The formula, step by step; the oracle of the implementations below."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    wide, gate = y.to(dtype), F.silu(z.to(dtype))
    if gate_first:
        wide = wide * gate
    parts = wide.unflatten(-1, (groups, -1))
    parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + epsilon)
    out = parts.flatten(-2) * weight.to(dtype)
    return (out if gate_first else out * gate).to(y.dtype)


def gated_rms_norm(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    groups: int = 1,
    gate_first: bool = True,
    implementation: str = "reference",
) -> Tensor:
    """Returns the gated norm of `y` [..., D], in its dtype.

    z: [..., D], the gate before its SiLU; weight: [D]; the mean is taken over each of `groups` equal parts of the
    channels. `gate_first`: norm(y silu(z)), else norm(y) silu(z). `implementation`: "reference" or "triton"; ValueError
    for an unknown one, and for channels that `groups` does not divide.
    """
    if y.shape[-1] % groups:
        raise ValueError(f"{y.shape[-1]} channels do not split into {groups} groups")
    if check_implementation(implementation):
        raise NotImplementedError
    return gated_rms_norm_reference(y, z, weight, epsilon, groups=groups, gate_first=gate_first)
