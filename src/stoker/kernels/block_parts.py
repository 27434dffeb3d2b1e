"""What forward and backward of a layer share: its tensors as projections, its norms, rotation and attention.

`kernels/block.py` says what a layer is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stoker.kernels import head_norm, rms_norm, rope, rounded_rotation
from stoker.kernels.attention import attention
from stoker.kernels.documents import DocumentLengths
from stoker.kernels.feed_forward import BlockOptions
from stoker.kernels.fp8 import Rounded
from stoker.kernels.kept_attention import Attend
from stoker.kernels.projection import FrozenMatrix, Projection
from stoker.kernels.rounded_rotation import rotate_back_rounded


class Fixed(NamedTuple):
    """What a projection has besides tensors."""

    weight: FrozenMatrix | None
    scaling: float
    slices: tuple[slice, ...]
    rate: float
    seed: int


class Layout(NamedTuple):
    """What is not a tensor: projections without theirs, options, documents."""

    projections: tuple[Fixed, ...]
    options: BlockOptions
    document_lengths: DocumentLengths | None


def projections_of(
    layout: Layout, scales: Sequence[Tensor | None], tensors: Sequence[Tensor | None], dtype: torch.dtype
) -> list[Projection]:
    """The four projections with their tensors, which are cast to the working dtype."""
    result = []
    for index, fixed in enumerate(layout.projections):
        weight, bias, a, b = (None if x is None else x.to(dtype) for x in tensors[4 * index : 4 * index + 4])
        matrix = fixed.weight if weight is None else weight
        if matrix is None:
            raise ValueError("a projection has no weight")
        result.append(Projection(matrix, bias, a, b, *fixed[1:], scales[index]))
    return result


def attend_by(layout: Layout) -> Attend:
    """Attention by the layout's documents, window and kernels."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = layout.options
        attended = attention(
            q,
            k,
            v,
            document_lengths=layout.document_lengths,
            window=options.window,
            scale=options.scale,
            implementation=options.implementation,
        )
        return attended.flatten(2)

    return attend


def to_heads(layout: Layout, heads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """q, k and v as attention takes them: of whole rows, where ranks share rows."""
    exchange = layout.options.exchange
    return heads if exchange is None else exchange.queries_to_heads(*heads)


def to_rows(layout: Layout, attended: Tensor) -> Tensor:
    """Attended values as the output projection takes them [N, H · E]: of this rank's part, where ranks share rows.

    They are sent anew wherever they are wanted: kept beside those that attention keeps they would be there twice.
    """
    exchange = layout.options.exchange
    return (attended if exchange is None else exchange.attended_to_rows(attended)).flatten(0, 1)


class Turn:
    """What happens to queries and keys between projection and attention: norms of heads where there are, a rotation."""

    def __init__(
        self, options: BlockOptions, tables: tuple[Tensor, Tensor], q_norm: Tensor | None, k_norm: Tensor | None
    ) -> None:
        self._options, self._tables = options, tables
        self._weights = None if q_norm is None or k_norm is None else (q_norm, k_norm)

    @property
    def norms(self) -> bool:
        """Whether heads are normed, so that the backward needs what the projection gave."""
        return self._weights is not None

    def rounds(self, head_dim: int) -> bool:
        """Whether Triton's backward can leave the projection's gradient in fp8 as well."""
        options = self._options
        return not self.norms and rounded_rotation.takes(
            options.num_heads, options.num_kv_heads, head_dim, 2 * self._tables[0].shape[-1]
        )

    def __call__(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """q, k and v [B, T, heads, E] of the projection's output [B, T, (H + 2K) · E]."""
        options = self._options
        sizes = {"num_heads": options.num_heads, "num_kv_heads": options.num_kv_heads}
        if self._weights is not None:
            return head_norm.norm_split_and_rotate(
                qkv,
                *self._weights,
                *self._tables,
                epsilon=options.head_epsilon,
                **sizes,
                implementation=options.implementation,
            )
        return rope.split_and_rotate(
            qkv, *self._tables, **sizes, interleaved=options.interleaved, implementation=options.implementation
        )

    def backward(
        self,
        grads: Sequence[Tensor],
        qkv: Tensor | None,
        *,
        needs_weights: bool,
        rounded: tuple[Rounded, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of the projection's output and of the norms' weights, from those of q, k and v.

        `rounded`, where the turn `rounds`, takes the first in fp8, times the factor beside it.
        """
        options = self._options
        if self._weights is None or qkv is None:
            interleaved, implementation = options.interleaved, options.implementation
            if rounded is not None:
                grad = rotate_back_rounded(grads, *self._tables, *rounded, interleaved=interleaved)
            else:
                grad = rope.split_and_rotate_backward(
                    grads, *self._tables, interleaved=interleaved, implementation=implementation
                )
            return grad, None, None
        return head_norm.norm_split_and_rotate_backward(
            grads,
            qkv,
            *self._weights,
            *self._tables,
            epsilon=options.head_epsilon,
            needs_weights=needs_weights,
            implementation=options.implementation,
        )


def norm(
    x: Tensor, weight: Tensor, epsilon: float, implementation: str, rounded: Rounded | None = None
) -> tuple[Tensor, Tensor]:
    """(norm of x, its rstd) for rows x [N, D]; `rounded`, which Triton's alone fills, takes the former in fp8."""
    if implementation == "triton":
        normed, _, rstd = rms_norm.launch_forward(x, None, weight, epsilon, rounded=rounded)
        return normed, rstd
    rstd = torch.rsqrt(x.float().pow(2).mean(-1) + epsilon)
    return rms_norm.rms_norm_reference(x, weight, epsilon), rstd


def norm_backward(
    grad: Tensor,
    grad_residual: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    needs_weight: bool,
    implementation: str,
    rounded: tuple[Rounded, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(gradient of x with `grad_residual` added, gradient of weight or None).

    `rounded`, which Triton's alone fills, takes the former in fp8, times the factor beside it.
    """
    if implementation == "triton":
        room, factor = rounded or (None, None)
        options = {"needs_input": True, "needs_weight": needs_weight, "rounded": room, "factor": factor}
        grad_x, grad_weight = rms_norm.launch_backward(grad, grad_residual, x, weight, rstd, **options)
        return x if grad_x is None else grad_x, grad_weight
    wide, rstd = x.float(), rstd[:, None]
    scaled = grad.float() * weight.float()
    dot = (scaled * wide).mean(-1, keepdim=True)
    grad_x = grad_residual + (rstd * scaled - rstd.pow(3) * dot * wide)
    grad_weight = (grad.float() * wide * rstd).sum(0) if needs_weight else None
    return grad_x.to(x.dtype), grad_weight
