"""`train.optimizer`: how gradients become updates."""

from typing import Annotated, Literal

from pydantic import Field, Tag

from stoker.config.sections.section import DEFAULT_KINDS, Beta, NonNegative, Positive, Section, by_kind


class _Optimizer(Section):
    weight_decay: NonNegative = 0.0
    """Pull towards zero at each step, times the rate; not on norms, biases and embeddings unless `decay_all`."""
    decay_all: bool = False
    """Let weight decay act on norms, biases and embeddings too."""


class AdamW(_Optimizer):
    """Adam with decoupled weight decay; fused where the device can."""

    kind: Literal["adamw"] = "adamw"
    """The optimiser."""
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """How slowly the two running averages forget: of the gradient, and of its square."""
    epsilon: Positive = 1e-8
    """Added to the denominator."""


class AdamW8bit(_Optimizer):
    """AdamW whose running averages take 8 bits a value, in weights of 4,096 values or more."""

    kind: Literal["adamw_8bit"] = "adamw_8bit"
    """The optimiser."""
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """How slowly the two running averages forget: of the gradient, and of its square."""
    epsilon: Positive = 1e-8
    """Added to the denominator."""


class Sgd(_Optimizer):
    """Stochastic gradient descent."""

    kind: Literal["sgd"] = "sgd"
    """The optimiser."""
    momentum: Beta = 0.0
    """How slowly the running average of the gradient forgets; 0 keeps none."""


class Adafactor(_Optimizer):
    """Adam with a factored second average, which takes next to no memory."""

    kind: Literal["adafactor"] = "adafactor"
    """The optimiser."""


class Muon(_Optimizer):
    """Momentum with orthogonal updates for the hidden matrices; AdamW for everything else."""

    kind: Literal["muon"] = "muon"
    """The optimiser."""
    momentum: Beta = 0.95
    """How slowly the matrices' running average of the gradient forgets."""
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """AdamW's two averages, for everything else."""
    epsilon: Positive = 1e-8
    """Added to AdamW's denominator."""


Optimizer = Annotated[
    Annotated[AdamW, Tag("adamw")]
    | Annotated[AdamW8bit, Tag("adamw_8bit")]
    | Annotated[Sgd, Tag("sgd")]
    | Annotated[Adafactor, Tag("adafactor")]
    | Annotated[Muon, Tag("muon")],
    by_kind(DEFAULT_KINDS[2]),
]
