"""The mixture of experts and its parts against their references, under the interpreter or on the GPU."""

import pytest
import torch

from stoker.kernels import grouped_matmul as module
from stoker.kernels import routed_rows
from stoker.kernels.grouped_matmul import grouped_matmul
from stoker.kernels.grouped_outer import grouped_outer
from stoker.kernels.mixture import ExpertMatrix, MixtureOptions, mixture, mixture_reference
from stoker.kernels.routing import choose

# Rows of each expert: even, one expert with all, empty ones first, last and between, none at all.
COUNTS = [(16, 16, 16, 16), (0, 70, 0, 3), (65, 0, 1, 0), (0, 0, 0, 0)]


def ends_of(counts, device):
    return torch.tensor(counts, device=device).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("counts", "sizes"), [(counts, (24, 40)) for counts in COUNTS] + [((140, 0, 3, 1), (160, 128))]
)
def test_grouped_matmul_with_gathered_rows_bias_and_update(
    assert_as_exact_as_eager, draw, device, counts, sizes, transposed, dtype
):
    (num_out, num_in), rank, num_rows = sizes, 3, sum(counts)
    depth, columns = (num_out, num_in) if transposed else (num_in, num_out)
    rows = torch.randint(9, (num_rows,), generator=torch.Generator().manual_seed(3)).to(device, torch.int32)
    inputs = [
        draw(9, depth),
        draw(4, num_out, num_in, scale=0.2),
        draw(4, columns),
        draw(num_rows, rank),
        draw(4, rank, num_in) if transposed else draw(4, num_out, rank),
    ]

    def run(implementation):
        return lambda x, weight, bias, product, factor: grouped_matmul(
            x,
            weight,
            ends_of(counts, device),
            rows=rows,
            transposed=transposed,
            bias=bias,
            product=product,
            factor=factor,
            scaling=0.5,
            implementation=implementation,
        )

    assert_as_exact_as_eager(run("triton"), run("reference"), inputs, dtype=dtype, gradients=False)


@pytest.mark.parametrize("columns", [5, 100])
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_outer_product_of_gathered_rows(assert_as_exact_as_eager, draw, device, counts, columns):
    num_rows = sum(counts)
    rows = torch.randint(9, (num_rows,), generator=torch.Generator().manual_seed(3)).to(device, torch.int32)

    def run(implementation):
        return lambda left, right: grouped_outer(
            left,
            right,
            ends_of(counts, device),
            left_rows=rows,
            scaling=0.5,
            dtype=left.dtype,
            implementation=implementation,
        )

    inputs = [draw(9, columns), draw(num_rows, 24)]
    assert_as_exact_as_eager(run("triton"), run("reference"), inputs, dtype=torch.float32, gradients=False)


@pytest.mark.parametrize("limit", [None, 0.7])
def test_gate_and_its_backward(assert_as_exact_as_eager, draw, limit):
    inputs = [draw(7, 2 * 20), draw(7, 20), draw(7)]
    for kernel in (
        lambda kind: lambda z, grad, weights: routed_rows.gate(z, limit=limit, implementation=kind),
        lambda kind: (
            lambda z, grad, weights: routed_rows.gate_backward(z, grad, weights, limit=limit, implementation=kind)[:2]
        ),
    ):
        assert_as_exact_as_eager(kernel("triton"), kernel("reference"), inputs, dtype=torch.float32, gradients=False)


def test_tokens_keep_their_order_within_an_expert(device):
    chosen = torch.tensor([[2, 0], [0, 2], [3, 0]], device=device)
    order = routed_rows.sort_by_expert(chosen, 4)
    assert order.ends.tolist() == [3, 3, 5, 6]
    assert order.tokens.tolist() == [0, 1, 2, 0, 1, 2]
    assert order.tokens[order.place.long()].view(3, 2).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert order.order[order.place.long()].tolist() == list(range(6))


@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), [(1, 4, 1), (70, 5, 2), (300, 128, 8), (33, 60, 4)])
def test_sorting_by_counting_is_the_stable_sort(device, tokens, num_experts, top_k):
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices
    chosen = torch.where(chosen == 3, 0, chosen).to(device)  # an expert without rows
    expected = routed_rows.sort_by_expert(chosen, num_experts)
    actual = routed_rows.sort_by_expert(chosen, num_experts, implementation="triton")
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), [(1, 4, 1), (37, 60, 4), (20, 128, 8), (9, 6, 6)])
def test_choice_of_experts_and_its_gradient(assert_as_exact_as_eager, draw, tokens, num_experts, top_k, normalized):
    logits = draw(tokens, num_experts, scale=2.0)

    def run(kind):
        return lambda x: choose(x, top_k, normalized=normalized, scale=1.5, implementation=kind)[0]

    assert_as_exact_as_eager(run("triton"), run("reference"), [logits], dtype=torch.float32)
    both = [choose(logits.float(), top_k, normalized=normalized, implementation=k)[1] for k in ("triton", "reference")]
    assert torch.equal(*both)


def test_of_equal_logits_the_first_are_chosen_and_none_leads_out_of_the_experts(device):
    logits = torch.zeros(3, 6, device=device)
    logits[1] = float("nan")
    _, chosen = choose(logits, 2, normalized=True, implementation="triton")
    assert chosen[0].tolist() == chosen[2].tolist() == [0, 1]
    assert chosen.min() >= 0
    assert chosen.max() < 6


def problem(draw, *, bias, adapters, num_experts=4, width=24, inner=20, rank=3, tokens=13, top_k=2):
    generator = torch.Generator().manual_seed(2)
    chosen = torch.stack([torch.randperm(num_experts - 1, generator=generator)[:top_k] for _ in range(tokens)])
    tensors = [draw(tokens, width), draw(tokens, top_k).abs()]
    for out, size in ((2 * inner, width), (width, inner)):
        tensors.append(draw(num_experts, out, size, scale=0.3))
        tensors += [draw(num_experts, out)] if bias else []
        tensors += [draw(num_experts, rank, size, scale=0.3), draw(num_experts, out, rank)] if adapters else []
    return tensors, chosen


def matrices(tensors, *, bias, adapters):
    rest, made = list(tensors), []
    for _ in range(2):
        weight = rest.pop(0)
        c = rest.pop(0) if bias else None
        a, b = (rest.pop(0), rest.pop(0)) if adapters else (None, None)
        made.append(ExpertMatrix(weight, c, a, b, 0.5))
    return made


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize(("bias", "adapters", "limit"), [(False, True, None), (True, True, 0.9), (False, False, None)])
def test_mixture_and_all_its_gradients(assert_as_exact_as_eager, draw, device, implementation, bias, adapters, limit):
    tensors, chosen = problem(draw, bias=bias, adapters=adapters)
    chosen = chosen.to(device)

    def ours(x, weights, *rest):
        options = MixtureOptions(4, limit, implementation)
        return mixture(x, weights, chosen, *matrices(rest, bias=bias, adapters=adapters), options=options)

    def oracle(x, weights, *rest):
        return mixture_reference(x, weights, chosen, *matrices(rest, bias=bias, adapters=adapters), limit=limit)

    assert_as_exact_as_eager(ours, oracle, tensors, dtype=torch.float32, factor=4.0)


def test_reference_gradients_equal_numeric_ones(draw):
    tensors, chosen = problem(draw, bias=True, adapters=True, width=4, inner=3, rank=2, tokens=3)
    leaves = [tensor.cpu().requires_grad_() for tensor in tensors]

    def run(x, weights, *rest):
        return mixture(
            x, weights, chosen, *matrices(rest, bias=True, adapters=True), options=MixtureOptions(4, 0.9, "reference")
        )

    assert torch.autograd.gradcheck(run, leaves, eps=1e-6, atol=1e-5)


def test_two_runs_agree_bit_for_bit(draw, device):
    tensors, chosen = problem(draw, bias=False, adapters=True)
    leaves = [tensor.float().requires_grad_() for tensor in tensors]
    results = []
    for _ in range(2):
        out = mixture(
            *leaves[:2],
            chosen.to(device),
            *matrices(leaves[2:], bias=False, adapters=True),
            options=MixtureOptions(4, None, "triton"),
        )
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_matmul_of_rows_that_are_sorted(assert_as_exact_as_eager, draw, device, transposed):
    counts, num_out, num_in = (70, 0, 129, 1), 192, 128
    inputs = [draw(sum(counts), num_out if transposed else num_in), draw(4, num_out, num_in, scale=0.2)]

    def run(implementation):
        return lambda x, weight: grouped_matmul(
            x, weight, ends_of(counts, device), transposed=transposed, implementation=implementation
        )

    assert_as_exact_as_eager(run("triton"), run("reference"), inputs, dtype=torch.bfloat16, gradients=False)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_read_through_descriptors_are_those_read_through_pointers(
    assert_as_exact_as_eager, draw, device, monkeypatch, transposed, gathered
):
    if device.type == "cuda":
        pytest.skip("a GPU chooses by itself; the tests above run what it chooses")
    tile = module.Tile(16, 32, 16, 4, 2)
    monkeypatch.setattr(module, "WIDE", tile)
    monkeypatch.setattr(module, "tile_for", lambda *_: tile)
    monkeypatch.setattr(module, "_has_boxes", lambda *_: True)
    counts, num_out, num_in = (20, 0, 33, 1), 48, 64
    rows = torch.randint(9, (54,), generator=torch.Generator().manual_seed(3)).to(torch.int32) if gathered else None
    inputs = [draw(9 if gathered else 54, num_out if transposed else num_in), draw(4, num_out, num_in, scale=0.2)]

    def run(implementation):
        return lambda x, weight: grouped_matmul(
            x, weight, ends_of(counts, device), rows=rows, transposed=transposed, implementation=implementation
        )

    assert_as_exact_as_eager(run("triton"), run("reference"), inputs, dtype=torch.float32, gradients=False)
