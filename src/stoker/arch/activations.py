"""What layers keep for the backward, and what they run again for it, rung by rung of the recompute ladder. No torch.

The rungs are those of the layer kernel (`kernels/block.py`), whose docstring says what each keeps. A layer that runs op
by op under autograd has only two of them: "all", and "input" (activation checkpointing, Chen et al., arXiv:1604.06174).
One of attention and a mixture of experts has a third, "attention": its result is kept, the rest of the mixer is not.
One of Mamba-1 has "mixer": what lies between its projections is run again.
Bytes are those of the layers' tensors; what the caching allocator adds is the plan's to reckon with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stoker.arch import arithmetic, saved
from stoker.arch.borrowed import AnySpec
from stoker.arch.parts import linears_of, part, parts
from stoker.arch.saved import Adapted, Micro
from stoker.arch.shape import why_not_llama
from stoker.arch.spec import (
    AttentionSpec,
    ExpertsSpec,
    GatedSpec,
    LayerSpec,
    Mamba1Spec,
    Mamba2Spec,
    PlainSpec,
    SideBySideSpec,
)

Keep = Literal["all", "mixer", "attention", "input"]
LADDER: tuple[Keep, ...] = ("all", "mixer", "attention", "input")
"""From keeping most to keeping least; each step down runs more again."""
OP_BY_OP_LADDER: tuple[Keep, ...] = ("all", "input")
FOR_MAGNITUDES = ("attention.out", "feed_forward.down")
"""Linear layers that the layer kernel runs again for the gradient of DoRA's magnitudes."""
SCAN_CHUNK = 16
"""Positions of a chunk of Mamba-1's scan (`kernels/selective_scan_triton.py`)."""
# Tensors on their way to the host or back at any time (`kernels/offload.py`: four leave, or four come).
_IN_FLIGHT = 4


@dataclass(frozen=True)
class Held:
    """Bytes of a layer: `kept` until its backward, `passing` during it, and what waits on the `host` meanwhile.

    `leaving`: what may still be on its way to the host when the forward has ended. `arriving`: its weights' gradients,
    where they are there from its backward on and not before.
    """

    kept: int
    passing: int
    host: int = 0
    leaving: int = 0
    arriving: int = 0


def fused(
    layer: LayerSpec,
    hidden_size: int,
    micro: Micro,
    keep: Keep,
    *,
    offload: bool = False,
    tile_tokens: int | None = None,
) -> Held:
    """Returns what a layer that runs through the layer kernel holds.

    With `tile_tokens` the feed-forward goes through so many tokens at a time, except on the rung "all". Raises
    ValueError for a layer that the kernel cannot run (see `arch.shape`).
    """
    mixer, feed_forward = _llama_parts(layer)
    inner = feed_forward.intermediate_size
    query = mixer.num_heads * mixer.head_dim
    heads = query + 2 * mixer.num_kv_heads * mixer.head_dim
    attention = {"all": heads + query, "mixer": heads + query, "attention": query, "input": 0}[keep]
    beside = {"all": hidden_size + 2 * inner, "mixer": hidden_size, "attention": 0, "input": 0}[keep]
    statistics = 4 * mixer.num_heads if keep != "input" else 0
    away = hidden_size + attention
    on_device = beside + micro.product_values(layer, hidden_size) + (0 if offload else away)
    unit = micro.tokens * micro.value_bytes
    # Gradients of what comes in and goes out, the norm's output, the activation; then what is run again.
    passing = (4 * hidden_size + max(inner, query + 2 * heads)) * unit
    # Queries, keys and values that waited on the host are back while attention's backward runs.
    back = heads * unit if offload and keep in ("all", "mixer") else 0
    passing += back
    if keep != "all":
        in_feed_forward, in_attention = _moments(layer, hidden_size, micro, keep, tile_tokens)
        passing = max(in_feed_forward, in_attention + back)
    else:
        passing += _unturned(layer, micro) * unit
    # Plain PyTorch makes the scaled gate and up beside what the product gave; Triton's kernels scale what they read.
    if micro.is_plain and micro.has_dora("feed_forward.gate_up"):
        passing += 2 * inner * _tile(micro, keep, tile_tokens) * micro.value_bytes
    in_flight = _IN_FLIGHT * max(hidden_size, query) * unit if offload else 0
    passing += in_flight
    of_norms = 2 * 4 * micro.tokens  # a number in fp32 for each of the two norms, on every rung
    return Held(
        on_device * unit + of_norms + (0 if offload else statistics * micro.tokens),
        passing,
        (away * unit + statistics * micro.tokens) if offload else 0,
        in_flight,
    )


def _tile(micro: Micro, keep: Keep, tile_tokens: int | None) -> int:
    """Returns how many tokens go through the feed-forward at a time."""
    return micro.tokens if tile_tokens is None or keep == "all" else min(tile_tokens, micro.tokens)


def _unturned(layer: LayerSpec, micro: Micro) -> int:
    """Values a token of q, k and v as the projection gave them, where the backward reads them beside the turned ones.

    The gradients of heads' norms are made from them, and that of DoRA's magnitudes.
    """
    mixer, _ = _llama_parts(layer)
    is_read = mixer.qk_norm is not None or micro.has_dora("attention.qkv")
    return (mixer.num_heads + 2 * mixer.num_kv_heads) * mixer.head_dim if is_read else 0


def _moments(layer: LayerSpec, hidden_size: int, micro: Micro, keep: Keep, tile_tokens: int | None) -> tuple[int, int]:
    """Bytes during the feed-forward's backward and during attention's, in a layer that makes gate and up again.

    In the feed-forward's backward there are the gradients of what leaves the layer and of the sum after attention, that
    sum itself, and for a tile's tokens (or all) the normed rows, their gradient (before it, of DoRA's, what `down` gave
    and the gradient of that), gate, up and the activation. In attention's, these two gradients, those of what it gave
    and of q, k and v, and that of q once more, summed in fp32; on the lowest rungs q, k and v too, which are made after
    the feed-forward's backward or, with what attention gives, before it; and them as they were before their rotation,
    where that is read.
    """
    mixer, gated = _llama_parts(layer)
    query = mixer.num_heads * mixer.head_dim
    heads = query + 2 * mixer.num_kv_heads * mixer.head_dim
    unturned = _unturned(layer, micro)
    from_start = heads + query + unturned if keep == "input" else 0
    mid = 0 if keep == "mixer" else hidden_size
    tile = _tile(micro, keep, tile_tokens)
    feed_forward = (2 * hidden_size + mid + from_start) * micro.tokens
    feed_forward += (2 * hidden_size + 3 * gated.intermediate_size) * tile
    copies = micro.head_copies * query if mixer.num_kv_heads < mixer.num_heads else 0
    attention = 2 * hidden_size + query + heads + copies
    attention += max(from_start, (0 if keep == "mixer" else heads) + unturned)
    return feed_forward * micro.value_bytes, (attention * micro.value_bytes + 4 * query) * micro.tokens


def attention_workspace(layer: LayerSpec, hidden_size: int, micro: Micro, keep: Keep, tile_tokens: int | None) -> int:
    """Returns what of `fused(...).passing` is attention's own where its backward is the highest moment: its gradient of
    q in fp32 and what it copies for every query head; 0 where the feed-forward's backward needs more."""
    if keep == "all" or why_not_llama(layer):
        return 0
    feed_forward, attention = _moments(layer, hidden_size, micro, keep, tile_tokens)
    mixer, _ = _llama_parts(layer)
    query = mixer.num_heads * mixer.head_dim
    copies = micro.head_copies * query if mixer.num_kv_heads < mixer.num_heads else 0
    return (4 * query + copies * micro.value_bytes) * micro.tokens if attention > feed_forward else 0


def _llama_parts(layer: LayerSpec) -> tuple[AttentionSpec, GatedSpec]:
    mixer, feed_forward = layer.mixer, layer.feed_forward
    if not isinstance(mixer, AttentionSpec) or not isinstance(feed_forward, GatedSpec) or why_not_llama(layer):
        raise ValueError(f"the layer kernel cannot run {why_not_llama(layer)}")
    return mixer, feed_forward


def legal(layers: Sequence[LayerSpec], keep: Sequence[Keep], *, is_fused: bool = True) -> tuple[Keep, ...]:
    """Returns the rungs; where a layer cannot go through the layer kernel, the next lower of those that it has.

    `is_fused`: layers that can go through it do.
    """
    return tuple(
        rung
        if is_fused and not why_not_llama(layer)
        else next(lower for lower in LADDER[LADDER.index(rung) :] if lower in op_by_op_rungs(layer))
        for layer, rung in zip(layers, keep, strict=True)
    )


def op_by_op_rungs(layer: LayerSpec) -> tuple[Keep, ...]:
    """Returns the rungs of a layer that runs op by op, from keeping most to keeping least."""
    if isinstance(layer.mixer, Mamba1Spec):
        return ("all", "mixer", "input")
    if isinstance(layer.mixer, AttentionSpec) and _keeps_little(layer):  # nothing of the mixture is run again
        return ("all", "attention", "input")
    return OP_BY_OP_LADDER


def _keeps_little(layer: LayerSpec) -> bool:
    feed_forward = layer.feed_forward
    is_little = isinstance(feed_forward, ExpertsSpec) and not feed_forward.shared_size
    return layer.placement == "pre" and layer.mixer is not None and is_little


def op_by_op(layer: LayerSpec, hidden_size: int, micro: Micro, keep: Keep) -> Held:
    """Returns what a layer that runs under autograd, op by op, holds; with "input" it is run again as a whole.

    All but a mixture of experts, which keeps its input and little more, and makes the rest again by itself.
    """
    whole = saved.by_layer(layer, hidden_size, micro)
    mixer = layer.mixer
    if keep == "all" and isinstance(mixer, Mamba1Spec) and not micro.is_plain:
        whole += _between(mixer, micro) * micro.tokens
    is_whole = keep == "all" or (keep == "mixer" and isinstance(mixer, Mamba1Spec))
    if _keeps_little(layer):
        return _around_mixture(layer, hidden_size, micro, keep, whole=whole, is_whole=is_whole)
    unit = hidden_size * micro.tokens * micro.in_stream
    inside = list(parts(layer, hidden_size).values())
    widest = inside[-1].widest if inside else 0  # the feed-forward's, which is never narrower than what mixes
    passing = 2 * unit + widest * micro.tokens * micro.value_bytes
    return Held(whole, passing) if is_whole else Held(unit, whole + passing)


def _around_mixture(
    layer: LayerSpec, hidden_size: int, micro: Micro, keep: Keep, *, whole: int, is_whole: bool
) -> Held:
    """What a layer holds whose mixture keeps little by itself; `whole`: bytes that it keeps where nothing runs again.

    Its backward has two moments, one after the other. In the mixture's there are the gradient of what leaves the layer
    (and a narrow copy of a wide one), the normed rows if they are made again, and what the mixture makes. When the
    mixer's comes, all of that is gone, and the mixer has run again if it was not kept.
    """
    mixture, mixer = parts(layer, hidden_size)["feed_forward"], layer.mixer
    stream, row = hidden_size * micro.in_stream, hidden_size * micro.value_bytes
    own, low = _of_mixture(layer, hidden_size, micro), micro.product_values(layer, hidden_size, of="feed_forward.")
    if is_whole:
        kept = whole // micro.tokens
    else:
        kept = stream + own
        if keep == "attention" and isinstance(mixer, AttentionSpec):
            kept += mixer.num_heads * (mixer.head_dim * micro.value_bytes + 4)
    made = stream + (mixture.widest + low) * micro.value_bytes
    made += row if micro.has_wide_stream or not is_whole else 0
    normed = stream  # as the norm gave them, which a router reads
    mixing = whole // micro.tokens - own - normed + 2 * stream + _mixing(layer, hidden_size, micro)
    return Held(kept * micro.tokens, max(made, mixing - kept) * micro.tokens)


def _mixing(layer: LayerSpec, hidden_size: int, micro: Micro) -> int:
    """Bytes a token that a mixer's backward holds besides what is kept, of its own.

    Attention's: gradients of what it gave and of queries, keys and values, that of queries once more, summed in fp32,
    and what it copies for every query head.
    """
    mixer = layer.mixer
    if isinstance(mixer, AttentionSpec):
        query, key = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
        copies = micro.head_copies * query if mixer.num_kv_heads < mixer.num_heads else 0
        return (2 * query + 2 * key + copies) * micro.value_bytes + 4 * query
    return parts(layer, hidden_size)[layer.mixer_name].widest * micro.value_bytes


def arriving(layer: LayerSpec, hidden_size: int, micro: Micro) -> int:
    """Returns the bytes of gradients that a layer's backward leaves (see `Micro.gradient_bytes`)."""
    if not micro.gradient_bytes:
        return 0
    linears = linears_of(layer, hidden_size)
    if micro.adapter is not None:
        return round(micro.gradient_bytes * sum(count for name, count in micro.adapter.parameters if name in linears))
    return round(micro.gradient_bytes * sum(linear.weights * max(1, linear.experts) for linear in linears.values()))


def _of_mixture(layer: LayerSpec, hidden_size: int, micro: Micro) -> int:
    """Bytes a token that a mixture and the sum before it keep: that sum, the mixture's own, and a narrow copy of the
    normed rows, which are made again only as they came."""
    mixture = parts(layer, hidden_size)["feed_forward"]
    statistics = mixture.saved_statistics + (mixture.plain_statistics if micro.is_plain else 0)
    copies = hidden_size * micro.value_bytes if micro.has_wide_stream else 0
    low = micro.product_values(layer, hidden_size, of="feed_forward.")
    statistics += saved.norm_statistics(layer, micro)
    return hidden_size * micro.in_stream + copies + low * micro.value_bytes + 4 * statistics


def _between(mixer: Mamba1Spec, micro: Micro) -> int:
    """Bytes a token that Mamba-1 keeps between its projections where nothing of it is run again.

    What the convolution gives, the step sizes, and for each chunk of the scan its states and its step; B and C as the
    scan reads them. Where all is trained also what step sizes, B and C come from.
    """
    inner, states, narrow = mixer.inner_size, mixer.state_size, mixer.time_step_rank + 2 * mixer.state_size
    values, wide = 2 * inner, (states + 1) * inner / SCAN_CHUNK + 2 * states
    if micro.adapter is None:
        values += narrow
    if mixer.parameter_norm is not None:
        values += mixer.time_step_rank if micro.adapter is None else 0
        wide += 3 + (0 if mixer.parameter_norm.weight else narrow)
    return round(values * micro.value_bytes + 4 * wide)


def peak(runs: Sequence[tuple[Held, int]]) -> int:
    """Returns the bytes of all layers at the backward's peak: when a layer runs it, those after it hold nothing.

    Less those of gradients that have not arrived by then, those of the layers before it: who adds the result to a sum
    of all else, all gradients among it, has the peak. `runs`: layers in their order, each with how many alike follow
    one another, of which the first one's moment or the last one's is the highest.
    """
    total = highest = to_come = 0
    for held, count in runs:
        first = total + held.kept + held.passing - to_come
        last = first + (count - 1) * (held.kept - held.arriving)
        highest = max(highest, first, last)
        total += count * held.kept
        to_come += count * held.arriving
    return highest


def after_forward(runs: Sequence[tuple[Held, int]]) -> int:
    """Returns the bytes of all layers when the forward has ended and the head runs; `runs` as `peak` takes them."""
    return sum(count * held.kept for held, count in runs) + max((held.leaving for held, _ in runs), default=0)


def recomputed_flops_per_token(
    spec: AnySpec, sequence_length: int, keep: Sequence[Keep], *, is_fused: bool, adapter: Adapted | None = None
) -> float:
    """Returns the FLOPs that backward runs again, a token; `keep` names the rung of each layer.

    The layer kernel runs `down` again for DoRA's magnitudes alone. Autograd's checkpoint runs the whole layer, up to a
    last product whose input it then has.
    """
    total = 0.0
    for layer, rung in zip(spec.layers, keep, strict=True):
        flops = arithmetic.layer_flops_per_token(layer, spec.hidden_size, sequence_length)
        again = run_again(layer, spec.hidden_size, rung, is_fused=is_fused, adapter=adapter)
        total += sum(flops[name] for name in again)
        total += sum(flops[name] for name in _always_again(layer, rung))
        if rung == "input" and adapter is None and not (is_fused and not why_not_llama(layer)):
            total -= flops.get(_last_product(layer), 0.0)
        if isinstance(mixer := layer.mixer, SideBySideSpec):
            total += part(mixer.state_space, spec.hidden_size).flops(sequence_length)
    return total


def _last_product(layer: LayerSpec) -> str:
    """The linear layer with which a layer that is run again ends, "" where something that keeps more follows it."""
    if layer.placement in ("post", "sandwich"):
        return ""
    feed_forward = layer.feed_forward
    if isinstance(feed_forward, GatedSpec | PlainSpec):
        return "feed_forward.down"
    if isinstance(feed_forward, ExpertsSpec) and not _keeps_little(layer):
        return "" if feed_forward.shared_gate else "feed_forward.shared.down"
    if isinstance(layer.mixer, SideBySideSpec):
        return "mixer.state_space.out_proj"
    return f"{layer.mixer_name}.{'out' if layer.mixer_name == 'attention' else 'out_proj'}"


def _always_again(layer: LayerSpec, keep: Keep) -> tuple[str, ...]:
    """What a layer's own operations run again by themselves, on every rung: experts' first product, and what lies
    between the projections of a state space, which a whole layer that is run again runs once more."""
    if isinstance(layer.mixer, Mamba2Spec):
        return "mixer", *by_mixture(layer)
    if isinstance(layer.mixer, Mamba1Spec) and keep == "input":
        return "mixer", "mixer.x_proj", *by_mixture(layer)
    return by_mixture(layer)


def by_mixture(layer: LayerSpec) -> tuple[str, ...]:
    """Returns what the backward of a mixture of experts makes again, on every rung: its first product."""
    return ("feed_forward.experts.gate_up",) if isinstance(layer.feed_forward, ExpertsSpec) else ()


def run_again(
    layer: LayerSpec, hidden_size: int, keep: Keep, *, is_fused: bool, adapter: Adapted | None = None
) -> tuple[str, ...]:
    """Returns what a layer's backward runs again on its rung, by the names of `arithmetic.layer_flops_per_token`."""
    if is_fused and not why_not_llama(layer):
        for_magnitudes = FOR_MAGNITUDES if adapter is not None and adapter.dora else ()
        return _RUN_AGAIN[keep] + tuple(name for name in for_magnitudes if adapter and name in adapter.names)
    if keep == "all":
        return ()
    names, mixer = tuple(arithmetic.layer_flops_per_token(layer, hidden_size, 1)), layer.mixer_name
    if keep == "mixer" and isinstance(layer.mixer, Mamba1Spec):
        return mixer, f"{mixer}.x_proj"
    if _keeps_little(layer):
        left_out = ("feed_forward", mixer, f"{mixer}.out") if keep == "attention" else ("feed_forward",)
        return tuple(name for name in names if name not in left_out and not name.startswith("feed_forward."))
    return names


_RUN_AGAIN: dict[Keep, tuple[str, ...]] = {
    "all": (),
    "mixer": ("feed_forward.gate_up",),
    "attention": ("feed_forward.gate_up", "attention.qkv", "attention.out"),
    "input": ("feed_forward.gate_up", "attention.qkv", "attention.out", "attention"),
}
