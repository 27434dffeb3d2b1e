"""fp8 (e4m3) weights with one scale for each output row, multiplied in fp8 where the GPU can."""

import torch
from torch import Tensor

from stoker.kernels import fp8 as kernel
from stoker.quant.frozen import FrozenBuffers, Scratch

MAX_RELATIVE_ERROR = 0.06
"""Of a layer's output, beyond which the layer should not be in fp8. Rounding weight and input to three mantissa bits
alone moves an output by 3.7% (2.6% each); more means that values fell below e4m3's smallest step."""
_ROWS_AT_ONCE = 4096


class Fp8Weight(FrozenBuffers):
    """A frozen weight W = diag(scale) Q `[out, in]`, Q in e4m3, 8 bits a value.

    Products quantise their input row by row to e4m3 and so carry its rounding (about 3% a value, 2^-4 at most): this
    is a faster base, not only a smaller one. `relative_error` says how far a layer's output moves; layers that move by
    more than MAX_RELATIVE_ERROR should stay in bf16. The input gradient needs Q transposed in memory (the hardware
    reads along the contracted dimension): it is written into `scratch` each time, or kept beside Q with
    `keep_transposed`, for 8 more bits a value.
    """

    quantized: Tensor
    scale: Tensor
    transposed: Tensor | None

    accumulates = False  # a scaled product cannot

    scales_after = True
    """Products of layers with adapters are made without scales, which the pass of the updates puts in
    (`kernels/scaled_update.py`). False: each product scales rows itself, which rounds once less."""

    rounds_early = True
    """Norms and gates leave rows in fp8 beside the compute type, so that no pass of its own reads them for that; the
    values are the same. False: each product rounds what it reads."""

    fast_gradients = True
    """Whether input gradients are summed in the tensor core's own registers, as outputs are: about 14 bits between
    partial sums, each of which may be cut by 2^-14. Over the longest sum of an 8B, 28,672 values in 896 steps, that is
    some 3% at most, less than e4m3's own rounding of a gradient, and no more for any shorter one."""

    def __init__(
        self,
        quantized: Tensor,
        scale: Tensor,
        *,
        keep_transposed: bool = False,
        scratch: Scratch | None = None,
        implementation: str = "reference",
    ) -> None:
        super().__init__()
        self.shape = quantized.shape
        self.scratch = scratch
        self.implementation = implementation
        self.register_buffer("quantized", quantized)
        self.register_buffer("scale", scale)
        self.register_buffer("transposed", None)
        self.set_transposed(kept=keep_transposed)

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        *,
        keep_transposed: bool = False,
        scratch: Scratch | None = None,
        implementation: str = "reference",
    ) -> "Fp8Weight":
        """Returns `weight` `[out, in]` in e4m3 with one scale a row, on its own device."""
        quantized, scale = kernel.quantize_rows(weight.detach(), implementation=implementation)
        return cls(quantized, scale, keep_transposed=keep_transposed, scratch=scratch, implementation=implementation)

    def set_transposed(self, *, kept: bool) -> None:
        """Keeps Q transposed beside Q from now on, or lets go of it; products stay the same bit for bit."""
        if kept and self.transposed is None:
            self.transposed = self.quantized.T.contiguous()
        elif not kept:
            self.transposed = None

    def dequantize(self, out: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
        """Returns the weight in `dtype` `[out, in]`, in `out` when given."""
        values = self.quantized.float().mul_(self.scale)
        return values.to(dtype) if out is None else out.copy_(values)

    def _transposed(self) -> Tensor:
        if self.transposed is not None:
            return self.transposed
        if self.scratch is None:
            return self.quantized.T.contiguous()
        buffer = self.scratch.take(self.shape[::-1], dtype=kernel.FP8, device=self.quantized.device)
        return buffer.copy_(self.quantized.T)

    def matmul(self, x: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """Returns `x @ W.T` of `x` with rows rounded to e4m3, `[..., in]` to `[..., out]`; added to `onto` if given."""
        rows, row_scale = kernel.quantize_rows(x.flatten(0, -2), implementation=self.implementation)
        # The forward product may accumulate fast: that error is far below the one of rounding x to four bits.
        output = kernel.scaled_matmul(
            rows, self.quantized, x_scale=row_scale, weight_scale=self.scale, dtype=x.dtype, fast_accumulation=True
        )
        output = output.view(*x.shape[:-1], self.shape[0])
        return output if onto is None else onto.add_(output)

    @property
    def gradient_factor(self) -> Tensor:
        """W's scales, fp32 `[out]`: they go into an output's gradient before it is rounded."""
        return self.scale.flatten()

    def unscaled(self, x: Tensor | kernel.Rounded) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns R `[N, out]` in bf16 and its scales, of rows `[N, 1]` and of columns: `x @ W.T` is their product."""
        rows, row_scale = self._rounded(x)
        return kernel.plain_matmul(rows, self.quantized, fast_accumulation=True), row_scale, self.scale

    def _rounded(self, x: Tensor | kernel.Rounded, factor: Tensor | None = None) -> kernel.Rounded:
        if isinstance(x, kernel.Rounded):
            return x
        return kernel.quantize_rows(x, factor, implementation=self.implementation)

    def unscaled_transposed(self, grad: Tensor | kernel.Rounded) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the same of `grad @ W` for `grad` `[N, out]`; W's scales are in R already, hence None.

        In fp8, `grad` holds `gradient_factor` already.
        """
        rows, row_scale = self._rounded(grad, self.gradient_factor)
        raw = kernel.plain_matmul(rows, self._transposed(), fast_accumulation=self.fast_gradients)
        return raw, row_scale, None

    def matmul_transposed(self, grad: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """Returns `grad @ W`, `[..., out]` to `[..., in]`; W's scales go into `grad` before it is rounded."""
        rows, row_scale = kernel.quantize_rows(
            grad.flatten(0, -2), self.scale.flatten(), implementation=self.implementation
        )
        ones = torch.ones((self.shape[1], 1), dtype=torch.float32, device=grad.device)
        output = kernel.scaled_matmul(
            rows,
            self._transposed(),
            x_scale=row_scale,
            weight_scale=ones,
            dtype=grad.dtype,
            fast_accumulation=self.fast_gradients,
        )
        output = output.view(*grad.shape[:-1], self.shape[1])
        return output if onto is None else onto.add_(output)


def relative_error(weight: Fp8Weight, original: Tensor, x: Tensor) -> float:
    """Returns `||fp8(x W) - x W|| / ||x W||` on inputs `x` `[N, in]`: what fp8 does to this layer's output."""
    return product_error(weight, x, exact_product(x, original), (weight.shape[0],))


def exact_product(x: Tensor, weight: Tensor) -> Tensor:
    """Returns `x W` `[N, out]` in float32, a piece of W at a time: all of it so wide would be the largest thing in
    memory."""
    return torch.cat([x.float() @ rows.float().T for rows in weight.split(_ROWS_AT_ONCE)], dim=1)


def product_error(weight: Fp8Weight, x: Tensor, expected: Tensor, part_rows: tuple[int, ...]) -> float:
    """Returns the relative error of `x W` `[N, out]` against `expected`, float32, of the worst part of its columns.

    `part_rows` are the sizes of the parts: a small k in a fused q, k, v is measured on its own. NaN where the weight
    or a product is not finite.
    """
    return worst_error(weight.matmul(x).float(), expected, part_rows)


def worst_error(made: Tensor, expected: Tensor, part_rows: tuple[int, ...]) -> float:
    """Returns how far `made` `[N, out]` is from `expected`, both float32, as a share of it, as `product_error` does."""
    pairs = zip(made.split(part_rows, dim=-1), expected.split(part_rows, dim=-1), strict=True)
    errors = torch.stack([(one - other).norm() / other.norm().clamp(min=1e-30) for one, other in pairs])
    return errors.max().item()  # of a NaN and a number, NaN
