"""What Stoker needs of a causal language model, whoever computes it."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn


class LanguageModel(Protocol):
    """Token ids to hidden states, and those to logits: `nn.decoder.Decoder`, or a class of Transformers behind it.

    Implementations are `nn.Module`s; a cache is whatever `new_cache` gives.
    """

    training: bool

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        ...

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers; each runs again in the backward where its attribute `recompute` is set."""
        ...

    @property
    def head_weight(self) -> Tensor | None:
        """[V, D] of the output layer; None: the model gives logits where others give hidden states."""
        ...

    @property
    def head_bias(self) -> Tensor | None:
        """[V] of the output layer, or None."""
        ...

    @property
    def logit_scale(self) -> float:
        """What the output layer's logits are multiplied by."""
        ...

    @property
    def logit_softcap(self) -> float | None:
        """The cap c of c tanh(logits / c) after that, or None."""
        ...

    def __call__(self, input_ids: Tensor, *, cache: Any = None) -> Tensor:
        """Returns hidden states [B, T, D] of `input_ids` [B, T], which continue what `cache` holds."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns scores over the vocabulary, [..., V], of what the call returns."""
        ...

    def new_cache(self, *, capacity: int, batch_size: int = 1) -> Any:
        """Returns an empty cache for `capacity` positions."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the weights."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Sets the mode."""
        ...

    def eval(self) -> Any:
        """Sets evaluation mode."""
        ...
