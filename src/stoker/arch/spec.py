"""What an architecture is: frozen facts, read from a Hugging Face `config.json` by `arch.families`.

A model is an embedding, a tuple of layers and a head. A layer is a mixer (attention), a feed-forward and a norm
placement. A variant is a field of the spec that owns it: rope scaling belongs to the attention's rope.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class NormSpec:
    """A root-mean-square norm with a weight per channel (arXiv:1910.07467); `epsilon` is added to the mean square."""

    kind: Literal["rms"] = "rms"
    epsilon: float = 1e-6


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


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding of the first `dim` channels of each head, base `theta` (RoFormer, arXiv:2104.09864)."""

    dim: int
    theta: float = 10_000.0
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class AttentionSpec:
    """Causal attention with `num_heads` query heads that share `num_kv_heads` key and value heads.

    `window`: a position sees itself and the `window - 1` before it; None: all before it.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    qkv_bias: bool = False
    out_bias: bool = False
    window: int | None = None


@dataclass(frozen=True)
class GatedSpec:
    """A gated feed-forward: `down(activation(gate(x)) * up(x))` (arXiv:2002.05202); "silu" makes it SwiGLU."""

    intermediate_size: int
    activation: Literal["silu"] = "silu"
    bias: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One layer. Placement "pre": `x + mixer(norm(x))`, then `x + feed_forward(norm(x))`."""

    mixer: AttentionSpec
    feed_forward: GatedSpec
    norm: NormSpec
    placement: Literal["pre"] = "pre"


@dataclass(frozen=True)
class ArchSpec:
    """A whole causal language model. `max_positions` is the context it was made for, in tokens."""

    family: str
    model_type: str
    vocab_size: int
    hidden_size: int
    max_positions: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    tied_head: bool = False
    head_bias: bool = False

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain JSON values, with each rope scaling's `kind`."""
        layers = []
        for layer in self.layers:
            values = asdict(layer)
            scaling = layer.mixer.rope.scaling
            if scaling is not None:
                values["mixer"]["rope"]["scaling"] = {"kind": scaling.kind, **asdict(scaling)}
            layers.append(values)
        return {**asdict(self), "layers": layers}


@dataclass(frozen=True)
class WeightEntry:
    """One parameter of ours and the Hugging Face tensors it holds, concatenated along dim 0 in this order."""

    ours: str
    theirs: tuple[str, ...]
