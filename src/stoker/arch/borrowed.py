"""What is known of a model that runs through Transformers' own class: sizes, names and shapes, not how it computes.

Counts of parameters and shapes of linear layers are exact; what a layer keeps for its backward is estimated from them.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from stoker.arch.spec import ArchSpec, LayerSpec


@dataclass(frozen=True)
class BorrowedMixer:
    """All that a layer of Transformers' class computes, as one: feed-forward, norms and residuals included.

    `linears`: (Hugging Face's name within the layer, in features, out features). `attention_width`: channels of all
    query heads together, 0 where the layer mixes tokens without attention. `score_values`: values a token of
    attention's scores, which a class that computes attention by itself keeps for the backward.
    """

    kind: ClassVar[str] = "borrowed"
    linears: tuple[tuple[str, int, int], ...]
    attention_width: int = 0
    score_values: int = 0

    @property
    def saved_values(self) -> int:
        """Values a token that autograd keeps, coarsely: inputs and outputs of linear layers, each size of input once.

        Linear layers of one input (q, k and v; gate and up) share it; two tensors of the largest input more stand for
        norms and activations.
        """
        inputs = {into for _, into, _ in self.linears}
        outputs = sum(out for _, _, out in self.linears)
        return sum(inputs) + outputs + 2 * max(inputs, default=0) + self.score_values

    @property
    def widest(self) -> int:
        """The largest number of channels in the layer."""
        return max((self.score_values, *(max(into, out) for _, into, out in self.linears)))


@dataclass(frozen=True)
class BorrowedSpec:
    """A causal language model of Transformers' class `class_name`; `why` it does not run natively.

    The mixer of each of `layers` is a `BorrowedMixer`, its modules lie below `layers_name` ("model.layers").
    `max_positions` is the context it was made for, in tokens; `num_parameters` counts a tied head once. `packs`: the
    class takes attention from outside, so that packed rows can run at once; a check on the loaded model confirms it.
    `is_remote`: the class comes with the model, not with Transformers. `shared`: names of linear layers whose weight
    others have too, which therefore have no adapter.
    """

    model_type: str
    class_name: str
    vocab_size: int
    hidden_size: int
    max_positions: int
    layers: tuple[LayerSpec, ...]
    layers_name: str
    num_parameters: int
    packs: bool
    is_remote: bool
    why: str
    shared: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """What the model is called where a native one has its family."""
        return f"{self.model_type}, through {self.origin}"

    @property
    def origin(self) -> str:
        """Whose class computes it: "Transformers' OPTForCausalLM"."""
        return f"{self.class_name} of its own" if self.is_remote else f"Transformers' {self.class_name}"

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of every linear layer that an adapter can be on, by its Hugging Face module name."""
        return {
            whole: (into, out)
            for index, layer in enumerate(self.layers)
            if isinstance(layer.mixer, BorrowedMixer)
            for name, into, out in layer.mixer.linears
            if (whole := f"{self.layers_name}.{index}.{name}") not in self.shared
        }

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        return asdict(self)


AnySpec = ArchSpec | BorrowedSpec
"""The facts of a model, whichever path it takes."""
