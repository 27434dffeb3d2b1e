"""Which layers are shaped as Llama's are, for which there is a kernel that runs a whole layer. No torch.

The kernel computes more than Llama: any gated activation, partial and interleaved rotation, norms stored less one,
queries and keys normed head by head.
"""

from functools import lru_cache

from stoker.arch.spec import AttentionSpec, GatedSpec, LayerSpec, NormSpec


@lru_cache(maxsize=1024)
def why_not_llama(layer: LayerSpec) -> str:
    """Returns what the layer has that the layer kernel does not compute ("" if nothing), to follow "the model has"."""
    mixer, feed_forward = layer.mixer, layer.feed_forward
    if not isinstance(mixer, AttentionSpec):
        return "layers without ordinary attention"
    if not isinstance(feed_forward, GatedSpec):
        return "feed-forwards of another kind than gated"
    return _of_layer(layer) or _of_attention(mixer) or _of_feed_forward(feed_forward)


def _of_layer(layer: LayerSpec) -> str:
    if layer.norm != NormSpec(epsilon=layer.norm.epsilon, weight_offset=layer.norm.weight_offset):
        return "norms of another kind than plain RMS"
    if layer.placement != "pre":
        return f"norms or parts placed otherwise than one after the other ({layer.placement})"
    return f"a residual scale of {layer.residual_scale:g}" if layer.residual_scale != 1.0 else ""


def _of_attention(mixer: AttentionSpec) -> str:
    found = {
        "no positions": mixer.rope is None,
        "norms of queries and keys other than of whole turned heads": _norms_otherwise(mixer),
        "soft-capped scores": mixer.softcap is not None,
        "attention sinks": mixer.sinks,
        "clipped queries, keys and values": mixer.clip_qkv is not None,
        "queries, keys and values stored by groups": mixer.qkv_layout != "blocks",
    }
    return next((what for what, there in found.items() if there), "")


def _norms_otherwise(mixer: AttentionSpec) -> bool:
    """Whether queries and keys are normed, and not head by head by one RMS norm before whole heads turn by halves."""
    norm, rope = mixer.qk_norm, mixer.rope
    if norm is None:
        return False
    is_rms = norm.kind == "rms" and norm.weight and not norm.bias and mixer.qk_norm_over == "head"
    return not (is_rms and rope is not None and rope.dim == mixer.head_dim and not rope.interleaved)


def _of_feed_forward(feed_forward: GatedSpec) -> str:
    if feed_forward.activation not in ("silu", "gelu", "gelu_tanh"):
        return f"feed-forwards gated by {feed_forward.activation}"
    scaled = (feed_forward.gate_scale, feed_forward.down_scale) != (1.0, 1.0)
    return "scaled feed-forwards" if scaled else ""
