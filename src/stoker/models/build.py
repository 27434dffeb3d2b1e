"""`ArchSpec` to modules on the meta device: one function for each type of mixer and feed-forward.

A new type is one function and one line in `MIXERS` or `FEED_FORWARDS` (and one in `arch.parts`).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from stoker.arch.families import weight_map
from stoker.arch.parts import qk_norm_shapes
from stoker.arch.spec import (
    ArchSpec,
    AttentionSpec,
    ExpertsSpec,
    GatedSpec,
    LatentAttentionSpec,
    LayerSpec,
    Mamba1Spec,
    Mamba2Spec,
    NormSpec,
    PlainSpec,
    RopeSpec,
    SideBySideSpec,
)
from stoker.nn.attention import Attention
from stoker.nn.block import PLACEMENTS, Block
from stoker.nn.decoder import Decoder
from stoker.nn.feed_forward import GatedFeedForward, PlainFeedForward
from stoker.nn.latent_attention import LatentAttention
from stoker.nn.mamba1 import Mamba1
from stoker.nn.mamba2 import GatedNorm, Mamba2
from stoker.nn.moe import Experts, Router
from stoker.nn.norm import HeadNorm, LayerNorm, Norm, RmsNorm
from stoker.nn.rotary import Rotary
from stoker.nn.side_by_side import SideBySide


@dataclass(frozen=True)
class Site:
    """Where a mixer or a feed-forward goes: `names` are the Hugging Face module names of its linear layers by ours."""

    hidden_size: int
    names: Mapping[str, tuple[str, ...]]
    rotaries: "Rotaries"
    kernels: str

    def inner(self, name: str) -> "Site":
        """The site of a part of this one, whose linear layers' names begin with its own."""
        prefix = f"{name}."
        names = {key.removeprefix(prefix): value for key, value in self.names.items() if key.startswith(prefix)}
        return Site(self.hidden_size, names, self.rotaries, self.kernels)


class Rotaries:
    """One `Rotary` for each distinct rope, so that a forward computes its tables once."""

    def __init__(self) -> None:
        self._made: dict[RopeSpec, Rotary] = {}

    def of(self, rope: RopeSpec) -> Rotary:
        """The rotary embedding of `rope`."""
        if rope not in self._made:
            scaling = {} if rope.scaling is None else {"kind": rope.scaling.kind, **asdict(rope.scaling)}
            self._made[rope] = Rotary(rope.dim, theta=rope.theta, **scaling)
        return self._made[rope]


def on_meta(spec: ArchSpec, *, dtype: torch.dtype, kernels: str) -> Decoder:
    """A `Decoder` whose parameters have shapes and dtypes but no memory.

    All are of `dtype`, but those that a module lists as `keeps_float32`.
    """
    names = {entry.ours: (entry.parameter,) if entry.parameter else entry.theirs for entry in weight_map(spec)}
    rotaries = Rotaries()
    with torch.device("meta"):
        blocks = [
            _block(layer, Site(spec.hidden_size, _module_names(names, f"blocks.{index}."), rotaries, kernels))
            for index, layer in enumerate(spec.layers)
        ]
        decoder = Decoder(
            spec.vocab_size,
            spec.hidden_size,
            blocks=blocks,
            final_norm=norm(spec.final_norm, spec.hidden_size, kernels),
            tied_head=spec.tied_head,
            head_bias=spec.head_bias,
            embedding_scale=spec.embedding_scale,
            learned_positions=spec.learned_positions,
            position_offset=spec.position_offset,
            logit_scale=spec.logit_scale,
            logit_softcap=spec.logit_softcap,
        )
    decoder.to(dtype)
    for module in decoder.modules():
        for name in getattr(module, "keeps_float32", ()):
            module.get_parameter(name).data = module.get_parameter(name).data.float()
    return decoder


def _module_names(names: Mapping[str, tuple[str, ...]], prefix: str) -> dict[str, tuple[str, ...]]:
    """The Hugging Face module names of a block's modules, by our names within the block."""
    return {
        ours.removeprefix(prefix).removesuffix(".weight"): tuple(name.removesuffix(".weight") for name in theirs)
        for ours, theirs in names.items()
        if ours.startswith(prefix) and ours.endswith(".weight")
    }


def _block(layer: LayerSpec, site: Site) -> Block:
    norms = {name: norm(layer.norm, site.hidden_size, site.kernels) for name in layer.norm_names}
    return PLACEMENTS[layer.placement](
        None if layer.mixer is None else mixer(layer.mixer, site.inner(layer.mixer_name)),
        None if layer.feed_forward is None else feed_forward(layer.feed_forward, site.inner("feed_forward")),
        mixer_name=layer.mixer_name,
        residual_scale=layer.residual_scale,
        **norms,
    )


def mixer(spec: Any, site: Site) -> nn.Module:
    """The mixer of a spec; raises TypeError for a type that has no builder."""
    return _built(MIXERS, spec, site)


def feed_forward(spec: Any, site: Site) -> nn.Module:
    """The feed-forward of a spec; raises TypeError for a type that has no builder."""
    return _built(FEED_FORWARDS, spec, site)


def _built(builders: Mapping[type, Callable[[Any, Site], nn.Module]], spec: Any, site: Site) -> nn.Module:
    if type(spec) not in builders:
        raise TypeError(f"models/build.py has no builder of a {type(spec).__name__}")
    return builders[type(spec)](spec, site)


def norm(spec: NormSpec, size: int, kernels: str) -> Norm:
    """The norm of a spec over `size` channels."""
    if spec.kind == "rms":
        return RmsNorm(size, epsilon=spec.epsilon, weight=spec.weight, offset=spec.weight_offset, kernels=kernels)
    return LayerNorm(
        size,
        epsilon=spec.epsilon,
        weight=spec.weight,
        bias=spec.bias,
        offset=spec.weight_offset,
        kernels=kernels,
    )


def attention(spec: AttentionSpec, site: Site) -> Attention:
    """Grouped-query attention."""
    q_norm, k_norm = _qk_norms(spec, site.kernels)
    return Attention(
        site.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        rotary=None if spec.rope is None else site.rotaries.of(spec.rope),
        qkv_names=site.names["qkv"],
        out_names=site.names["out"],
        window=spec.window,
        qkv_bias=spec.qkv_bias,
        out_bias=spec.out_bias,
        interleaved=spec.rope is not None and spec.rope.interleaved,
        grouped=spec.qkv_layout == "grouped",
        q_norm=q_norm,
        k_norm=k_norm,
        norm_all_heads=spec.qk_norm_over == "all",
        clip=spec.clip_qkv,
        scale=spec.scale,
        softcap=spec.softcap,
        sinks=nn.Parameter(torch.zeros(spec.num_heads)) if spec.sinks else None,
        kernels=site.kernels,
    )


def _qk_norms(spec: AttentionSpec, kernels: str) -> tuple[nn.Module | None, nn.Module | None]:
    """The norms of queries and of keys."""
    kind = spec.qk_norm
    if kind is None:
        return None, None
    shapes = qk_norm_shapes(spec)
    if spec.qk_norm_over == "each_head":
        q, k = (HeadNorm(shape[0], shape[1], kind=kind.kind, epsilon=kind.epsilon) for shape in shapes)
        return q, k
    q, k = (norm(kind, shape[0], kernels) for shape in shapes)
    return q, k


def _latent_attention(spec: LatentAttentionSpec, site: Site) -> LatentAttention:
    return LatentAttention(
        site.hidden_size,
        num_heads=spec.num_heads,
        query_rank=spec.query_rank,
        latent_rank=spec.latent_rank,
        nope_dim=spec.nope_dim,
        value_dim=spec.value_dim,
        rotary=site.rotaries.of(spec.rope),
        interleaved=spec.rope.interleaved,
        q_norm=None if spec.query_rank is None else norm(spec.norm, spec.query_rank, site.kernels),
        kv_norm=norm(spec.norm, spec.latent_rank, site.kernels),
        down_names=site.names["down"],
        query_up_names=site.names.get("query_up", ()),
        up_names=site.names["up"],
        out_names=site.names["out"],
        scale=spec.scale,
        bias=spec.bias,
        kernels=site.kernels,
    )


def _gated(spec: GatedSpec, site: Site) -> GatedFeedForward:
    return GatedFeedForward(
        site.hidden_size,
        intermediate_size=spec.intermediate_size,
        gate_up_names=site.names["gate_up"],
        down_names=site.names["down"],
        activation=spec.activation,
        bias=spec.bias,
        gate_scale=spec.gate_scale,
        down_scale=spec.down_scale,
        kernels=site.kernels,
    )


def _plain(spec: PlainSpec, site: Site) -> PlainFeedForward:
    return PlainFeedForward(
        site.hidden_size,
        intermediate_size=spec.intermediate_size,
        up_names=site.names["up"],
        down_names=site.names["down"],
        activation=spec.activation,
        bias=spec.bias,
    )


def _experts(spec: ExpertsSpec, site: Site) -> Experts:
    router = spec.router
    return Experts(
        site.hidden_size,
        num_experts=spec.num_experts,
        intermediate_size=spec.intermediate_size,
        router=Router(
            site.hidden_size,
            spec.num_experts,
            top_k=spec.top_k,
            score=router.score,
            normalized=router.normalized,
            scale=router.scale,
            groups=router.groups,
            chosen_groups=router.chosen_groups,
            group_top=router.group_top,
            correction=router.correction,
            bias=router.bias,
            kernels=site.kernels,
        ),
        names=site.names,
        bias=spec.bias,
        limit=spec.gate_limit,
        is_interleaved=spec.gate_limit is not None,
        shared_size=spec.shared_size,
        shared_gate=spec.shared_gate,
        auxiliary_loss=spec.auxiliary_loss,
        kernels=site.kernels,
    )


def _mamba1(spec: Mamba1Spec, site: Site) -> Mamba1:
    norms = None
    if spec.parameter_norm is not None:
        sizes = (spec.time_step_rank, spec.state_size, spec.state_size)
        dt, b, c = (norm(spec.parameter_norm, size, site.kernels) for size in sizes)
        norms = dt, b, c
    return Mamba1(
        site.hidden_size,
        inner_size=spec.inner_size,
        state_size=spec.state_size,
        conv_kernel=spec.conv_kernel,
        time_step_rank=spec.time_step_rank,
        in_names=site.names["in_proj"],
        x_names=site.names["x_proj"],
        out_names=site.names["out_proj"],
        norms=norms,
        conv_bias=spec.conv_bias,
        bias=spec.bias,
        kernels=site.kernels,
    )


def _mamba2(spec: Mamba2Spec, site: Site) -> Mamba2:
    gated = None
    if spec.norm is not None:
        gated = GatedNorm(
            spec.num_heads * spec.head_dim,
            epsilon=spec.norm.epsilon,
            groups=spec.norm_groups,
            gate_first=spec.gate_before_norm,
            kernels=site.kernels,
        )
    return Mamba2(
        site.hidden_size,
        num_heads=spec.num_heads,
        head_dim=spec.head_dim,
        state_size=spec.state_size,
        num_groups=spec.num_groups,
        conv_kernel=spec.conv_kernel,
        in_names=site.names["in_proj"],
        out_names=site.names["out_proj"],
        norm=gated,
        conv_bias=spec.conv_bias,
        bias=spec.bias,
        time_step_limit=spec.time_step_limit,
        multipliers=spec.multipliers,
        kernels=site.kernels,
    )


def _side_by_side(spec: SideBySideSpec, site: Site) -> SideBySide:
    # Scores are linear in the keys, so that what multiplies the keys multiplies them.
    scale = (spec.attention.scale or spec.attention.head_dim**-0.5) * spec.key_scale
    attended = spec.attention if spec.key_scale == 1.0 else replace(spec.attention, scale=scale)
    return SideBySide(
        attention(attended, site.inner("attention")),
        _mamba2(spec.state_space, site.inner("state_space")),
        attention_scales=(spec.attention_in, spec.attention_out),
        state_space_scales=(spec.state_space_in, spec.state_space_out),
    )


MIXERS: dict[type, Callable[[Any, Site], nn.Module]] = {
    AttentionSpec: attention,
    LatentAttentionSpec: _latent_attention,
    Mamba1Spec: _mamba1,
    Mamba2Spec: _mamba2,
    SideBySideSpec: _side_by_side,
}
"""The builder of each type of mixer."""
FEED_FORWARDS: dict[type, Callable[[Any, Site], nn.Module]] = {
    GatedSpec: _gated,
    PlainSpec: _plain,
    ExpertsSpec: _experts,
}
"""The builder of each type of feed-forward."""
