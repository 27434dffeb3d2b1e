from functools import partial

import pytest
import torch

from stoker.kernels.attention import _variable_length, attend_cached, attention, attention_reference
from stoker.kernels.documents import Boundaries

# fp32 on both sides, values of order 1, sums of at most 40 terms in another order.
TOLERANCE = 2e-6


def draw(batch=2, length=24, heads=4, kv_heads=2, dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, heads, dim), (batch, length, kv_heads, dim), (batch, length, kv_heads, dim)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def gradients(op, inputs):
    out = op(*inputs)
    return out, torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum(), inputs)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 5, 24, 100])
@pytest.mark.parametrize("lengths", [None, ((24,), (24,)), ((7, 16, 1), (1, 23))])
def test_output_and_gradients_equal_the_formula(kv_heads, window, lengths):
    inputs = draw(kv_heads=kv_heads)
    options = {"document_lengths": lengths, "window": window}
    out, grads = gradients(lambda *x: attention(*x, **options), inputs)
    expected, expected_grads = gradients(lambda *x: attention_reference(*x, **options), inputs)
    assert (out - expected).abs().max() <= TOLERANCE
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert (grad - wanted).abs().max() <= 10 * TOLERANCE  # sums over heads of a group and over queries


def test_window_runs_in_blocks_longer_than_one(monkeypatch):
    monkeypatch.setattr("stoker.kernels.attention._MAX_QUERY_BLOCK", 4)
    inputs = draw()
    assert (attention(*inputs, window=9) - attention_reference(*inputs, window=9)).abs().max() <= TOLERANCE


def test_packed_documents_do_not_attend_across_boundary():
    q, k, v = (x.detach() for x in draw(batch=1))
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :10] += 1.0
    before, after = (attention(*x, document_lengths=((10, 14),)) for x in ((q, k, v), changed))
    assert torch.equal(before[:, 10:], after[:, 10:])
    assert not torch.equal(before[:, :10], after[:, :10])


def test_no_mask_is_as_large_as_the_square_of_the_length(monkeypatch):
    largest = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **options):
        largest.append(0 if attn_mask is None else attn_mask.numel())
        return original(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr("stoker.kernels.attention.scaled_dot_product_attention", spy)
    x = torch.randn(1, 2048, 1, 4)
    attention(x, x, x)
    attention(x, x, x, document_lengths=((1000, 1048),))
    assert max(largest) == 0
    attention(x, x, x, window=64)
    assert 0 < max(largest) <= 64 * 128


@pytest.mark.parametrize("lengths", [((24,),), ((20, 3), (24,))])
def test_lengths_that_do_not_cover_the_rows_are_refused(lengths):
    with pytest.raises(ValueError, match="2 rows that sum to 24"):
        attention(*draw(), document_lengths=lengths)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("new", [1, 3, 24])
def test_last_positions_of_a_cache_equal_the_whole(new, window):
    q, k, v = draw()
    expected = attention_reference(q, k, v, window=window)[:, -new:]
    assert (attend_cached(q[:, -new:], k, v, window=window) - expected).abs().max() <= TOLERANCE


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="cuda-magic"):
        attention(*draw(), implementation="cuda-magic")


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("attend", [attention, attention_reference])
def test_boundaries_with_empty_documents_mean_the_same_as_lengths(attend, window):
    inputs = draw()
    ends = torch.tensor([0, 0, 10, 24, 24, 48, 48, 48], dtype=torch.int32)
    results = []
    for documents in (Boundaries(ends, 24), ((10, 14), (24,))):
        op = partial(attend, document_lengths=documents, window=window)
        out, grads = gradients(op, inputs)
        results.append([out, *grads])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("window", [None, 5])
def test_variable_length_attention_is_called_as_this_version_of_pytorch_has_it(window):
    """Without a GPU, so without values; those are compared in tests/kernels."""
    q, k, v = (x.detach().to("meta", torch.bfloat16).requires_grad_() for x in draw())
    ends = Boundaries(torch.zeros(5, dtype=torch.int32, device="meta"), 24)
    out = _variable_length(q, k, v, ends, window=window, scale=None)
    assert out.shape == q.shape
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [grad.shape for grad in grads] == [x.shape for x in (q, k, v)]
    assert "Flash" in type(torch.autograd.graph.get_gradient_edge(out).node.next_functions[0][0]).__name__
