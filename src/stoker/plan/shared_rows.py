"""What devices that share rows (engine.context_parallel) send one another, and hold to send it.

Each has a part of every row and, for attention, whole rows with a part of the heads: `kernels/head_exchange.py`, which
is DeepSpeed-Ulysses (arXiv:2309.14509).
"""

from collections.abc import Sequence

from stoker.arch import activations
from stoker.arch.activations import Keep
from stoker.arch.borrowed import AnySpec
from stoker.arch.spec import AttentionSpec, LatentAttentionSpec, LayerSpec
from stoker.plan.remember import remember

# Tensors of an exchange that are alive at once: what is sent, what comes, and the heads that were put into it.
_TENSORS = 3


def sent_values(spec: AnySpec, keep: Sequence[Keep], size: int, *, is_fused: bool) -> float:
    """Returns the values a token of a part that one of `size` devices puts into exchanges in a micro-batch, of which
    (size - 1) / size leave it: q, k, v and what was attended, forward and backward, and what a rung computes again.
    """
    return sum(
        _of_layer(layer, rung, size, spec.hidden_size, is_fused) for layer, rung in zip(spec.layers, keep, strict=True)
    )


def buffer_bytes(spec: AnySpec, tokens: int, size: int, value_bytes: int) -> int:
    """Returns what one device holds to exchange the heads of its widest layer, `tokens` being those of its part."""
    if size == 1:
        return 0
    widest = max((_heads(layer, size)[0] for layer in set(spec.layers)), default=0)
    return _TENSORS * tokens * widest * value_bytes


@remember(0)
def _of_layer(layer: LayerSpec, rung: Keep, size: int, hidden_size: int, is_fused: bool) -> int:
    queried, attended = _heads(layer, size)
    name = layer.mixer_name if layer.mixer is not None else ""
    again = activations.run_again(layer, hidden_size, rung, is_fused=is_fused)
    projected = any(one.startswith(f"{name}.") and one != f"{name}.out" for one in again)
    return (2 + projected) * queried + (2 + (name in again)) * attended


def _heads(layer: LayerSpec, size: int) -> tuple[int, int]:
    """Values a token of q, k and v, and of what is attended; key and value heads are repeated until all have one."""
    mixer = layer.mixer
    if isinstance(mixer, LatentAttentionSpec):
        width = mixer.nope_dim + mixer.rope.dim
        return mixer.num_heads * (2 * width + mixer.value_dim), mixer.num_heads * mixer.value_dim
    if not isinstance(mixer, AttentionSpec):
        return 0, 0
    groups = mixer.num_heads // mixer.num_kv_heads
    repeats = next((n for n in range(1, groups + 1) if groups % n == 0 and mixer.num_kv_heads * n % size == 0), groups)
    return (mixer.num_heads + 2 * repeats * mixer.num_kv_heads) * mixer.head_dim, mixer.num_heads * mixer.head_dim
