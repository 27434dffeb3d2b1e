"""Parts of a borrowed model replaced by ours, on one instance, where structure and numbers agree."""

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from stoker.models.borrowed.find import is_transposed, linear_shape, linears_of_blocks
from stoker.nn.feed_forward import ACTIVATIONS, GatedFeedForward
from stoker.nn.linear import FusedLinear
from stoker.nn.norm import RmsNorm

_EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps")
_GATED = ("gate_proj", "up_proj", "down_proj")
_NUM_INPUTS = 3
# Of the largest output. Half precision: some classes round between the root and the weight, ours once at the end.
_TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

Convert = Callable[[FusedLinear], nn.Module]


def replace_linears(model: nn.Module, convert: Convert, *, but: Collection[str] = ()) -> frozenset[str]:
    """Puts `convert(FusedLinear)` in the place of every plain linear layer of the model's layers, one by one.

    Those named in `but` stay. Returns the names of those that store their weight transposed.
    """
    transposed = set()
    for name, module in list(linears_of_blocks(model)):
        if name in but:
            continue
        if is_transposed(module):
            transposed.add(name)
        _put(model, name, convert(_fused([(name, module)])))
    return frozenset(transposed)


@torch.no_grad()
def replace_gated(model: nn.Module, *, kernels: str, but: Collection[str] = ()) -> int:
    """Puts our gated feed-forward in the place of every one that computes the same; returns how many.

    Its linear layers are still plain ones: call this first, then `replace_linears`. Those with a layer of `but` stay.
    """
    count = 0
    for name, module in list(model.named_modules()):
        ours = None if f"{name}.{_GATED[0]}" in but else _gated(name, module)
        if ours is None:
            continue
        for activation in ACTIVATIONS:
            ours.activation = activation
            if _computes_the_same(module, ours, ours.gate_up.in_features):
                ours.kernels = kernels  # not before: the weights are still on the CPU, where Triton has none
                _put(model, name, ours)
                count += 1
                break
    return count


def _gated(name: str, module: nn.Module) -> GatedFeedForward | None:
    """Our module with the same weights, if `module` is made of the parts of a gated feed-forward."""
    linears = [getattr(module, part, None) for part in _GATED]
    if any(type(linear) is not nn.Linear for linear in linears):
        return None
    children = {child for child, _ in module.named_children()}
    if not children <= {*_GATED, "act_fn"} or next(module.parameters(recurse=False), None) is not None:
        return None
    gate, up, down = (cast("nn.Linear", linear) for linear in linears)
    biases = [linear.bias is not None for linear in (gate, up, down)]
    if gate.weight.shape != up.weight.shape or len(set(biases)) > 1 or down.in_features != gate.out_features:
        return None
    with torch.device("meta"):
        ours = GatedFeedForward(
            gate.in_features,
            intermediate_size=gate.out_features,
            gate_up_names=(f"{name}.gate_proj", f"{name}.up_proj"),
            down_names=(f"{name}.down_proj",),
            bias=biases[0],
        )
    ours.gate_up = _fused([(f"{name}.gate_proj", gate), (f"{name}.up_proj", up)])
    ours.down = _fused([(f"{name}.down_proj", down)])
    return ours.train(module.training)


@torch.no_grad()
def replace_norms(model: nn.Module, *, kernels: str) -> int:
    """Puts our root-mean-square norm in the place of every one that computes the same; returns how many."""
    count = 0
    for name, module in list(model.named_modules()):
        parameters = dict(module.named_parameters())
        epsilon = next((value for key in _EPSILONS if isinstance(value := getattr(module, key, None), float)), None)
        is_norm = "rmsnorm" in type(module).__name__.lower() and not list(module.children())
        if not is_norm or epsilon is None or list(parameters) != ["weight"] or parameters["weight"].dim() != 1:
            continue
        size = parameters["weight"].numel()
        for offset in (0.0, 1.0):
            ours = RmsNorm(size, epsilon=epsilon, offset=offset, kernels=kernels)
            ours.weight = parameters["weight"]
            if _computes_the_same(module, ours, size):
                _put(model, name, ours.train(module.training))
                count += 1
                break
    return count


def put_plain(model: nn.Module, path: str, layer: FusedLinear, *, is_transposed: bool) -> None:
    """Puts a plain linear layer in the place of ours, with its weight in full."""
    from transformers.pytorch_utils import Conv1D

    weight = layer.weight.detach()
    rows, columns = weight.shape
    with torch.device("meta"):
        plain: Any = Conv1D(rows, columns) if is_transposed else nn.Linear(columns, rows, bias=layer.bias is not None)
    plain.weight = nn.Parameter(weight.T.contiguous() if is_transposed else weight)
    plain.bias = layer.bias
    _put(model, path, plain.train(layer.training))


def _computes_the_same(theirs: nn.Module, ours: nn.Module, size: int) -> bool:
    """Whether both make the same of random inputs of ordinary and of large size."""
    weight = next(theirs.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_NUM_INPUTS, size, generator=generator) * torch.tensor([[0.01], [1.0], [20.0]])
    x = x.to(weight.device, weight.dtype)[None]
    try:
        expected, made = theirs(x), ours(x)
    except (TypeError, ValueError, RuntimeError, AttributeError):  # theirs wants other arguments
        return False
    tolerance = _TOLERANCES.get(weight.dtype, 0.0)
    if not isinstance(expected, Tensor) or expected.dtype != made.dtype or expected.shape != made.shape:
        return False
    allowed = tolerance * expected.float().abs().amax(-1, keepdim=True)
    return bool(((made.float() - expected.float()).abs() <= allowed).all())


def _fused(parts: list[tuple[str, nn.Module]]) -> FusedLinear:
    """The linear layers `(name, module)` as one; a single one keeps its own parameters."""
    in_features = linear_shape(parts[0][1])[0]
    sizes = tuple(linear_shape(module)[1] for _, module in parts)
    with torch.device("meta"):
        fused = FusedLinear(in_features, sizes, names=tuple(name for name, _ in parts))
    weights = [_weight(module) for _, module in parts]
    biases = [cast("nn.Parameter | None", module.bias) for _, module in parts]
    fused.weight = weights[0] if len(parts) == 1 else nn.Parameter(torch.cat([w.detach() for w in weights]))
    if biases[0] is not None:
        whole = [bias.detach() for bias in biases if bias is not None]
        fused.bias = biases[0] if len(parts) == 1 else nn.Parameter(torch.cat(whole))
    return fused.train(parts[0][1].training)


def _weight(module: nn.Module) -> nn.Parameter:
    weight = cast("nn.Parameter", module.weight)
    return nn.Parameter(weight.detach().T.contiguous()) if is_transposed(module) else weight


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
