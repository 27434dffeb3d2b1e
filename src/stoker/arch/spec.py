"""What an architecture is: frozen facts, read from a Hugging Face `config.json` by `arch.families`.

A model is an embedding, a tuple of layers and a head. A layer is a mixer (attention, a state space, or both side by
side), a feed-forward (gated, plain, a mixture of experts) and a norm placement; it may lack one of the first two. A
variant is a field of the spec that owns it: rope scaling belongs to the attention's rope.
"""

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared"]
"""Hugging Face's names: "gelu" is exact; "gelu_tanh" is gelu_new, gelu_fast and gelu_pytorch_tanh."""


@dataclass(frozen=True)
class NormSpec:
    """A norm over channels: "rms" (root mean square, arXiv:1910.07467) or "layer" (arXiv:1607.06450).

    `epsilon` is added to the mean square or the variance. The weight that multiplies is the stored one plus
    `weight_offset` (Gemma stores it less one); without `weight` nothing multiplies. `bias` is added ("layer" only).
    """

    kind: Literal["rms", "layer"] = "rms"
    epsilon: float = 1e-6
    weight: bool = True
    weight_offset: float = 0.0
    bias: bool = False


@dataclass(frozen=True)
class LinearScaling:
    """Every frequency divided by `factor` (position interpolation, arXiv:2306.15595)."""

    kind: ClassVar[str] = "linear"
    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """Theta grown with the document's length once that exceeds `original_max_positions` ("dynamic NTK")."""

    kind: ClassVar[str] = "dynamic"
    factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, a ramp between the two (Llama 3.1)."""

    kind: ClassVar[str] = "llama3"
    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class YarnScaling:
    """Interpolation by parts and scaled cosines and sines (YaRN, arXiv:2309.00071).

    `attention_factor` multiplies cosines and sines; `truncate` rounds the ramp's ends to whole dimensions.
    """

    kind: ClassVar[str] = "yarn"
    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class LongRopeScaling:
    """A factor for each frequency, of two lists: by whether the document exceeds `original_max_positions`
    (LongRoPE, arXiv:2402.13753). `attention_factor` multiplies cosines and sines."""

    kind: ClassVar[str] = "longrope"
    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_positions: int
    attention_factor: float


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding of the first `dim` channels of each head, base `theta` (RoFormer, arXiv:2104.09864).

    A channel of the first half turns with its counterpart of the second; `interleaved`: neighbours turn together.
    """

    dim: int
    theta: float = 10_000.0
    scaling: RopeScaling | None = None
    interleaved: bool = False


@dataclass(frozen=True)
class AttentionSpec:
    """Causal attention with `num_heads` query heads that share `num_kv_heads` key and value heads.

    `rope` None: no positions. `window`: a position sees itself and the `window - 1` before it; None: all before it.
    `scale` of the scores (None: 1 / sqrt(head_dim)); `softcap` c: scores become c tanh(scores / c). `sinks`: a learned
    logit a head that takes part in the softmax and has no value. `qk_norm`: of queries and keys before the rotation,
    over each head's channels with one weight for all heads ("head"), with a weight of its own for each ("each_head"),
    or over all heads at once ("all"). `clip_qkv`: q, k and v are clamped to plus or minus so much.
    `qkv_layout` of the stored rows: all of q, then k, then v; or "grouped": for each key/value head its queries, its
    key, its value.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec | None
    qkv_bias: bool = False
    out_bias: bool = False
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    qk_norm: NormSpec | None = None
    qk_norm_over: Literal["head", "each_head", "all"] = "head"
    clip_qkv: float | None = None
    qkv_layout: Literal["blocks", "grouped"] = "blocks"


@dataclass(frozen=True)
class LatentAttentionSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values from a shared latent vector.

    Of a head's query and key, `nope_dim` channels have no positions and `rope.dim` turn; the turned key is shared by
    all heads. `query_rank` None: queries come straight from the input. `norm`: of the latent vectors.
    """

    num_heads: int
    query_rank: int | None
    latent_rank: int
    nope_dim: int
    value_dim: int
    rope: RopeSpec
    norm: NormSpec
    scale: float | None = None
    bias: bool = False


@dataclass(frozen=True)
class Mamba1Spec:
    """A selective state space (Mamba, arXiv:2312.00752) of `inner_size` channels with `state_size` states each.

    The step sizes come through a bottleneck of `time_step_rank`. `parameter_norm`: of B, C and the step sizes, without
    a weight (Falcon-Mamba) or with one (Jamba); None: none.
    """

    inner_size: int
    state_size: int
    conv_kernel: int
    time_step_rank: int
    conv_bias: bool = True
    bias: bool = False
    parameter_norm: NormSpec | None = None


@dataclass(frozen=True)
class Mamba2Spec:
    """A state space with a scalar decay a head (Mamba-2, arXiv:2405.21060): `num_heads` heads of `head_dim` channels.

    B and C are shared by the heads of each of `num_groups`. `norm`: gated, over all channels or, `norm_groups` of them
    at a time; None: the gate only. `gate_before_norm`: norm(y * silu(z)), else norm(y) * silu(z).
    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    conv_kernel: int
    chunk_size: int = 256
    conv_bias: bool = True
    bias: bool = False
    norm: NormSpec | None = None
    norm_groups: int = 1
    gate_before_norm: bool = True
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    multipliers: tuple[float, ...] | None = None
    """Falcon-H1: of z, x, B, C and the step sizes as they leave the input projection."""


@dataclass(frozen=True)
class SideBySideSpec:
    """Attention and a state space that read the same normed input and whose outputs are added (Falcon-H1).

    Inputs and outputs of each are multiplied; `key_scale` multiplies the keys.
    """

    attention: AttentionSpec
    state_space: Mamba2Spec
    attention_in: float = 1.0
    attention_out: float = 1.0
    state_space_in: float = 1.0
    state_space_out: float = 1.0
    key_scale: float = 1.0


MixerSpec = AttentionSpec | LatentAttentionSpec | Mamba1Spec | Mamba2Spec | SideBySideSpec


@dataclass(frozen=True)
class GatedSpec:
    """A gated feed-forward: `down(activation(gate(x)) * up(x))` (arXiv:2002.05202); "silu" makes it SwiGLU.

    `gate_scale` multiplies what the activation reads, `down_scale` the result (Falcon-H1).
    """

    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False
    gate_scale: float = 1.0
    down_scale: float = 1.0


@dataclass(frozen=True)
class PlainSpec:
    """A feed-forward without a gate: `down(activation(up(x)))`."""

    intermediate_size: int
    activation: Activation
    bias: bool = True


@dataclass(frozen=True)
class RouterSpec:
    """How a token's experts are chosen and weighed.

    `score`: "softmax" over all experts, "softmax_of_chosen" over the chosen ones' logits, or "sigmoid" of each. With
    `groups`, only experts of the best `chosen_groups` of them take part, a group's score being the sum of its best
    `group_top` (V3: 2; V2: 1). `correction`: a stored bias added for the choice alone. `normalized`: the chosen
    weights are divided by their sum; then all are multiplied by `scale`. `bias`: of the router's linear layer.
    """

    score: Literal["softmax", "softmax_of_chosen", "sigmoid"] = "softmax"
    normalized: bool = True
    scale: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
    group_top: int = 1
    correction: bool = False
    bias: bool = False


@dataclass(frozen=True)
class ExpertsSpec:
    """A mixture of experts: each token's `top_k` of `num_experts` gated feed-forwards of `intermediate_size`.

    `gate_limit`: gpt-oss' clamped gate, `(up + 1) * gate * sigmoid(1.702 gate)`; None: the ordinary one. `shared_size`:
    inner width of an expert that every token has (0: none), weighed by a sigmoid of its own if `shared_gate`.
    `auxiliary_loss`: the coefficient that the model's configuration gives its load-balancing loss.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    router: RouterSpec
    activation: Activation = "silu"
    bias: bool = False
    gate_limit: float | None = None
    shared_size: int = 0
    shared_gate: bool = False
    auxiliary_loss: float = 0.0


FeedForwardSpec = GatedSpec | PlainSpec | ExpertsSpec

Placement = Literal["pre", "post", "sandwich", "parallel", "parallel_one_norm"]


@dataclass(frozen=True)
class LayerSpec:
    """One layer, of `mixer` m and `feed_forward` f, each with its norms n; one of the two may be None.

    "pre": `x + m(n(x))`, then `x + f(n(x))`. "post": `x + n(m(x))`, `x + n(f(x))`. "sandwich": `x + n(m(n(x)))`, the
    same for f. "parallel": `x + m(n(x)) + f(n'(x))`; "parallel_one_norm": both read the same n(x).
    `residual_scale` multiplies what is added to x.
    """

    mixer: MixerSpec | None
    feed_forward: FeedForwardSpec | None
    norm: NormSpec
    placement: Placement = "pre"
    residual_scale: float = 1.0

    @property
    def mixer_name(self) -> str:
        """Our name of the mixer in the block: "attention" for both kinds of it, "mixer" for all others."""
        return "attention" if isinstance(self.mixer, AttentionSpec | LatentAttentionSpec) else "mixer"

    @property
    def norm_names(self) -> tuple[str, ...]:
        """Our names of the block's norms, those before a part first: "attention_norm", "attention_post_norm"."""
        parts = [] if self.mixer is None else [self.mixer_name]
        if self.feed_forward is not None and (self.placement != "parallel_one_norm" or not parts):
            parts.append("feed_forward")
        suffixes = {"post": ("post_norm",), "sandwich": ("norm", "post_norm")}.get(self.placement, ("norm",))
        return tuple(f"{part}_{suffix}" for suffix in suffixes for part in parts)


@dataclass(frozen=True)
class ArchSpec:
    """A whole causal language model. `max_positions` is the context it was made for, in tokens.

    `embedding_scale` multiplies the embeddings; `learned_positions`: rows of a table added to them, after skipping
    `position_offset` rows (0: none). `logit_scale` multiplies the logits, then `logit_softcap` c makes them
    c tanh(logits / c).
    """

    family: str
    model_type: str
    vocab_size: int
    hidden_size: int
    max_positions: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    tied_head: bool = False
    head_bias: bool = False
    embedding_scale: float = 1.0
    learned_positions: int = 0
    position_offset: int = 0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    left_out: tuple[str, ...] = ()
    """Settings of config.json that its training had and Stoker's has not, as dropout: "resid_pdrop = 0.1"."""
    unused: tuple[str, ...] = ()
    """Beginnings of the names of tensors that a folder may hold and the model does without, as Transformers does."""

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain JSON values, with the `kind` of each part that has variants."""
        return _plain(self)


def _plain(value: Any) -> Any:
    """A spec as JSON values: dataclasses as dicts with their class (`kind` where it has one), tuples as lists."""
    if is_dataclass(value):
        kind = {"kind": value.kind} if isinstance(getattr(value, "kind", None), str) else {}
        return kind | {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class WeightEntry:
    """One parameter of ours and the Hugging Face tensors it holds, concatenated along dim 0 in this order.

    `transposed`: they store [in, out] (GPT-2's Conv1D). `stacked`: they store one tensor an expert, ours holds all in
    its first dimension, E groups of the tensors in turn. `aliases`: names under which the same tensor may lie in a
    folder too, as a tied head does. `interleaved`: rows of gate and up alternate there, ours has gate first.
    `parameter`: of experts, the name of Transformers' 3-D parameter that holds them in memory, by which adapters know
    them.
    `stored`: the names in files, where those are not the modules' (Transformers renames some as it loads and saves).
    """

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    stacked: bool = False
    aliases: tuple[str, ...] = ()
    interleaved: bool = False
    parameter: str | None = None
    stored: tuple[str, ...] = ()
