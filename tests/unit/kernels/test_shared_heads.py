"""Heads that share keys before a kernel that knows none: the kernel itself is CUDA's, a formula stands for it here."""

import pytest
import torch

from stoker.kernels import shared_heads as module
from stoker.kernels.attention import attention, attention_reference

TOLERANCE = 1e-12  # fp64 on both sides; sums over a group's heads are rounded to fp32


def formula(q, k, v, scale):
    scores = torch.einsum("bhte,bhse->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ v


class Kernel:
    """Memory-efficient attention as PyTorch calls it, by the formula, in fp64; it takes as many heads of each kind."""

    def forward(self, q, k, v, bias, wants_sums, dropout, causal, *, scale):
        assert q.shape == k.shape == v.shape
        assert (bias, wants_sums, dropout, causal) == (None, True, 0.0, True)
        nothing = torch.zeros(())
        return formula(q, k, v, scale), torch.zeros(q.shape[:3]), nothing, nothing

    def backward(self, grad, q, k, v, bias, out, sums, seed, offset, dropout, wanted, causal, *, scale):
        assert (bias, dropout, wanted, causal) == (None, 0.0, [True, True, True, False], True)
        inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            again = formula(*inputs, scale)
        assert torch.equal(again.detach(), out)
        return *torch.autograd.grad(again, inputs, grad), torch.zeros(())


@pytest.fixture
def kernel(monkeypatch):
    made = Kernel()
    monkeypatch.setattr(module.torch.ops.aten, "_scaled_dot_product_efficient_attention", made.forward)
    monkeypatch.setattr(module.torch.ops.aten, "_scaled_dot_product_efficient_attention_backward", made.backward)
    monkeypatch.setattr("stoker.kernels.attention.knows_shared_heads", lambda q: False)
    monkeypatch.setattr("stoker.kernels.attention.can_share", lambda *heads: True)


def draw(kv_heads, heads=4, length=12):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, length, count, 8) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("lengths", [None, ((5, 7), (12,))])
def test_result_and_gradients_are_the_formula_s(kernel, kv_heads, scale, lengths):
    heads = draw(kv_heads)
    out = attention(*heads, scale=scale, document_lengths=lengths)
    expected = attention_reference(*heads, scale=scale, document_lengths=lengths)
    assert (out - expected).abs().max() <= TOLERANCE
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    found, wanted = (torch.autograd.grad((x * weights).sum(), heads) for x in (out, expected))
    for grad, one in zip(found, wanted, strict=True):
        assert (grad - one).abs().max() <= 1e-6


def test_repeated_keys_are_not_kept(kernel):
    kept, heads = [], draw(kv_heads=1)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        module.shared_heads(*heads, None)
    assert sorted(x.numel() for x in kept if x.ndim == 4) == [192, 192, 768, 768]  # k, v, q and the result


def test_what_cannot_share_is_repeated_and_not_left_to_a_matrix_of_all_scores(monkeypatch):
    given = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **options):
        given.append((k.shape[1], options["enable_gqa"]))
        return original(q, k, v, **options)

    monkeypatch.setattr("stoker.kernels.attention.scaled_dot_product_attention", spy)
    monkeypatch.setattr("stoker.kernels.attention.knows_shared_heads", lambda q: False)
    heads = draw(kv_heads=2)
    out = attention(*heads, window=4)
    assert (out - attention_reference(*heads, window=4)).abs().max() <= TOLERANCE
    assert set(given) == {(4, False)}
