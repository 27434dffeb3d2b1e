"""What a layer that runs op by op under autograd saves for its backward, counted tensor by tensor. No torch.

In the manner of Korthikanti et al., arXiv:2205.05198, for Stoker's own modules: `parts` says what a mixer or a
feed-forward keeps, here it is put together with the norms, with what autocast copies and with what adapters add.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from stoker.arch.borrowed import AnySpec
from stoker.arch.parts import Part, linears_of, parts
from stoker.arch.spec import LayerSpec


@dataclass(frozen=True)
class Adapted:
    """Adapters over a frozen base.

    `products`: (our name of a linear layer in the block, values a token of its input times A), of those with an
    adapter. `dora`: what leaves such a layer is kept before its rows are scaled. `drops_copy`: dropout leaves a copy of
    what goes in and a mask, as it does over a quantised base; over others it is drawn again. `parameters`: of those
    layers, (name, values of A and B).
    """

    products: tuple[tuple[str, int], ...]
    dora: bool = False
    drops_copy: bool = False
    parameters: tuple[tuple[str, int], ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """Of the linear layers with an adapter."""
        return frozenset(name for name, _ in self.products)


@dataclass(frozen=True)
class Micro:
    """A micro-batch: `tokens` tokens of `value_bytes` each value, and how layers compute with it.

    `stream_bytes`: of a value of the residual stream between layers that run op by op, which autocast leaves in the
    weights' dtype (None: as other values). `adapter`: None where every weight is trained. `is_plain`: plain PyTorch
    runs, not Triton's kernels.
    `head_copies`: tensors as large as the queries that attention's backward makes where keys and values are shared by
    several of them: two by cuDNN (in its workspace on an H200) and by flash attention (gradients of keys and values
    for every query head, summed afterwards), four where keys and values themselves are copied for every query head.
    """

    tokens: int
    value_bytes: int
    head_copies: int = 0
    gradient_bytes: float = 0
    """Of each value of a layer that is trained, of its weights or its adapters, where its gradient arrives in the
    micro-batch's backward, of this device's part. 0 where it is there before, as from the second micro-batch on."""
    adapter: Adapted | None = None
    stream_bytes: int | None = None
    is_plain: bool = False

    @property
    def in_stream(self) -> int:
        """Bytes of a value of the residual stream."""
        return self.stream_bytes or self.value_bytes

    @property
    def has_wide_stream(self) -> bool:
        """Whether linear layers read a narrower copy of what comes from the residual stream."""
        return self.in_stream > self.value_bytes

    def narrow(self) -> "Micro":
        """Returns the same with the residual stream in the compute type, as the layer kernel hands it on."""
        return replace(self, stream_bytes=None)

    def trains(self, linear: str) -> bool:
        """Whether the gradient of a linear layer's weight, or of its adapter's A, needs what goes in, as it goes in."""
        return self.adapter is None or (linear in self.adapter.names and not self.adapter.drops_copy)

    def product_values(self, layer: LayerSpec, hidden_size: int, *, of: str = "") -> int:
        """Values a token of a layer's inputs times A, which are kept however it runs; those of the part `of`."""
        if self.adapter is None:
            return 0
        there = linears_of(layer, hidden_size)
        return sum(values for name, values in self.adapter.products if name in there and name.startswith(of))

    def has_dora(self, linear: str) -> bool:
        """Whether DoRA scales the rows of a linear layer."""
        return self.adapter is not None and self.adapter.dora and linear in self.adapter.names


def by_model(spec: AnySpec, micro: Micro) -> int:
    """Bytes that all layers save if they run op by op and keep everything; not those of the loss."""
    return sum(by_layer(layer, spec.hidden_size, micro) for layer in spec.layers)


def by_layer(layer: LayerSpec, hidden_size: int, micro: Micro) -> int:
    """Bytes that a layer saves for its backward if it runs op by op."""
    inside = parts(layer, hidden_size)
    streamed, values = _around(layer, len(inside))
    values, streamed = values * hidden_size, streamed * hidden_size
    statistics = norm_statistics(layer, micro) * len(layer.norm_names)
    for part in inside.values():
        values += part.saved_values + (part.plain_values if micro.is_plain else 0)
        statistics += part.saved_statistics + (part.plain_statistics if micro.is_plain else 0)
        statistics += part.trained_statistics if micro.adapter is None else 0
        if part.keeps_input and micro.has_wide_stream:  # its router reads the input itself, its experts a copy
            streamed += hidden_size
    values += sum(size for name, size in _inputs(layer, inside, hidden_size, micro))
    values += micro.product_values(layer, hidden_size)
    size = values * micro.value_bytes + streamed * micro.in_stream + 4 * statistics
    return micro.tokens * (size + _by_adapters(layer, hidden_size, micro))


def norm_statistics(layer: LayerSpec, micro: Micro) -> int:
    """fp32 values a token that a norm keeps: one, PyTorch's own layer norm two, the kernel's none."""
    if layer.norm.kind == "rms":
        return 1
    return 2 if micro.is_plain or not layer.norm.weight else 0


def _around(layer: LayerSpec, num_parts: int) -> tuple[int, int]:
    """Tensors of the hidden size that norms read: of the residual stream, and of what leaves a part."""
    match layer.placement:
        case "pre":
            return num_parts, 0
        case "post":
            return 0, num_parts
        case "sandwich":
            return num_parts, num_parts
        case "parallel" | "parallel_one_norm":
            return 1, 0


def _inputs(layer: LayerSpec, inside: Mapping[str, Part], hidden_size: int, micro: Micro) -> Iterator[tuple[str, int]]:
    """(what reads it, values) of each input that is kept for a weight's gradient alone."""
    known = False
    for name, part in inside.items():
        readers = sum(micro.trains(f"{name}.{linear}") for linear in part.of_input) + part.keeps_input
        if micro.has_wide_stream:  # each makes its own narrow copy
            yield name, readers * hidden_size
        elif readers and not (known and layer.placement == "parallel_one_norm"):
            yield name, hidden_size
        known = known or readers > 0
        for linear, size in part.inputs.items():
            if micro.trains(f"{name}.{linear}"):
                yield f"{name}.{linear}", size


def _by_adapters(layer: LayerSpec, hidden_size: int, micro: Micro) -> int:
    """Bytes a token that adapters keep besides their products."""
    adapter, total = micro.adapter, 0
    if adapter is None:
        return 0
    for name, linear in linears_of(layer, hidden_size).items():
        if name not in adapter.names or linear.experts:
            continue
        total += sum(linear.out_features) * micro.value_bytes if adapter.dora else 0
        total += linear.in_features * (micro.value_bytes + 1) if adapter.drops_copy else 0
    return total
