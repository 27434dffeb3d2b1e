"""What FSDP2 holds and sends besides each device's parts: gathered weights, and gradients on their way into parts.

As torch's `fully_shard` does it (torch/distributed/fsdp/_fully_shard, 2.11 and 2.13) over the groups of
`distributed.fsdp2`: one for each layer, and one for what is outside of the layers, which stays gathered. Frozen weights
that every device has whole (`Spread.shares_frozen`) are in none of them.
"""

from dataclasses import dataclass

from stoker.arch.borrowed import AnySpec, BorrowedSpec
from stoker.plan import facts
from stoker.plan.spread import Spread, Volume, volume


@dataclass(frozen=True)
class Sizes:
    """A run's weights: `base` bytes of frozen ones, as they are kept, and so many `trained` values.

    These are all of the model's where it `is_full`, adapters' otherwise. `weight_bytes`, `value_bytes`: of a trained
    matrix's value as it is kept, and of a product's.
    """

    base: int
    trained: int
    is_full: bool
    weight_bytes: int
    value_bytes: int

    @property
    def trained_bytes(self) -> int:
        """Bytes of what is trained; adapters are fp32."""
        return (self.weight_bytes if self.is_full else 4) * self.trained


@dataclass(frozen=True)
class Gathered:
    """Bytes as weights are gathered: of all `layers`, of the largest `layer`, and of what is `outside` of them.

    `layer_gradients`, `outside_gradients`: of what is trained of those, as a backward gives them; `summed_layer`: of
    the layer's, as ranks sum them. `head_gradient`: of the output layer's alone.
    """

    layers: int
    layer: int
    outside: int
    layer_gradients: int
    summed_layer: int
    outside_gradients: int
    head_gradient: int

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return self.layers + self.outside


def gathered(spec: AnySpec, spread: Spread, sizes: Sizes) -> Gathered:
    """Returns what is gathered of a model."""
    tables = facts.table_values(spec)
    layers, largest = facts.num_parameters(spec) - tables, facts.layers_share(spec)
    sums = 2 if spread.reduce_dtype == "bf16" else 4
    head = spec.vocab_size * spec.hidden_size
    if not sizes.is_full:  # all adapters lie in layers, in fp32
        outside, of_layers = frozen_parts(spec, sizes) if spread.shares_frozen else (0, 0)
        of_layers += sizes.trained_bytes
        own = round(largest * sizes.trained)
        return Gathered(of_layers, round(largest * of_layers), outside, 4 * own, sums * own, 0, 0)
    of_table = 2 if spread.param_dtype == "bf16" else sizes.weight_bytes
    of_value = of_table
    if spread.param_dtype == "auto" and not isinstance(spec, BorrowedSpec):
        of_value = min(sizes.weight_bytes, sizes.value_bytes)
    own = round(largest * layers)
    return Gathered(
        of_value * layers,
        of_value * own,
        of_table * tables,
        of_value * own,
        sums * own,
        of_table * tables,
        of_table * min(head, tables),
    )


def frozen_parts(spec: AnySpec, sizes: Sizes) -> tuple[int, int]:
    """Returns the bytes of frozen weights that are in no layer, and of those that are: embedding and head stay in the
    compute type, however layers are quantised."""
    outside = min(sizes.base, facts.table_values(spec) * sizes.value_bytes)
    return outside, sizes.base - outside


def casts_in_products(spec: AnySpec, spread: Spread, sizes: Sizes) -> bool:
    """Whether trained weights are gathered in a wider format than products read."""
    if sizes.weight_bytes <= sizes.value_bytes or spread.param_dtype == "bf16":
        return False
    return spread.param_dtype == "fp32" or isinstance(spec, BorrowedSpec)


@dataclass(frozen=True)
class Buffers:
    """Bytes of one device beside its parts: `always`, and more `in_backward`, in a layer's, and when it ends (`last`).

    The loss runs beside those that are there always.
    """

    always: int
    in_backward: int
    last: int


def buffers(found: Gathered, spread: Spread, *, arrives: bool) -> Buffers:
    """Returns the buffers; `arrives`: no gradients were there before the backward, and all parts are counted elsewhere.

    In a layer's backward it is gathered itself, with the buffer from which the one before it in the model is copied;
    its gradients are whole, and the last layer's are in the buffer that was summed over the ranks. Of what is outside
    of the layers, the head's gradient is there from the loss on, and the embedding's comes last, beside the buffer of
    the first layer's. Parts of either are made after that.
    """
    alone = spread.copies_weights  # then nothing passes, but what is shared is copied as if it did
    layers = found.layers if spread.reshards is False else (1 if alone else 2) * found.layer
    here = layers if spread.reshards is False else 0
    parts = found.outside_gradients // spread.gradient_shards if arrives else 0
    backward = layers - here + found.layer_gradients + found.summed_layer + found.head_gradient - parts
    # A tied embedding's gradient is added to the head's, which is a table of the same size.
    last = 2 * found.head_gradient + found.summed_layer - parts
    return Buffers(found.outside + here, backward, last)


def passing(spec: AnySpec, spread: Spread, sizes: Sizes) -> Volume:
    """Returns what passes between devices in a step, under any strategy."""
    if spread.strategy != "fsdp2":
        gradients = sizes.trained_bytes
        return volume(spread, stored=sizes.base + gradients, gradients=gradients)
    found = gathered(spec, spread, sizes)
    gradients = (2 if spread.reduce_dtype == "bf16" else 4) * sizes.trained
    return volume(spread, stored=found.total, outside=found.outside, gradients=gradients)
