"""The layer with its own backward against the same layer written op by op under autograd."""

from itertools import product

import pytest
import torch

from stoker.kernels.attention import attention
from stoker.kernels.block import KEEP, BlockOptions, BlockWeights, block
from stoker.kernels.dropout import drop
from stoker.kernels.glu import gated_reference
from stoker.kernels.projection import Projection
from stoker.kernels.rms_norm import rms_norm_reference
from stoker.kernels.rope import rotate_reference

HEADS, KV_HEADS, CHANNELS, WIDTH, INNER, RANK = 4, 2, 4, 12, 20, 3
EPSILONS = (1e-5, 1e-6)


def projection(draw, num_in, sizes, *, adapted, bias, rate, dora=False):
    num_out = sum(sizes)
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    slices = tuple(slice(end - size, end) for end, size in zip(ends, sizes, strict=True))
    a = draw(len(sizes) * RANK, num_in).float() if adapted else None
    b = draw(num_out, RANK).float() if adapted else None
    weight = draw(num_out, num_in, scale=0.3).float()
    offset = draw(num_out).float() if bias else None
    scale = 1 + 0.3 * draw(num_out).float() if dora else None
    return Projection(weight, offset, a, b, 0.5, slices if adapted else (), rate, num_in, scale)


def layer(draw, *, adapted=True, bias=False, rate=0.0, head_norms=False, dora=False):
    head_sizes = (HEADS * CHANNELS, KV_HEADS * CHANNELS, KV_HEADS * CHANNELS)
    options = {"adapted": adapted, "bias": bias, "rate": rate, "dora": dora}
    return BlockWeights(
        draw(WIDTH).float(),
        draw(WIDTH).float(),
        projection(draw, WIDTH, head_sizes, **options),
        projection(draw, HEADS * CHANNELS, (WIDTH,), **options),
        projection(draw, WIDTH, (INNER, INNER), **options),
        projection(draw, INNER, (WIDTH,), **options),
        *((draw(CHANNELS).float(), draw(CHANNELS).float()) if head_norms else ()),
    )


def project(p, x, implementation):
    y = torch.nn.functional.linear(x, p.weight, None if p.scale is not None else p.bias)
    if p.a is None:
        return y
    mask = drop(torch.ones_like(x).flatten(0, 1), rate=p.rate, seed=p.seed, implementation=implementation)
    x = x * mask.view_as(x)
    updates = [x @ a.T @ p.b[rows].T for a, rows in zip(p.a.split(RANK), p.slices, strict=True)]
    y = y + p.scaling * torch.cat(updates, dim=-1)
    if p.scale is None:
        return y
    return p.scale * y if p.bias is None else p.scale * y + p.bias


def op_by_op(x, cos, sin, weights, document_lengths, window, implementation):
    qkv = project(weights.qkv, rms_norm_reference(x, weights.attention_norm, EPSILONS[0]), implementation)
    q, k, v = qkv.unflatten(-1, (-1, CHANNELS)).split((HEADS, KV_HEADS, KV_HEADS), dim=2)
    if weights.q_norm is not None:
        q, k = (rms_norm_reference(x, w, 1e-4) for x, w in ((q, weights.q_norm), (k, weights.k_norm)))
    q, k = rotate_reference(q, cos, sin), rotate_reference(k, cos, sin)
    attended = attention(q, k, v, document_lengths=document_lengths, window=window)
    mid = x + project(weights.out, attended.flatten(2), implementation)
    normed = rms_norm_reference(mid, weights.feed_forward_norm, EPSILONS[1])
    activated = gated_reference(project(weights.gate_up, normed, implementation))
    return mid + project(weights.down, activated, implementation)


def leaves(weights, *, train_base):
    """All tensors, requiring gradients as in LoRA (adapters and, to see them, norms) or in full fine-tuning."""
    norms = (weights.attention_norm, weights.feed_forward_norm, weights.q_norm, weights.k_norm)
    tensors = [norm for norm in norms if norm is not None]
    for p in weights[2:6]:
        tensors += [t for t in (p.a, p.b, p.scale) if t is not None]
        tensors += [t for t in (p.weight, p.bias) if t is not None and train_base]
    return [t.requires_grad_() for t in tensors]


@pytest.fixture
def angles(draw):
    values = draw(1, 5, CHANNELS // 2)
    return values.cos().float(), values.sin().float()


# (adapted, train_base, bias, rate, head_norms, document_lengths, window, dora)
LAYERS = {
    "adapters": (True, False, False, 0.0, False, None, None, False),
    "weights, packed": (False, True, True, 0.0, False, ((1, 2), (3,)), None, False),
    "both, window": (True, True, True, 0.0, False, None, 2, False),
    "dropout": (True, False, True, 0.25, False, None, None, False),
    "head norms": (True, False, False, 0.0, True, None, None, False),
    "weights, head norms, packed": (False, True, True, 0.0, True, ((1, 2), (3,)), None, False),
    "DoRA": (True, True, True, 0.0, False, None, None, True),
    "DoRA, dropout and all": (True, False, True, 0.25, True, ((1, 2), (3,)), 2, True),
}
# The interpreter draws masks slowly: with dropout each rung has Triton's kernels once, in one layer or the other.
DRAWN_BY_TRITON = {
    ("dropout", "all"),
    ("dropout", "input"),
    ("DoRA, dropout and all", "mixer"),
    ("DoRA, dropout and all", "attention"),
}


@pytest.mark.parametrize(
    ("how", "keep", "implementation"),
    [
        (how, keep, implementation)
        for how, keep, implementation in product(LAYERS, KEEP, ("reference", "triton"))
        if implementation == "reference" or "dropout" not in how or (how, keep) in DRAWN_BY_TRITON
    ],
)
def test_output_and_every_gradient_are_those_of_autograd(how, keep, implementation, draw, angles):
    adapted, train_base, bias, rate, head_norms, document_lengths, window, dora = LAYERS[how]
    weights = layer(draw, adapted=adapted, bias=bias, rate=rate, head_norms=head_norms, dora=dora)
    angles = [table[:, :3] for table in angles]
    x, grad = draw(2, 3, WIDTH).float().requires_grad_(), draw(2, 3, WIDTH).float()
    inputs = [x, *leaves(weights, train_base=train_base)]
    expected = op_by_op(x, *angles, weights, document_lengths, window, implementation)
    options = BlockOptions(HEADS, KV_HEADS, EPSILONS, window, implementation, keep, head_epsilon=1e-4)
    actual = block(x, *angles, weights=weights, options=options, document_lengths=document_lengths)
    atol = 1e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=atol)  # float32, sums in another order
    truths, results = (torch.autograd.grad(y, inputs, grad) for y in (expected, actual))
    for index, (result, truth) in enumerate(zip(results, truths, strict=True)):
        error = (result - truth).abs().max() / truth.abs().max()
        assert error < 1e-4, f"input {index}: {error:.2g}"


@pytest.mark.parametrize(("head_norms", "dora"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rung_gives_the_same_bits(dtype, head_norms, dora, draw, angles, device):
    weights = layer(draw, head_norms=head_norms, dora=dora)
    frozen = [p._replace(weight=p.weight.to(dtype)) for p in weights[2:6]]
    heads = [None if norm is None else norm.to(dtype) for norm in weights[6:]]
    weights = BlockWeights(weights[0].to(dtype), weights[1].to(dtype), *frozen, *heads)
    tensors = leaves(weights, train_base=False)
    runs = []
    for keep in KEEP:
        x = torch.linspace(-1, 1, 5 * WIDTH, device=angles[0].device).view(1, 5, WIDTH).to(dtype).requires_grad_()
        options = BlockOptions(HEADS, KV_HEADS, EPSILONS, None, "triton", keep, head_epsilon=1e-4)
        y = block(x, *angles, weights=weights, options=options)
        runs.append([y.detach(), *torch.autograd.grad(y.sum(), [x, *tensors])])
    for run in runs[1:]:
        for expected, actual in zip(runs[0], run, strict=True):
            if device.type == "cpu":
                assert torch.equal(actual, expected)
            else:  # a GPU's attention adds up its gradients in no fixed order
                torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-6 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("keep", "train_base", "rate"),
    [
        *((keep, train_base, 0.0) for keep in ("mixer", "attention", "input") for train_base in (False, True)),
        ("input", False, 0.25),  # the interpreter draws masks slowly, and a rung draws those of the ones below it
    ],
)
def test_feed_forward_in_tiles_changes_nothing(keep, train_base, rate, draw, angles):
    weights = layer(draw, bias=True, rate=rate)
    x, grad = draw(1, 5, WIDTH).float().requires_grad_(), draw(1, 5, WIDTH).float()
    inputs = [x, *leaves(weights, train_base=train_base)]
    runs = []
    for tile_tokens in (None, 2):  # five rows: two full tiles and a shorter one
        options = BlockOptions(HEADS, KV_HEADS, EPSILONS, implementation="triton", keep=keep, tile_tokens=tile_tokens)
        y = block(x, *angles, weights=weights, options=options)
        runs.append([y.detach(), *torch.autograd.grad(y, inputs, grad)])
    for whole, tiled in zip(*runs, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-4)  # sums over tiles in another order


class OtherMatrix:
    """A weight that is not a tensor, as the quant room's are not."""

    def __init__(self, weight, *, accumulates):
        self.weight, self.shape, self.accumulates = weight, weight.shape, accumulates

    def matmul(self, x, *, onto=None):
        return x @ self.weight.T if onto is None else onto.addmm_(x, self.weight.T)

    def matmul_transposed(self, grad, *, onto=None):
        return grad @ self.weight if onto is None else onto.addmm_(grad, self.weight)


@pytest.mark.parametrize("accumulates", [False, True])
def test_a_weight_in_another_form_is_only_asked_for_its_products(draw, angles, accumulates):
    weights = layer(draw)
    others = (p._replace(weight=OtherMatrix(p.weight, accumulates=accumulates)) for p in weights[2:6])
    other = BlockWeights(*weights[:2], *others)
    x = draw(1, 5, WIDTH).float().requires_grad_()
    inputs = [x, *leaves(weights, train_base=False)]
    options = BlockOptions(HEADS, KV_HEADS, EPSILONS, implementation="triton", keep="attention")
    expected, actual = (block(x, *angles, weights=w, options=options) for w in (weights, other))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # to a tensor, matmuls add what is there first
    for result, truth in zip(
        torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(result, truth, rtol=1e-4, atol=1e-3)


def kept_bytes(keep, draw, angles):
    """Bytes of distinct storages that the layer's graph holds, its inputs and weights left out."""
    weights = layer(draw)
    x = draw(1, 5, WIDTH).float().requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (x, *angles, *leaves(weights, train_base=True))}
    held = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    options = BlockOptions(HEADS, KV_HEADS, EPSILONS, implementation="triton", keep=keep)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x, *angles, weights=weights, options=options)
    attended = y.grad_fn.attended
    return sum(held.values()), attended


def test_each_rung_keeps_what_its_table_says(draw, angles):
    products = 5 * RANK * (3 + 1 + 2 + 1) * 4 + 2 * 5 * 4  # and each norm's rstd
    mid, gate_up = 5 * WIDTH * 4, 5 * 2 * INNER * 4
    for keep, expected in (("all", mid + gate_up), ("mixer", mid), ("attention", 0), ("input", 0)):
        held, attended = kept_bytes(keep, draw, angles)
        assert held == products + expected, keep
        assert (attended is None) == (keep == "input")


def test_a_second_backward_is_refused(draw, angles):
    x = draw(1, 5, WIDTH).float().requires_grad_()
    options = BlockOptions(HEADS, KV_HEADS, EPSILONS)
    y = block(x, *angles, weights=layer(draw), options=options)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran already"):
        y.sum().backward()


def test_unknown_rung_is_refused():
    with pytest.raises(ValueError, match="keep = 'some'; allowed: all, mixer, attention, input"):
        BlockOptions(HEADS, KV_HEADS, EPSILONS, keep="some")
    with pytest.raises(ValueError, match="tile_tokens = 0 is not positive"):
        BlockOptions(HEADS, KV_HEADS, EPSILONS, tile_tokens=0)


def test_what_nothing_needs_is_not_computed(draw, angles):
    """Below the first layer of a frozen base nothing asks for the gradient of x; the adapters' stay the same."""
    weights = layer(draw)
    adapters = leaves(weights, train_base=False)
    options = BlockOptions(HEADS, KV_HEADS, EPSILONS, implementation="triton")
    grads = []
    for needs in (True, False):
        x = torch.linspace(-1, 1, 5 * WIDTH).view(1, 5, WIDTH).requires_grad_(needs)
        y = block(x, *angles, weights=weights, options=options)
        grads.append(torch.autograd.grad(y.square().sum(), adapters))
    for with_x, without in zip(*grads, strict=True):
        assert torch.equal(with_x, without)
