"""The floor of a training step: the time of nothing but the matrix products and attention that it needs.

No adapters, norms, activations, optimiser or launches count, so no engine reaches it; a share of it compares engines
across devices. It is measured on the device at hand, each product in the shape that the step has it in. Forward and
input gradients are needed for every layer and the head; weight gradients only where weights are trained.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.arch import arithmetic
from stoker.arch.borrowed import AnySpec
from stoker.arch.spec import AttentionSpec, ExpertsSpec, Mamba1Spec, Mamba2Spec, SideBySideSpec

if TYPE_CHECKING:
    import torch

_HEAD_ROWS = 4096
"""Rows of the head's product at once: engines that hold all logits are no faster for it."""


@dataclass(frozen=True)
class Product:
    """A matrix product `[rows, inner] x [inner, columns]`; `fp8`: by a weight that may be in fp8."""

    rows: int
    inner: int
    columns: int
    fp8: bool

    @property
    def flops(self) -> int:
        """Multiply-adds count as two."""
        return 2 * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Work:
    """What a micro-batch needs: products, and how often; those of the layers' forward again; attention by layer."""

    products: Counter[Product]
    forward: Counter[Product]
    attention: Counter[AttentionSpec]


@dataclass(frozen=True)
class Floor:
    """Seconds of a step at the floor; `recomputed_seconds` with every layer's forward run twice, as by checkpointing.

    `flops`: of a step, nothing counted twice. `peak_flops`: a second, of the largest product tried, in the precision of
    the run. `attention_seconds` are part of `seconds`.
    """

    seconds: float
    recomputed_seconds: float
    attention_seconds: float
    flops: float
    peak_flops: float


def work(spec: AnySpec, *, tokens: int, trained_tokens: int, frozen: bool) -> Work:
    """Returns what a micro-batch of `tokens` tokens needs, with the head over `trained_tokens` of them."""
    forward: Counter[Product] = Counter()
    needed: Counter[Product] = Counter()
    for layer in spec.layers:
        for linear in arithmetic.linears(layer, spec.hidden_size).values():
            inner, columns, rows = linear.in_features, sum(linear.out_features), round(tokens * linear.used)
            forward[Product(rows, inner, columns, frozen)] += 1
            needed.update(_uses(rows, inner, columns, fp8=frozen, weight_gradient=not frozen))
    full, rest = divmod(trained_tokens, _HEAD_ROWS)
    for rows in (*[_HEAD_ROWS] * full, *([rest] if rest else [])):
        needed.update(_uses(rows, spec.hidden_size, spec.vocab_size, fp8=frozen, weight_gradient=not frozen))
    mixers = [layer.mixer for layer in spec.layers]
    # The scans of state spaces, and attention of a class of Transformers, are left out: the floor is lower than theirs.
    return Work(needed, forward, Counter(mixer for mixer in mixers if isinstance(mixer, AttentionSpec)))


def simplified(spec: AnySpec) -> str:
    """Returns what the floor of this architecture is not, as a sentence, or ""."""
    mixers = [layer.mixer for layer in spec.layers]
    if any(isinstance(mixer, Mamba1Spec | Mamba2Spec | SideBySideSpec) for mixer in mixers):
        return "the floor counts matrix products and attention; convolutions and scans of state spaces are left out"
    if any(isinstance(getattr(layer, "feed_forward", None), ExpertsSpec) for layer in spec.layers):
        return "the floor takes all experts' products for one dense product with as many rows"
    return ""


def _uses(rows: int, inner: int, columns: int, *, fp8: bool, weight_gradient: bool) -> list[Product]:
    """Forward, gradient of the input and, where the weight is trained, its gradient."""
    uses = [Product(rows, inner, columns, fp8), Product(rows, columns, inner, fp8)]
    return [*uses, Product(columns, rows, inner, False)] if weight_gradient else uses


def seen_keys(lengths: Sequence[int], window: int | None = None) -> int:
    """Pairs of a position and a key it sees, over documents of `lengths` tokens, causal, within a sliding window."""
    total = 0
    for length in lengths:
        reach = min(window or length, length)
        total += reach * (reach + 1) // 2 + (length - reach) * reach
    return total


def measure(
    spec: AnySpec,
    *,
    rows: int,
    length: int,
    documents: Sequence[int],
    trained_tokens: int,
    micro_batches: int,
    frozen: bool,
    device: "torch.device",
    dtype: "torch.dtype",
    fp8: bool = False,
) -> Floor:
    """Measures the floor of a step of `micro_batches` micro-batches of `rows` rows of `length` tokens.

    `documents`: the lengths of a micro-batch's documents; attention counts for the keys that they see, at the speed
    that full rows have. `trained_tokens`: of a micro-batch. `fp8`: the products of frozen layers are timed in fp8.
    """
    needed = work(spec, tokens=rows * length, trained_tokens=trained_tokens, frozen=frozen)
    times = {product: _time_product(product, device, dtype, fp8=fp8 and product.fp8) for product in needed.products}
    products = sum(times[product] * count for product, count in needed.products.items())
    again = sum(times[product] * count for product, count in needed.forward.items())
    attention = [0.0, 0.0]
    attention_flops = 0.0
    for mixer, count in needed.attention.items():
        share = seen_keys(documents, mixer.window) / seen_keys([length] * rows)
        for part, seconds in enumerate(_time_attention(mixer, rows, length, device, dtype)):
            attention[part] += seconds * share * count
        # Two products forward and four backward of 2 * head_dim for each pair (arXiv:2204.02311, appendix B).
        attention_flops += count * 12 * mixer.num_heads * mixer.head_dim * seen_keys(documents, mixer.window)
    flops = sum(product.flops * count for product, count in needed.products.items()) + attention_flops
    seconds = products + sum(attention)
    return Floor(
        micro_batches * seconds,
        micro_batches * (seconds + again + attention[0]),
        micro_batches * sum(attention),
        micro_batches * flops,
        _peak(device, dtype, fp8=fp8),
    )


def _time_product(product: Product, device: "torch.device", dtype: "torch.dtype", *, fp8: bool) -> float:
    """Seconds of a product, its right side stored by columns as a layer's weight is."""
    import torch

    left = torch.randn(product.rows, product.inner, device=device).to(dtype)
    right = torch.randn(product.columns, product.inner, device=device).to(dtype).mul_(0.02)
    if not fp8:
        return seconds_of(lambda: left @ right.t(), device)
    one = torch.ones((), device=device)
    left8, right8 = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()

    def run() -> object:
        return torch._scaled_mm(left8, right8, scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=True)

    return seconds_of(run, device)


def _time_attention(
    mixer: AttentionSpec, rows: int, length: int, device: "torch.device", dtype: "torch.dtype"
) -> tuple[float, float]:
    """Seconds of causal attention forward and backward, each by the fastest backend that PyTorch has here."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    heads = (mixer.num_heads, mixer.num_kv_heads, mixer.num_kv_heads)
    q, k, v = (
        torch.randn(rows, count, length, mixer.head_dim, device=device).to(dtype).requires_grad_() for count in heads
    )

    def attend() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    found = []
    for backend in backends if device.type == "cuda" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]:
        try:
            with sdpa_kernel(backend):
                output = attend()
                grad = torch.randn_like(output)
                with torch.no_grad():
                    forward = seconds_of(attend, device)
                backward = seconds_of(
                    lambda out=output, g=grad: torch.autograd.grad(out, (q, k, v), g, retain_graph=True), device
                )
        except RuntimeError:  # this backend does not run these shapes on this device
            continue
        found.append((forward, backward))
    if not found:
        return 0.0, 0.0
    return min(one for one, _ in found), min(one for _, one in found)


def _peak(device: "torch.device", dtype: "torch.dtype", *, fp8: bool) -> float:
    """FLOPs a second of a large square product."""
    size = 8192 if device.type == "cuda" else 1024
    product = Product(size, size, size, fp8=fp8)
    return product.flops / _time_product(product, device, dtype, fp8=fp8)


def seconds_of(run: Callable[[], object], device: "torch.device") -> float:
    """Median seconds of `run` on `device` after warming up."""
    import torch

    if device.type != "cuda":
        return _seconds_on_host(run)
    for _ in range(3):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(10)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def _seconds_on_host(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
